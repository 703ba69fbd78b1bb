"""A forwarding ASGI application: what the sidecar wraps."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import AsyncIterator, Iterable
from urllib.parse import urlsplit

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from guard_middleware.bodies import has_body, header
from guard_middleware.formats.contract import Answer
from guard_middleware.messages import Header, Message, Receive, Scope, Send, answer
from guard_middleware.strict_json import dump

# RFC 9110, 7.6.1: these are between two neighbours, and so is what `Connection` names.
HOP_BY_HOP = frozenset(
    {
        *(b"connection", b"proxy-connection", b"keep-alive", b"te", b"trailer", b"upgrade"),
        *(b"transfer-encoding", b"proxy-authenticate", b"proxy-authorization"),
    }
)
_NOT_SENT = frozenset({b"host", b"content-length", b"expect", b"forwarded", b"x-real-ip"})
CHUNK_BYTES = 64 * 1024


class UpstreamFailed(ConnectionError):
    """The backend broke off while it answered."""


class Proxy:
    """Forwards every request to one backend. Redirects, cookies and packed bodies are left alone.

    `upstream` is http://host:port, with a path in front of all paths if it has one, or
    unix:/path/of/socket. The pool is made on first use, in the loop that uses it.
    """

    def __init__(
        self, upstream: str, connect_timeout_s: float = 5.0, read_timeout_s: float = 600.0
    ) -> None:
        """Raises ValueError for an upstream that is none."""
        self._socket = upstream.removeprefix("unix:") if upstream.startswith("unix:") else None
        base = urlsplit("http://localhost" if self._socket else upstream)
        if base.scheme not in ("http", "https") or not base.netloc or base.query or base.username:
            raise ValueError("upstream: must be http://host:port, https://..., or unix:/path")
        self._base = f"{base.scheme}://{base.netloc}{base.path.rstrip('/')}"
        self._timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=connect_timeout_s, sock_read=read_timeout_s
        )
        self._made: aiohttp.ClientSession | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI, for http only."""
        if wrong := _wrong(scope):
            await _error(send, 400, wrong)
            return
        request = {
            "method": scope["method"],
            "url": URL(self._base + _target(scope), encoded=True),
            "headers": _request_headers(scope),
            "data": _body(scope["headers"], receive),
        }
        try:
            reply = await self._session().request(**request, allow_redirects=False)
        except (aiohttp.ClientError, TimeoutError, OSError):
            await _error(send, 502, "The backend cannot be reached.")
            return
        async with reply:
            await _forward(reply, send)

    async def reachable(self) -> bool:
        """Whether the backend accepts connections and answers, whatever it answers."""
        try:
            async with asyncio.timeout(2.0):
                reply = await self._session().get(URL(f"{self._base}/health", encoded=True))
                reply.close()
                return reply.status < 500
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False

    async def close(self) -> None:
        """Close the pool."""
        if self._made is not None:
            await self._made.close()
            self._made = None

    def _session(self) -> aiohttp.ClientSession:
        if self._made is None:
            connector = (
                aiohttp.UnixConnector(path=self._socket, limit=0)
                if self._socket
                else aiohttp.TCPConnector(limit=0, keepalive_timeout=15.0)
            )
            self._made = aiohttp.ClientSession(
                connector=connector,
                timeout=self._timeout,
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
                skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
                read_bufsize=CHUNK_BYTES,
            )
        return self._made


async def _forward(reply: aiohttp.ClientResponse, send: Send) -> None:
    start = {
        "type": "http.response.start",
        "status": reply.status,
        "headers": _end_to_end(reply.raw_headers),
    }
    await send(start)
    try:
        async for data in reply.content.iter_any():
            await send({"type": "http.response.body", "body": data, "more_body": True})
    except (aiohttp.ClientError, TimeoutError, OSError) as broken:
        raise UpstreamFailed("the backend broke off while it answered") from broken
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _error(send: Send, status: int, message: str) -> None:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    body = dump({"error": {"message": message, "type": kind}})
    await answer(send, Answer(status, "application/json", body))


def _wrong(scope: Scope) -> str:
    """What a proxy must not hand on: another host's address, two lengths for one body."""
    if not _raw_path(scope).startswith(b"/"):
        return "The request's target is not a path."
    framings = (b"content-length", b"transfer-encoding")
    if all(header(scope["headers"], name) for name in framings):
        return "The request has both a length and a transfer coding."
    return ""


def _raw_path(scope: Scope) -> bytes:
    raw: bytes = scope.get("raw_path") or scope["path"].encode()
    return raw.partition(b"?")[0]


def _target(scope: Scope) -> str:
    query: bytes = scope.get("query_string", b"")
    path = _raw_path(scope).decode("latin-1")
    return f"{path}?{query.decode('latin-1')}" if query else path


def _request_headers(scope: Scope) -> CIMultiDict[str]:
    headers: CIMultiDict[str] = CIMultiDict()
    for key, value in _end_to_end(scope["headers"]):
        if key.lower() not in _NOT_SENT and not key.lower().startswith(b"x-forwarded-"):
            headers.add(key.decode("latin-1"), value.decode("latin-1"))
    length = header(scope["headers"], b"content-length")
    if length:
        headers["Content-Length"] = length
    if scope.get("client"):
        headers["X-Forwarded-For"] = _known_address(scope["client"][0])
    headers["X-Forwarded-Proto"] = str(scope.get("scheme", "http"))
    if host := header(scope["headers"], b"host"):
        headers["X-Forwarded-Host"] = host
    return headers


def _known_address(address: str) -> str:
    try:
        return str(ipaddress.ip_address(address))
    except ValueError:
        return "unknown"


def _end_to_end(headers: Iterable[Header]) -> list[Header]:
    headers = list(headers)
    named = header(headers, b"connection").lower().encode("latin-1").split(b",")
    dropped = HOP_BY_HOP | {name.strip() for name in named}
    return [(key.lower(), value) for key, value in headers if key.lower() not in dropped]


def _body(headers: Iterable[Header], receive: Receive) -> AsyncIterator[bytes] | None:
    return _chunks(receive) if has_body(headers) else None


async def _chunks(receive: Receive) -> AsyncIterator[bytes]:
    while True:
        message: Message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionAbortedError("the client left before its request was complete")
        yield message.get("body", b"")
        if not message.get("more_body", False):
            return
