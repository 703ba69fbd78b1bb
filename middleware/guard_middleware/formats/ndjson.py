"""Lines of JSON cut from bytes that may be split anywhere."""

from __future__ import annotations

from collections.abc import Iterator

from guard_middleware.formats.contract import Unreadable

MAX_LINE_BYTES = 4 * 2**20


class Lines:
    """Cuts a stream behind each newline."""

    def __init__(self, max_line_bytes: int = MAX_LINE_BYTES) -> None:
        self._most = max_line_bytes
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The lines that are complete with this data, newlines kept. Raises Unreadable for one too
        large."""
        searched, start = len(self._buffer), 0
        self._buffer += data
        while end := self._buffer.find(b"\n", max(start, searched)) + 1:
            self._check(end - start)
            yield bytes(self._buffer[start:end])
            start = end
        del self._buffer[:start]
        self._check(len(self._buffer))

    def finish(self) -> Iterator[bytes]:
        """What the stream's end completes: it gets the newline that it lacks, for more of ours may
        follow."""
        rest = bytes(self._buffer)
        self._buffer.clear()
        if rest.strip():
            yield rest + b"\n"

    def _check(self, size: int) -> None:
        if size > self._most:
            raise Unreadable(f"a line of the stream is over {self._most} bytes")
