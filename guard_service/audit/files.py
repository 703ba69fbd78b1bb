"""The files of an audit log: segments in a folder, and a head that says how far they reach.

Segments are `audit-000001.jsonl` and so on. `audit.head` is one line of the same kind as theirs; it
is written anew behind every batch of lines, so that a log that was cut is shorter than it says.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from guard_service.audit.keys import AuditError

HEAD = "audit.head"
LOCK = "audit.lock"
SEGMENT = re.compile(r"audit-([0-9]{6,})\.jsonl")
PRIVATE = 0o600


def segment_name(number: int) -> str:
    """The file of a segment; the first is 1."""
    return f"audit-{number:06}.jsonl"


def segments(folder: Path) -> list[Path]:
    """All that are there, by number."""
    found = [path for path in folder.iterdir() if SEGMENT.fullmatch(path.name)]
    return sorted(found, key=lambda path: number_of(path) or 0)


def number_of(path: Path) -> int | None:
    """The number in a segment's name; None for another name."""
    match = SEGMENT.fullmatch(path.name)
    return int(match[1]) if match else None


def prepared(folder: Path) -> int:
    """Make the folder if it is not there, and lock it; the lock, which closing opens.

    Raises AuditError for a folder that anybody may write into, or that another process logs to.
    """
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        mode = folder.stat().st_mode
        if mode & stat.S_IWOTH:
            raise AuditError(f"audit: anybody may write into {folder}; chmod o-w {folder}")
        lock = os.open(
            folder / LOCK, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, PRIVATE
        )
    except OSError as error:
        raise AuditError(f"audit: {folder}: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise AuditError(
            f"audit: another process writes to {folder}; give each server a folder of its own"
        ) from None
    return lock


def new_segment(path: Path) -> int:
    """A new file, open for appending. Raises OSError."""
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(path, flags, PRIVATE)


def write_whole(file: int, data: bytes) -> None:
    """Raises OSError when not all of it can be written; a part may have been."""
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def replace_head(folder: Path, line: bytes) -> None:
    """Put a new head in the old one's place, whole or not at all. Raises OSError."""
    beside = folder / f"{HEAD}.new"
    flags = os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    file = os.open(beside, flags, PRIVATE)
    try:
        write_whole(file, line + b"\n")
    finally:
        os.close(file)
    beside.replace(folder / HEAD)


def lines_of(path: Path) -> Iterator[tuple[bytes, bool]]:
    """Lines without their newline, and whether they had one. Raises OSError."""
    with path.open("rb") as file:
        for line in file:
            yield line.removesuffix(b"\n"), line.endswith(b"\n")
