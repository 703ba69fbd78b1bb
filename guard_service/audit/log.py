"""An audit log as it is written: the chain, carried on over segments and restarts. One thread."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from guard_service import __version__
from guard_service.audit import files
from guard_service.audit.chain import NOTHING, Broken, Entry, opened, sealed
from guard_service.audit.host import surroundings
from guard_service.audit.keys import AuditError, Keys
from guard_service.logs import FIELDS

LOG = logging.getLogger("guard_service.audit")


def now() -> str:
    """The time of a line."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


@dataclass(slots=True)
class Reached:
    """How far a log has come: its last line, and where that is."""

    log: str
    segment: int = 0
    lines: int = 0  # of the whole log; the next one's number
    mac: str = NOTHING
    ended: bool = True  # the segment has its last line
    torn: int = 0  # bytes of a line that was never finished, behind it
    lost: int = 0  # lines that were there, by the head, and are there no more

    @property
    def head(self) -> dict[str, Any]:
        """What the head's file says."""
        return {"log": self.log, "segment": self.segment, "lines": self.lines, "last": self.mac}


class Log:
    """Appends lines. Raises AuditError for a folder or a log that it cannot go on with."""

    def __init__(
        self,
        folder: Path,
        keys: Keys,
        segment_bytes: int,
        fsync: bool,
        clock: Callable[[], str] = now,
    ) -> None:
        self._folder = folder
        self._keys = keys
        self._most = segment_bytes
        self._fsync = fsync
        self._clock = clock
        self._lock = files.prepared(folder)
        self._file: int | None = None
        self._size = 0
        self._host = surroundings()
        self._missed = 0  # entries that could not be written since the last that could
        try:
            self.reached = left_off(folder, keys) or Reached(uuid.uuid4().hex)
            self._begin("start")
        except OSError as error:
            self._close()
            raise AuditError(f"audit: cannot write to {folder}: {error.strerror}") from error
        except AuditError:
            self._close()
            raise

    def append(self, entries: Sequence[Entry]) -> None:
        """Write all of them, or none: then OSError tells why, and the next that is written tells
        how many are missing."""
        try:
            if self._file is None or self._size >= self._most:
                self._rotate()
            missed = {"missed": self._missed} if self._missed else {}
            self._write([{**entries[0], **missed}, *entries[1:]])
        except OSError:
            self._missed += len(entries)
            raise
        self._missed = 0

    def stop(self) -> None:
        """Write the last line and close. An error does not matter any more, but for the log, which
        then looks as if its process had been killed."""
        with suppress(OSError):
            if self._file is not None:
                self._end("stop")
                LOG.info("the audit log ends", extra={FIELDS: self.reached.head})
        self._close()

    def _rotate(self) -> None:
        if self._file is not None:
            self._end("rotation")
            os.close(self._file)
            self._file = None
        self._begin("rotation")

    def _begin(self, why: str) -> None:
        """A new segment, whose first line holds what is known of the one before."""
        reached = self.reached
        number = reached.segment + 1
        place = self._folder / files.segment_name(number)
        place.unlink(missing_ok=True)  # begun before, and then its first line could not be written
        self._file, self._size = files.new_segment(place), 0
        first = {
            "kind": "segment",
            "log": reached.log,
            "segment": number,
            "key": self._keys.name,
            "why": why,
            "version": __version__,
            "host": self._host,
            "after": {
                "segment": reached.segment,
                "ended": reached.ended,
                "torn_bytes": reached.torn,
                "lost_lines": reached.lost,
            },
        }
        try:
            self._write([first], segment=number)
        except OSError:
            os.close(self._file)
            self._file = None
            raise
        reached.ended, reached.torn, reached.lost = False, 0, 0
        LOG.info("the audit log goes on", extra={FIELDS: reached.head})

    def _end(self, why: str) -> None:
        self._write([{"kind": "end", "why": why}])
        self.reached.ended = True

    def _write(self, entries: Sequence[Entry], segment: int | None = None) -> None:
        """Append lines, then the head. What a failed write left is taken back."""
        assert self._file is not None
        reached = self.reached
        lines, number, mac = [], reached.lines, reached.mac
        for entry in entries:
            whole = {"n": number, "time": self._clock(), **entry, "prev": mac}
            line, mac = sealed(whole, self._keys.chain)
            lines.append(line + b"\n")
            number += 1
        data = b"".join(lines)
        try:
            files.write_whole(self._file, data)
            if self._fsync:
                os.fsync(self._file)
        except OSError:
            self._take_back()
            raise
        self._size += len(data)
        reached.lines, reached.mac, reached.segment = number, mac, segment or reached.segment
        head, _ = sealed(reached.head, self._keys.chain)
        # A head that is behind is still true: what it does not reach can be cut unseen.
        with suppress(OSError):
            files.replace_head(self._folder, head)

    def _take_back(self) -> None:
        """Cut the segment to what was whole; where that fails, leave it and begin another."""
        assert self._file is not None
        try:
            os.ftruncate(self._file, self._size)
        except OSError:
            self.reached.torn = max(os.fstat(self._file).st_size - self._size, 0)
            os.close(self._file)
            self._file = None

    def _close(self) -> None:
        for file in (self._file, self._lock):
            if file is not None:
                os.close(file)
        self._file = None


def left_off(folder: Path, keys: Keys) -> Reached | None:
    """Where an earlier process stopped; None for a new log.

    Raises AuditError for a log of another key, or whose last lines were changed. Lines that the
    head has reached and that are not there any more are `lost`: the next segment tells of them.
    """
    head = _head(folder, keys)
    for path in reversed(files.segments(folder)):
        entries, torn = _whole(path, keys)
        if entries:
            first, last = entries[0], entries[-1]
            reached = Reached(
                str(first["log"]),
                int(first["segment"]),
                int(last["n"]) + 1,
                str(last["mac"]),
                ended=last["kind"] == "end",
                torn=torn,
            )
            break
        path.unlink()  # its process ended before its first line was whole
    else:
        if head is None:
            return None
        reached = Reached(str(head["log"]), int(head["segment"]))
    if head is not None:
        reached.lost = max(int(head["lines"]) - reached.lines, 0)
    return reached


def _head(folder: Path, keys: Keys) -> Entry | None:
    path = folder / files.HEAD
    if not path.exists():
        return None
    try:
        return opened(path.read_bytes().removesuffix(b"\n"), keys.chain)
    except Broken as broken:
        raise _unusable(path, broken) from None


def _whole(path: Path, keys: Keys) -> tuple[list[Entry], int]:
    """The first and the last whole line of a segment, and the bytes of an unfinished one."""
    entries: list[Entry] = []
    for line, whole in files.lines_of(path):
        if not whole:
            return entries, len(line)
        try:
            entries = [*entries[:1], opened(line, keys.chain)]
        except Broken as broken:
            raise _unusable(path, broken) from None
    return entries, 0


def _unusable(path: Path, broken: Broken) -> AuditError:
    return AuditError(
        f"audit: {path} {broken}; guardctl audit verify tells where. Give the server its right "
        "key, or keep this folder as it is and give it another one"
    )
