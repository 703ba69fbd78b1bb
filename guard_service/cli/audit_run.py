"""What `guardctl audit` does."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from guard_service.audit.files import HEAD
from guard_service.audit.keys import AuditError, read_keys
from guard_service.audit.verifying import Found, Tampered, entries, segments_of, verify
from guard_service.cli.exits import NO_VERDICT, OK, USAGE, fail, printable

WITNESS = re.compile(r"([0-9]+):([0-9a-f]{64})")


def verified(paths: Sequence[Path], key: Path, first: int, head: bool, reaches: str) -> int:
    """Say what was found; the exit code."""
    witness = WITNESS.fullmatch(reaches)
    if reaches and witness is None:
        fail(f"--reaches {reaches!r}: must be LINES:MAC", USAGE)
    try:
        segments = segments_of(paths)
        found = verify(
            segments,
            segments[-1].with_name(HEAD) if head else None,
            read_keys(key),
            first,
            (int(witness[1]), witness[2]) if witness else None,
        )
    except Tampered as broken:
        print(f"BROKEN {printable(str(broken))}")
        return NO_VERDICT
    except (AuditError, OSError, ValueError) as error:
        fail(str(error), USAGE)
    _tell(found)
    return OK


def _tell(found: Found) -> None:
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(found.kinds.items()))
    print(f"whole: {sum(found.kinds.values())} lines in {found.segments} segments: {kinds}")
    print(f"reaches {found.lines}:{found.last}")
    for note in found.notes:
        print(f"note: {note}")


def shown(paths: Sequence[Path], key: Path, wanted: Mapping[str, str], as_json: bool) -> int:
    """Print the lines that are wanted; the exit code."""
    try:
        for entry in entries(segments_of(paths), read_keys(key)):
            if all(entry.get(name) == value for name, value in wanted.items() if value):
                print(json.dumps(entry) if as_json else printable(_short(entry)))
    except Tampered as broken:
        fail(f"BROKEN {broken}", NO_VERDICT)
    except (AuditError, OSError, ValueError) as error:
        fail(str(error), USAGE)
    return OK


def _short(entry: Mapping[str, Any]) -> str:
    match entry["kind"]:
        case "verdict":
            fired = ",".join(entry["fired"]) or "-"
            said = f"{entry['action']} {entry['unsafe']:.4f} {fired} {entry['direction']}"
            said += f" {entry['policy']['name']} {entry['verdict_id']}"
        case "unjudged" | "refused":
            said = f"{entry['code']} {entry['reason']}"
        case _:
            said = str(entry.get("why", ""))
    asked = " ".join(filter(None, (entry.get("request_id"), entry.get("tenant"))))
    return f"{entry['n']:>7} {entry['time']} {entry['kind']:<8} {said} {asked}".rstrip()
