"""A bare HTTP/1.1 client for measuring: one connection, one request at a time, no library."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

_LAST_CHUNK = b"\r\n0\r\n\r\n"
_READ_BYTES = 2**16


@dataclass(frozen=True, slots=True)
class Got:
    """A reply; times from the request's first byte, in seconds."""

    status: int
    body: bytes
    first_s: float  # to the first byte of the body
    whole_s: float


class Connection:
    """A connection that is kept."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, port: int) -> Connection:
        """To a server of this machine."""
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    def close(self) -> None:
        """At once."""
        self._writer.close()

    async def ask(self, target: str, body: bytes | None = None) -> Got:
        """POST the JSON, or GET. Raises OSError or EOFError where the connection breaks off."""
        began = time.perf_counter()
        await self.send(target, body)
        return await self.receive(began)

    async def send(self, target: str, body: bytes | None = None) -> None:
        """The request alone."""
        method = "GET" if body is None else "POST"
        head = f"{method} {target} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
        length = len(body or b"")
        self._writer.write(f"{head}Content-Length: {length}\r\n\r\n".encode() + (body or b""))
        await self._writer.drain()

    async def receive(self, began: float, on_first: Callable[[], object] = lambda: None) -> Got:
        """The reply alone; `on_first` is called when its body begins."""
        head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        status = int(head.split(b" ", 2)[1])
        if b"transfer-encoding: chunked" not in head:
            length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
            body = await self._reader.readexactly(length)
            took = time.perf_counter() - began
            return Got(status, body, took, took)
        raw = bytearray()
        first_s = 0.0
        while not raw.endswith(_LAST_CHUNK):
            data = await self._reader.read(_READ_BYTES)
            if not data:
                raise EOFError("the reply broke off")
            if not raw:
                first_s = time.perf_counter() - began
                on_first()
            raw += data
        whole_s = time.perf_counter() - began
        return Got(status, _joined(bytes(raw)), first_s, whole_s)


def _joined(raw: bytes) -> bytes:
    parts: list[bytes] = []
    at = 0
    while True:
        end = raw.index(b"\r\n", at)
        size = int(raw[at:end], 16)
        if not size:
            return b"".join(parts)
        parts.append(raw[end + 2 : end + 2 + size])
        at = end + 2 + size + 2
