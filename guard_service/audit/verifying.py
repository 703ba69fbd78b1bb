"""Whether an audit log is what its server wrote: the first line that is not, by file and number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guard_service.audit import files
from guard_service.audit.chain import NOTHING, Broken, opened
from guard_service.audit.keys import Keys


class Tampered(Exception):
    """Where a log breaks, and how."""

    def __init__(self, file: Path, line: int, what: str) -> None:
        super().__init__(f"{file.name}:{line}: {what}" if line else f"{file.name}: {what}")


@dataclass(slots=True)
class Found:
    """What a log that holds consists of; `notes` are what its reader should know."""

    log: str = ""
    segments: int = 0
    lines: int = 0  # of the log, from its very first; the next would have this number
    last: str = NOTHING
    kinds: dict[str, int] = field(default_factory=dict)
    missed: int = 0
    ended: bool = False
    notes: list[str] = field(default_factory=list)


def segments_of(paths: Sequence[Path]) -> list[Path]:
    """The segments that folders and files stand for, in order. Raises OSError, ValueError."""
    found: list[Path] = []
    for path in paths:
        found += files.segments(path) if path.is_dir() else [path]
    if not found:
        raise ValueError("there are no segments (audit-000001.jsonl, ...) of an audit log")
    return sorted(found, key=lambda path: (files.number_of(path) or 0, path.name))


def verify(
    segments: Sequence[Path],
    head: Path | None,
    keys: Keys,
    first: int = 1,
    reaches: tuple[int, str] | None = None,
) -> Found:
    """Check all lines, in order. `first` is the number of the first segment that is to be there.

    `head` is the head's file; None for copies without it: lines that were cut from the end are then
    not missed. `reaches` is a number of lines and the MAC of the last of them, as the server's own
    log or another witness has it. Raises Tampered.
    """
    check = _Check(keys, first)
    for path in segments:
        check.segment(path)
    check.finish()
    if head is not None:
        check.head(head)
    if reaches is not None:
        check.reaches(reaches, segments[-1])
    return check.found


def entries(segments: Sequence[Path], keys: Keys) -> Iterator[dict[str, Any]]:
    """What the lines say, each checked alone: `verify` tells of gaps. Raises Tampered."""
    for path in segments:
        for number, (line, whole) in enumerate(files.lines_of(path), 1):
            if whole:
                yield _opened(path, number, line, keys)


class _Check:
    def __init__(self, keys: Keys, first: int) -> None:
        self.found = Found()
        self._keys = keys
        self._next = first
        self._first = first
        self._macs: dict[int, str] = {}  # of the lines that the head or a witness may name
        self._torn: tuple[Path, int, int] | None = None

    def segment(self, path: Path) -> None:
        """The next segment."""
        number = files.number_of(path)
        if number is not None and number != self._next:
            raise Tampered(path, 0, f"segment {self._next} is missing")
        count = 0
        for count, (line, whole) in enumerate(files.lines_of(path), 1):
            if not whole:
                self._torn = (path, count, len(line))
                break
            entry = _opened(path, count, line, self._keys)
            if count == 1:
                self._begins(path, entry)
            self._follows(path, count, entry)
        if not count:
            raise Tampered(path, 0, "is empty")
        if self._torn and self._torn[:2] == (path, 1):
            raise Tampered(path, 1, "was cut: its first line is not whole")
        self._next += 1
        self.found.segments += 1

    def _begins(self, path: Path, entry: dict[str, Any]) -> None:
        """A segment's first line, held against the segment before."""
        found = self.found
        if entry["kind"] != "segment":
            raise Tampered(path, 1, "is not a segment's first line: what was before it is missing")
        if entry["segment"] != self._next:
            raise Tampered(path, 1, f"is segment {entry['segment']}, not {self._next}: renamed")
        if not found.lines and not found.segments:
            found.log = entry["log"]
            if self._first == 1 and (entry["n"], entry["prev"]) != (0, NOTHING):
                raise Tampered(path, 1, f"{entry['n']} lines before it are missing")
            found.lines, found.last = entry["n"], entry["prev"]
            return
        if entry["log"] != found.log:
            raise Tampered(path, 1, "belongs to another log")
        if lost := entry["after"]["lost_lines"]:
            raise Tampered(path, 1, f"its server missed {lost} lines that had been before it")
        if entry["after"]["ended"] != found.ended:
            raise Tampered(path, 1, "the segment before it does not end as it did")
        torn = self._torn[2] if self._torn else 0
        if entry["after"]["torn_bytes"] != torn:
            raise Tampered(path, 1, "the segment before it was cut, or went on")
        if not found.ended:
            found.notes.append(f"the server was killed before {path.name} began")
        self._torn = None

    def _follows(self, path: Path, count: int, entry: dict[str, Any]) -> None:
        found = self.found
        if found.ended and count > 1:
            raise Tampered(path, count, "stands behind the segment's end")
        if entry["n"] > found.lines:
            raise Tampered(path, count, f"{entry['n'] - found.lines} lines before it are missing")
        if entry["n"] < found.lines:
            raise Tampered(path, count, f"is line {entry['n']} once more, or out of its place")
        if entry["prev"] != found.last:
            raise Tampered(path, count, "does not follow the line before it")
        found.lines, found.last = entry["n"] + 1, entry["mac"]
        found.ended = entry["kind"] == "end"
        found.kinds[entry["kind"]] = found.kinds.get(entry["kind"], 0) + 1
        found.missed += entry.get("missed", 0)
        self._macs[found.lines] = found.last

    def finish(self) -> None:
        """The end of the last segment."""
        found = self.found
        if self._torn:
            path, _, torn = self._torn
            found.notes.append(f"{path.name} ends with {torn} bytes of a line that is not whole")
        if not found.ended:
            found.notes.append("the log has no last line: its server runs, or was killed")
        if found.missed:
            found.notes.append(f"{found.missed} lines could not be written when they should have")

    def head(self, path: Path) -> None:
        """The head must not have reached further than the lines do."""
        try:
            line = path.read_bytes().removesuffix(b"\n")
        except FileNotFoundError:
            raise Tampered(path, 0, "is missing: lines may have been cut from the end") from None
        head = _opened(path, 1, line, self._keys)
        if head.get("log") != self.found.log:
            raise Tampered(path, 0, "belongs to another log")
        self.reaches((head["lines"], head["last"]), path)

    def reaches(self, witness: tuple[int, str], path: Path) -> None:
        """The log must hold that line."""
        lines, mac = witness
        if lines > self.found.lines:
            raise Tampered(path, 0, f"{lines - self.found.lines} lines were cut from the end")
        if self._macs.get(lines, mac) != mac:
            raise Tampered(path, 0, f"line {lines - 1} was another one")


def _opened(path: Path, number: int, line: bytes, keys: Keys) -> dict[str, Any]:
    try:
        return opened(line, keys.chain)
    except Broken as broken:
        raise Tampered(path, number, str(broken)) from None
