"""The output of a bulk run: a file that can be interrupted anywhere and gone on with."""

from __future__ import annotations

import fcntl
import gzip
import io
import itertools
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from guard_service.cli.bulk_lines import Record

_CHUNK = 2**16
_GZIP = 31  # zlib: a gzip header and trailer around the data
_LINE_START = b'{"id":'


class NotResumable(Exception):
    """OUT is not the beginning of this run's output."""


@dataclass(slots=True)
class Done:
    """What OUT holds already: how many lines, how many of them with an error, who judged them."""

    lines: int = 0
    errors: int = 0
    stamp: dict[str, str] | None = None


class Output:
    """Appends lines to a file or a stream; `flush` makes them survive the death of the process.

    A packed file is a row of gzip members, one from flush to flush: what dies with the process is
    the last member, and cutting it off leaves a whole file.
    """

    def __init__(self, file: IO[bytes], packed: bool) -> None:
        self._file = file
        self._packed = packed
        self._member: gzip.GzipFile | None = None

    @property
    def flushes_cheaply(self) -> bool:
        """Whether flushing after every line costs no space."""
        return not self._packed

    def write(self, line: bytes) -> None:
        """Add a whole line."""
        if not self._packed:
            self._file.write(line)
            return
        if self._member is None:
            self._member = gzip.GzipFile(fileobj=self._file, mode="wb", mtime=0)
        self._member.write(line)

    def flush(self) -> None:
        """Hand everything written so far to the operating system."""
        if self._member is not None:
            self._member.close()
            self._member = None
        self._file.flush()


def is_packed(path: Path) -> bool:
    """Whether a file is gzip-compressed, by its name."""
    return path.suffix == ".gz"


@contextmanager
def open_input(path: Path) -> Iterator[tuple[BinaryIO, Callable[[], int], int]]:
    """The stream, how many bytes of the file have been read, and its size (0: unknown)."""
    if str(path) == "-":
        # A buffer of our own, never closed: closing would wait for the thread that reads from it.
        yield io.BufferedReader(io.FileIO(0, closefd=False)), lambda: 0, 0
        return
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if is_packed(path):
            with gzip.GzipFile(fileobj=file, mode="rb") as unpacked:
                yield cast(BinaryIO, unpacked), file.tell, size
        else:
            yield file, file.tell, size


@contextmanager
def open_output(
    path: Path, records: Iterator[Record], restart: bool
) -> Iterator[tuple[Output, Done]]:
    """The output, behind what it holds already; `records` is advanced past that.

    A last line that was torn is removed. Raises NotResumable, and leaves the file as it is, when
    the lines are not those of `records` or another run is writing.
    """
    if str(path) == "-":
        stream = Output(sys.stdout.buffer, packed=False)
        yield stream, Done()
        stream.flush()
        return
    with path.open("r+b" if path.exists() else "x+b") as file:
        _lock(file)
        if restart:
            file.truncate(0)
        done = _repaired(file, is_packed(path), records)
        file.seek(0, os.SEEK_END)
        output = Output(file, is_packed(path))
        try:
            yield output, done
        finally:
            output.flush()


def _lock(file: IO[bytes]) -> None:
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise NotResumable("another run is writing to it") from None


def _repaired(file: BinaryIO, packed: bool, records: Iterator[Record]) -> Done:
    """Check the lines in the file against the records; cut off what is torn at the end."""
    end, count = _whole_members(file) if packed else _whole_lines(file)
    if not _is_torn_line(_tail(file, end, packed)):
        raise NotResumable("it is not the output of a bulk run")
    done = Done()
    file.seek(0)
    with gzip.GzipFile(fileobj=file, mode="rb") if packed else nullcontext(file) as lines:
        for raw in itertools.islice(lines, count):
            _check(raw, next(records, None), done)
    file.truncate(end)
    return done


def _whole_lines(file: BinaryIO) -> tuple[int, int]:
    """Where the last whole line of a file ends, and how many lines there are until then."""
    end = count = position = 0
    while chunk := file.read(_CHUNK):
        if (last := chunk.rfind(b"\n")) >= 0:
            end = position + last + 1
        count += chunk.count(b"\n")
        position += len(chunk)
    return end, count


def _whole_members(file: BinaryIO) -> tuple[int, int]:
    """Where the last whole gzip member of a file ends, and how many lines there are until then."""
    end = count = lines = 0
    inflate, data, last = zlib.decompressobj(_GZIP), b"", b"\n"
    try:
        while data or (data := file.read(_CHUNK)):
            content = inflate.decompress(data, _CHUNK)
            lines += content.count(b"\n")
            last = content[-1:] or last
            data = inflate.unconsumed_tail
            if inflate.eof:
                if last != b"\n":
                    raise NotResumable("it is not the output of a bulk run")
                data = inflate.unused_data
                end, count = file.tell() - len(data), lines
                inflate = zlib.decompressobj(_GZIP)
    except zlib.error:
        pass
    return end, count


def _tail(file: BinaryIO, end: int, packed: bool) -> bytes:
    """The beginning of what follows the last whole line or member."""
    file.seek(end)
    tail = file.read(_CHUNK)
    if not packed or not tail.strip(b"\0"):
        return tail
    try:
        return zlib.decompressobj(_GZIP).decompress(tail, _CHUNK)
    except zlib.error:
        return b"" if end else tail  # behind whole members of ours it is ours; else, who knows


def _is_torn_line(tail: bytes) -> bool:
    """Whether this can be what an interrupted run left: nothing may be cut off that is not ours."""
    tail = tail.strip(b"\0")[: len(_LINE_START)]
    return _LINE_START.startswith(tail)


def _parsed(raw: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and "id" in found else None


def _check(raw: bytes, record: Record | None, done: Done) -> None:
    found = _parsed(raw)
    done.lines += 1
    if found is None:
        raise NotResumable(f"its line {done.lines} is not of a bulk run")
    if record is None:
        raise NotResumable(f"it has more lines than the input ({done.lines} and more)")
    if found["id"] != record.id or found.get("line", record.line) != record.line:
        raise NotResumable(f"its line {done.lines} belongs to another input (the ids differ)")
    done.errors += found.get("error") is not None
    keys = ("policy", "policy_digest", "model", "model_digest")
    if all(isinstance(found.get(key), str) for key in keys):
        done.stamp = {key: found[key] for key in keys}
