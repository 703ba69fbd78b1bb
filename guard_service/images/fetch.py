"""The one place from which images are fetched: checked, pinned, bounded, and from nowhere else."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from guard_policies.schema import ImageUris
from guard_service.images.addresses import is_public
from guard_service.images.reasons import Reason, Refused
from guard_service.images.uris import Target, allowed

# The addresses of a host and port; raises OSError.
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]

RESOLVERS = 4  # threads; the system's resolver cannot be told to stop
CHUNK = 64 * 1024
HEADERS = {"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "llama-guard-service"}


class Fetcher:
    """Fetches images whose addresses a policy allows. For one event loop.

    A host is resolved once, all its addresses must be public, and one of them is connected to. No
    redirect is followed. No cookie, credential, proxy or connection is kept or taken from anywhere.
    """

    def __init__(self, timeout_s: float, resolve: Resolve | None = None) -> None:
        self._timeout_s = timeout_s
        self._resolve = resolve or self._by_system
        self._threads = ThreadPoolExecutor(RESOLVERS, thread_name_prefix="guard-dns")

    async def fetch(self, uri: str, uris: ImageUris, most_bytes: int) -> bytes:
        """The bytes behind an address; raises Refused."""
        target = allowed(uri, uris)
        try:
            async with asyncio.timeout(self._timeout_s):
                pinned = await self._pinned(target)
                return await _fetched(target, pinned, most_bytes)
        except TimeoutError:
            raise Refused(Reason.URI_TOO_SLOW) from None
        except (aiohttp.ClientError, OSError, ValueError):
            raise Refused(Reason.URI_UNREACHABLE) from None

    def close(self) -> None:
        """Resolve no more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _pinned(self, target: Target) -> _Pinned:
        try:
            addresses = await self._resolve(target.host, target.port)
        except (OSError, UnicodeError):
            raise Refused(Reason.URI_UNRESOLVED) from None
        if not addresses:
            raise Refused(Reason.URI_UNRESOLVED)
        if not all(map(is_public, addresses)):
            raise Refused(Reason.URI_ADDRESS)
        return _Pinned(target.host, addresses)

    async def _by_system(self, host: str, port: int) -> Sequence[str]:
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(
            self._threads, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        )
        return tuple(dict.fromkeys(str(address[0]) for *_, address in found))


class _Pinned(AbstractResolver):
    """Knows the addresses of one host."""

    def __init__(self, host: str, addresses: Sequence[str]) -> None:
        self._host = host
        self._addresses = addresses

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """The addresses that were checked."""
        if host != self._host:
            raise OSError("another host")
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for address in self._addresses
        ]

    async def close(self) -> None:
        """There is nothing to close."""


async def _fetched(target: Target, pinned: _Pinned, most_bytes: int) -> bytes:
    connector = aiohttp.TCPConnector(resolver=pinned, use_dns_cache=False, force_close=True)
    async with (
        aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            headers=HEADERS,
        ) as session,
        session.get(URL(target.url, encoded=True), allow_redirects=False) as response,
    ):
        return await _body(response, most_bytes)


async def _body(response: aiohttp.ClientResponse, most_bytes: int) -> bytes:
    if 300 <= response.status < 400:
        raise Refused(Reason.URI_REDIRECT)
    if response.status != 200:
        raise Refused(Reason.URI_STATUS)
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise Refused(Reason.URI_ENCODED)
    if (response.content_length or 0) > most_bytes:
        raise Refused(Reason.TOO_LARGE)
    data = bytearray()
    async for chunk in response.content.iter_chunked(CHUNK):
        data += chunk
        if len(data) > most_bytes:
            raise Refused(Reason.TOO_LARGE)
    return bytes(data)
