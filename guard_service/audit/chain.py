"""Lines of an audit log: JSON objects, each with the one before it under a keyed hash.

    {"n": 7, "kind": "verdict", ..., "prev": MAC of line 6, "mac": MAC of this line}

The MAC is HMAC-SHA-256 of the line's very bytes up to `,"mac":`, so that who lacks the key can
change, add or take away nothing without breaking it, not even the spelling.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Mapping
from typing import Any

NOTHING = "0" * 64  # before the first line
_END = re.compile(rb',"mac":"([0-9a-f]{64})"\}\Z')

Entry = Mapping[str, Any]


class Broken(ValueError):
    """What is wrong with a line."""


def sealed(entry: Entry, key: bytes) -> tuple[bytes, str]:
    """The line, without its newline, and its MAC. Floats are written so that they read the same."""
    body = json.dumps(entry, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()
    mac = _mac(body, key)
    return body[:-1] + f',"mac":"{mac}"}}'.encode(), mac


def opened(line: bytes, key: bytes) -> dict[str, Any]:
    """What a line says. Raises Broken for one that the key's owner did not write."""
    end = _END.search(line)
    if end is None:
        raise Broken("is not a line of an audit log, or was cut")
    if not hmac.compare_digest(_mac(line[: end.start()] + b"}", key), end[1].decode()):
        raise Broken("was changed, or written without the key")
    entry: dict[str, Any] = json.loads(line)
    return entry


def _mac(body: bytes, key: bytes) -> str:
    return hmac.digest(key, body, hashlib.sha256).hex()
