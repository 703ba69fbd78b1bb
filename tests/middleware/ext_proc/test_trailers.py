"""Trailers through a real Envoy: no guard reads them, so they do not go on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.middleware.asgi_calls import Backend
from tests.middleware.ext_proc.real_envoy import (
    BUFFERED,
    DUPLEX,
    STREAMED,
    Setup,
    Stage,
    modes,
    needs_envoy,
    stage,
)
from tests.middleware.formats.openai_replies import PATH, asking, reply
from tests.middleware.test_bypasses import closed
from tests.middleware.wrapped import BAD

pytestmark = needs_envoy
WHOLE = json.dumps(reply("Hello there.")).encode()
TRAILER = f"x-said: {BAD}\r\n\r\n".encode()


class Upstream:
    """A backend that keeps the bytes it is sent, and whose replies end in a trailer."""

    def __init__(self, body: bytes) -> None:
        self.sent = bytearray()
        self._body = body

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while b"}]}" not in self.sent and (data := await reader.read(65536)):
            self.sent += data
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntrailer: x-said\r\n"
        writer.write(head + b"transfer-encoding: chunked\r\n\r\n" + chunked(self._body) + TRAILER)
        await writer.drain()
        await closed(writer)


def chunked(body: bytes) -> bytes:
    return b"%x\r\n%s\r\n0\r\n" % (len(body), body)


@asynccontextmanager
async def before(upstream: Upstream, mode: str, folder: Path) -> AsyncIterator[Stage]:
    """A stage with this backend."""
    server = await asyncio.start_server(upstream.talk, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    setup = Setup(modes(mode), backend=f"http://{host}:{port}")
    async with server, stage(setup, folder, Backend([])) as running:
        yield running


async def talk(running: Stage, body: object, trailer: bytes = b"\r\n") -> bytes:
    """What comes back to a chunked request, until the connection is closed."""
    reader, writer = await asyncio.open_unix_connection(str(running.folder / "clients"))
    head = f"POST {PATH} HTTP/1.1\r\nhost: envoy\r\nconnection: close\r\ntrailer: x-said\r\n"
    head += "te: trailers\r\ntransfer-encoding: chunked\r\n\r\n"
    writer.write(head.encode() + chunked(json.dumps(body).encode()) + trailer)
    await writer.drain()
    async with asyncio.timeout(60):
        got = await reader.read()
    await closed(writer)
    return got


@pytest.mark.parametrize("mode", [DUPLEX, BUFFERED])
async def test_trailers_are_left_out_on_both_ways(mode: str, tmp_path: Path) -> None:
    upstream = Upstream(WHOLE)
    async with before(upstream, mode, tmp_path) as running:
        got = await talk(running, asking("Hi"), TRAILER)
        assert await running.counted(passed=1)
    assert b"Hello there." in got and b" 200 OK" in got
    for seen in (got, bytes(upstream.sent)):
        assert b"x-said:" not in seen and BAD.encode() not in seen


@pytest.mark.parametrize("mode", [DUPLEX, BUFFERED])
async def test_what_ends_in_trailers_is_judged(mode: str, tmp_path: Path) -> None:
    upstream = Upstream(json.dumps(reply(BAD)).encode())
    async with before(upstream, mode, tmp_path) as running:
        prompt = await talk(running, asking(BAD), TRAILER)
        assert not upstream.sent
        got = await talk(running, asking("Hi"))
        assert await running.counted(blocked_prompt=1, blocked_response=1)
    assert b"content_filter" in prompt and b"content_filter" in got
    assert BAD.encode() not in got


async def test_streamed_mode_refuses_what_ends_in_trailers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """There is no chunk left to put into what was held back."""
    upstream = Upstream(WHOLE)
    async with before(upstream, STREAMED, tmp_path) as running:
        asked = await talk(running, asking("Hi"), TRAILER)
        assert b"Hi" not in upstream.sent
        got = await talk(running, asking("Hi"))
    assert b"Hello" not in asked + got
    assert "set FULL_DUPLEX_STREAMED" in caplog.text
