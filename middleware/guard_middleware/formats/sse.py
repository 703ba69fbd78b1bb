"""Server-sent events cut from bytes that may be split anywhere, without losing or gaining one."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from guard_middleware.formats.contract import Event, Unreadable

MAX_EVENT_BYTES = 4 * 2**20
KEEP_ALIVE = b":\n\n"

_ENDS = (b"\n", b"\r\n", b"\r")
_NAME = re.compile(r"[\w.:-]{1,64}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Frame:
    """One event. `data` is None for comments and the like; `raw` is what may be sent on for it."""

    raw: bytes
    name: str
    data: bytes | None


class Framer:
    """Cuts a stream into frames.

    An event that has only `data` lines and a plain `event` line is sent on byte for byte. All else
    that a line can hold (comments, ids, unknown fields) is text that nobody judges: it is dropped.
    """

    def __init__(self, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self._most = max_event_bytes
        self._buffer = bytearray()  # the beginning of a line
        self._lines: list[bytes] = []
        self._size = 0

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The frames that are complete with this data. Raises Unreadable for one too large."""
        ends = b"\n" in data or b"\r" in data or self._buffer.endswith(b"\r")
        self._buffer += data
        if ends:
            lines = bytes(self._buffer).splitlines(keepends=True)
            self._buffer.clear()
            if not lines[-1].endswith(b"\n"):  # also behind \r, which may be half of a \r\n
                self._buffer += lines.pop()
            for line in lines:
                if frame := self._line(line):
                    yield frame
        self._check(len(self._buffer))

    def finish(self) -> Iterator[Frame]:
        """What the stream's end completes: servers forget the last empty line."""
        rest = bytes(self._buffer).rstrip(b"\r")
        self._buffer.clear()
        if rest:
            self._line(rest + b"\n")
        if self._lines and (frame := self._line(b"\n")):
            yield frame

    def _line(self, line: bytes) -> Frame | None:
        """Take a line with its end; the frame that it completes."""
        self._size += len(line)
        self._check(0)
        if line not in _ENDS:
            self._lines.append(line)
            return None
        lines, self._lines, self._size = self._lines, [], 0
        return _frame(lines, line) if lines else None

    def _check(self, pending: int) -> None:
        if self._size + pending > self._most:
            raise Unreadable(f"an event of the stream is over {self._most} bytes")


class SseStream(ABC):
    """A ReplyStream of server-sent events, less what depends on the protocol."""

    def __init__(self) -> None:
        self._framer = Framer()

    @abstractmethod
    def read(self, frame: Frame) -> Event:
        """The event of a frame. Raises Unreadable, Malformed."""

    def feed(self, data: bytes) -> Sequence[Event]:
        """The events that are complete now."""
        return [self.read(frame) for frame in self._framer.feed(data)]

    def finish(self) -> Sequence[Event]:
        """What was left."""
        return [self.read(frame) for frame in self._framer.finish()]

    def keep_alive(self) -> bytes:
        """A comment."""
        return KEEP_ALIVE


def event(data: bytes, name: str = "") -> bytes:
    """An event of ours."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + data + b"\n\n"


def _frame(lines: list[bytes], last_end: bytes) -> Frame:
    name, data = "", []
    kept: list[bytes] = []
    for line in lines:
        field, _, value = line.rstrip(b"\r\n").partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            data.append(value)
        elif field == b"event":
            name = _plain_name(value)
        else:
            continue
        kept.append(line)
    raw = b"".join(kept) + last_end if kept else KEEP_ALIVE
    return Frame(raw, name, b"\n".join(data) if data else None)


def _plain_name(value: bytes) -> str:
    name = value.decode("ascii", "replace")
    if not _NAME.fullmatch(name):
        raise Unreadable("an event of the stream has a name that is none")
    return name
