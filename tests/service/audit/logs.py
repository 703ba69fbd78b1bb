"""Audit logs for tests: keys, lines that are not of a server, and how they are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from guard_service.audit.files import HEAD, segments
from guard_service.audit.keys import keys_of
from guard_service.audit.log import Log
from guard_service.audit.verifying import Found, verify

KEYS = keys_of(b"k" * 32)
OTHER = keys_of(b"o" * 32)


def entry(number: int, **fields: Any) -> dict[str, Any]:
    """Something to record."""
    return {"kind": "verdict", "request_id": f"r{number}", "unsafe": 0.1 + number, **fields}


def written(folder: Path, lines: int = 12, keys: Any = KEYS, segment_bytes: int = 1100) -> Path:
    """A log of several segments that was ended properly."""
    log = Log(folder, keys, segment_bytes, fsync=False)
    for number in range(lines):
        log.append([entry(number)])
    log.stop()
    return folder


def checked(folder: Path, keys: Any = KEYS, **options: Any) -> Found:
    """The log of a folder, verified with its head."""
    return verify(segments(folder), folder / HEAD, keys, **options)


def lines(folder: Path) -> list[dict[str, Any]]:
    """All that the segments say."""
    return [
        json.loads(line) for path in segments(folder) for line in path.read_bytes().splitlines()
    ]
