"""A network for the fetcher's tests: names lead where a test says, connections are noted."""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

PUBLIC = "93.184.216.34"
HOST = "images.example"


class Network:
    """Resolves, records, and connects whatever address is asked to one server of this machine."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.addresses: dict[str, Sequence[str]] = {HOST: (PUBLIC,)}
        self.asked: list[str] = []  # names, in order
        self.connected: list[tuple[str, int]] = []
        self.requests: list[bytes] = []
        self.ours: set[int | None] = set()  # ports of this machine that lead where they say
        self._port = 0
        self._connect = socket.socket.connect
        network = self

        def connect(self: socket.socket, address: Any) -> None:
            network.connect(self, address)

        patch.setattr(socket.socket, "connect", connect)

    async def resolve(self, host: str, port: int) -> Sequence[str]:
        """What a fetcher asks."""
        self.asked.append(host)
        if host not in self.addresses:
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return self.addresses[host]

    def connect(self, own: socket.socket, address: Any) -> None:
        """Note the address; lead there or nowhere."""
        if own.family == socket.AF_UNIX or address[1] in self.ours:
            return self._connect(own, address)
        self.connected.append(address[:2])
        return self._connect(own, ("127.0.0.1", self._port))

    @asynccontextmanager
    async def serving(
        self,
        *answer: bytes,
        then: Callable[[], Any] | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> AsyncIterator[None]:
        """A server that answers every request with these bytes, and may wait before it ends."""

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                self.requests.append(await reader.readuntil(b"\r\n\r\n"))
                for piece in answer:
                    writer.write(piece)
                    await writer.drain()
                if then is not None:
                    await then()
            except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError):
                pass  # no HTTP, or gone
            finally:
                writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
        self._port = server.sockets[0].getsockname()[1]
        try:
            yield
        finally:
            server.close()


def http(
    body: bytes = b"", status: str = "200 OK", length: int | None = None, **fields: str
) -> bytes:
    """A whole answer."""
    size = len(body) if length is None else length
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {size}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in fields.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def certificate(folder: Path, host: str) -> Path:
    """A self-signed certificate and its key, in one file."""
    file = folder / f"{host}.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-days", "2", "-subj", f"/CN={host}"]
    command += ["-addext", f"subjectAltName=DNS:{host}", "-keyout", "-", "-out", "-"]
    try:
        file.write_bytes(subprocess.run(command, check=True, capture_output=True).stdout)
    except FileNotFoundError:
        pytest.skip("needs openssl to make a certificate")
    return file
