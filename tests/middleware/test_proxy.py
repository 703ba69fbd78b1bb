"""The sidecar's proxy on the wire: what reaches the backend, what comes back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from guard_middleware import GuardMiddleware
from guard_middleware.metrics import Metrics
from guard_middleware.proxy import Proxy
from guard_middleware.testing import FakeGuard, forbids
from tests.middleware.asgi_calls import listening
from tests.middleware.formats.openai_replies import PATH, asking, reply
from tests.middleware.wrapped import BAD

OK = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"


class Upstream:
    """A backend that keeps the bytes it is sent and answers with bytes."""

    def __init__(self, answer: bytes, closes: bool = True) -> None:
        self.requests: list[bytes] = []
        self._answer = answer
        self._closes = closes

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            body = b""
            if b"content-length: " in head.lower():
                size = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
                body = await reader.readexactly(int(size))
            elif b"chunked" in head.lower():
                body = await reader.readuntil(b"0\r\n\r\n")
            self.requests.append(head + body)
            writer.write(self._answer)
            await writer.drain()
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()


@asynccontextmanager
async def sidecar(upstream: Upstream, socket: Path | None = None) -> AsyncIterator[str]:
    """The address of a proxy inside a middleware that guards every path."""
    if socket is None:
        server = await asyncio.start_server(upstream.talk, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        proxy = Proxy(f"http://{host}:{port}/base")
    else:
        server = await asyncio.start_unix_server(upstream.talk, str(socket))
        proxy = Proxy(f"unix:{socket}")

    async def app(scope: object, receive: object, send: object) -> None:
        if scope["type"] == "http":  # type: ignore[index]
            await proxy(scope, receive, send)  # type: ignore[arg-type]

    guarded = GuardMiddleware(
        app,
        FakeGuard(forbids(BAD)),
        metrics=Metrics(CollectorRegistry()),
        guarded=("/",),
        passes=("/upload",),
    )
    async with server, listening(guarded, lifespan="off") as address:
        yield address
        await proxy.close()


async def raw(address: str, request: bytes) -> bytes:
    """What a server answers to these bytes until it closes."""
    host, _, port = address.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(request)
    await writer.drain()
    async with asyncio.timeout(60):
        answer = await reader.read()
    writer.close()
    return answer


def post(path: str, body: bytes, *headers: str) -> bytes:
    lines = (f"POST {path} HTTP/1.1", "Host: client.test", "Connection: close", *headers)
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def plain(body: bytes) -> bytes:
    return OK + f"content-length: {len(body)}\r\n\r\n".encode() + body


CHAT = json.dumps(asking("Hi")).encode()
WHOLE = json.dumps(reply("Hello.")).encode()


async def test_request_arrives_with_its_end_to_end_headers_and_ours() -> None:
    upstream = Upstream(plain(WHOLE))
    headers = (
        *(f"Content-Length: {len(CHAT)}", "Authorization: Bearer x", "X-Own: 1", "X-Hop: 1"),
        *("Connection: close, X-Hop", "Keep-Alive: 5", "TE: trailers", "Upgrade: h2c"),
        *("X-Forwarded-For: 6.6.6.6", "Forwarded: for=6.6.6.6", "X-Real-IP: 6.6.6.6"),
        *("Proxy-Authorization: x", "Cookie: a=b", "Expect: 100-continue"),
    )
    async with sidecar(upstream) as address:
        got = await raw(address, post(f"{PATH}?a=%2Fb", CHAT, *headers))
    assert got.endswith(WHOLE)
    head, _, body = upstream.requests[0].partition(b"\r\n\r\n")
    lines = head.decode().lower().split("\r\n")
    assert lines[0] == f"post /base{PATH}?a=%2fb http/1.1" and json.loads(body) == asking("Hi")
    assert {"authorization: bearer x", "x-own: 1", "cookie: a=b"} <= set(lines)
    assert {"x-forwarded-for: 127.0.0.1", "x-forwarded-host: client.test"} <= set(lines)
    assert "6.6.6.6" not in head.decode()
    names = {line.partition(":")[0] for line in lines}
    gone = {"x-hop", "keep-alive", "te", "upgrade", "proxy-authorization", "expect", "forwarded"}
    assert not gone & names


async def test_reply_comes_back_with_its_end_to_end_headers() -> None:
    hop = b"connection: close, x-hop\r\nx-hop: 1\r\nkeep-alive: 5\r\ntrailer: x\r\n"
    own = b"x-own: 1\r\nset-cookie: a=1\r\nset-cookie: b=2\r\n"
    body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(WHOLE), WHOLE)
    upstream = Upstream(OK + hop + own + b"transfer-encoding: chunked\r\n\r\n" + body)
    async with sidecar(upstream) as address:
        got = await raw(address, post(PATH, CHAT, f"Content-Length: {len(CHAT)}"))
    head = got.partition(b"\r\n\r\n")[0].lower()
    assert got.endswith(WHOLE) and head.count(b"set-cookie") == 2 and b"x-own: 1" in head
    assert b"x-hop" not in head and b"keep-alive" not in head and b"trailer" not in head


async def test_chunked_request_is_read_whole() -> None:
    upstream = Upstream(plain(WHOLE))
    chunked = b"".join(b"%x\r\n%s\r\n" % (1, CHAT[at : at + 1]) for at in range(len(CHAT)))
    async with sidecar(upstream) as address:
        await raw(address, post(PATH, chunked + b"0\r\n\r\n", "Transfer-Encoding: chunked"))
    assert json.loads(upstream.requests[0].partition(b"\r\n\r\n")[2]) == asking("Hi")


async def test_upload_on_a_path_that_passes_is_streamed_on() -> None:
    upstream = Upstream(plain(b"{}"))
    chunked = b"5\r\nhello\r\n3\r\nyou\r\n0\r\n\r\n"
    async with sidecar(upstream) as address:
        await raw(address, post("/upload", chunked, "Transfer-Encoding: chunked"))
    assert b"helloyou" in upstream.requests[0].replace(b"\r\n3\r\n", b"")


@pytest.mark.parametrize(
    "request_",
    [
        post("@evil.test/", b"", "Content-Length: 0"),
        post(f"@evil.test{PATH}", CHAT, f"Content-Length: {len(CHAT)}"),
        post(f"http://evil.test{PATH}", CHAT, f"Content-Length: {len(CHAT)}"),
        post(f":80{PATH}", CHAT, f"Content-Length: {len(CHAT)}"),
        post("/upload", b"0\r\n\r\nPOST", "Content-Length: 9", "Transfer-Encoding: chunked"),
        post("/upload", b"abc", "Content-Length: 3", "Content-Length: 4"),
        post("/upload", b"abc", "Content-Length: +3"),
        post("/upload", b"abc", "Transfer-Encoding: xchunked"),
        post("/upload", b"abc", "Transfer-Encoding : chunked"),
        post("/upload", b"zz\r\nabc\r\n0\r\n\r\n", "Transfer-Encoding: chunked"),
        b"POST /upload HTTP/1.1\r\nHost: a\r\nConnection: close\r\nX: a\r\n b\x00\r\n\r\n",
    ],
    ids=lambda one: one[:60].decode("latin-1").replace("\r\n", " "),
)
async def test_what_two_servers_would_read_differently_goes_nowhere(request_: bytes) -> None:
    upstream = Upstream(plain(b"{}"))
    async with sidecar(upstream) as address:
        got = await raw(address, request_)
    assert got.split(b" ")[1] in (b"400", b"403", b"501") and upstream.requests == []


async def test_request_behind_another_on_one_connection_is_screened_too() -> None:
    upstream = Upstream(plain(WHOLE))
    bad = json.dumps(asking(BAD)).encode()
    first = f"POST {PATH} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(CHAT)}\r\n\r\n".encode()
    second = post(PATH, bad, f"Content-Length: {len(bad)}")
    async with sidecar(upstream) as address:
        got = await raw(address, first + CHAT + second)
    assert got.count(b"HTTP/1.1 200") == 2 and b"content_filter" in got
    assert len(upstream.requests) == 1


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (b"", b"502"),
        (b"nonsense\r\n\r\n", b"502"),
        (OK + b"content-length: 100\r\n\r\n" + WHOLE[:20], b"502"),
        (OK + b"transfer-encoding: chunked\r\n\r\nzz\r\n", b"502"),
    ],
)
async def test_backend_that_breaks_off_is_an_error(answer: bytes, status: bytes) -> None:
    async with sidecar(Upstream(answer)) as address:
        got = await raw(address, post(PATH, CHAT, f"Content-Length: {len(CHAT)}"))
    assert got.split(b" ")[1] == status and b"Hello" not in got


async def test_redirects_are_left_to_the_client() -> None:
    moved = b"HTTP/1.1 302 Found\r\nlocation: http://elsewhere.test/\r\ncontent-length: 0\r\n\r\n"
    upstream = Upstream(moved)
    async with sidecar(upstream) as address:
        got = await raw(address, post(PATH, CHAT, f"Content-Length: {len(CHAT)}"))
    assert got.startswith(b"HTTP/1.1 302") and b"elsewhere.test" in got


async def test_backend_on_a_unix_socket(tmp_path: Path) -> None:
    upstream = Upstream(plain(WHOLE))
    async with sidecar(upstream, tmp_path / "s") as address:
        got = await raw(address, post(PATH, CHAT, f"Content-Length: {len(CHAT)}"))
    assert got.endswith(WHOLE)


@pytest.mark.parametrize("upstream", ["localhost:80", "ftp://a", "http://", "http://u:p@a", "a?b"])
def test_upstream_that_is_none_is_refused(upstream: str) -> None:
    with pytest.raises(ValueError, match="upstream"):
        Proxy(upstream)
