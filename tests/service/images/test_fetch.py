"""What the fetcher asks of the network, and of whom: every name and every connection is noted."""

from __future__ import annotations

import asyncio
import gzip
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from guard_policies.schema import ImageUris
from guard_service.images.fetch import Fetcher
from guard_service.images.reasons import Reason, Refused
from tests.service.images.drawing import drawn
from tests.service.images.hostile_uris import ALLOWED, NOT_PUBLIC, URIS
from tests.service.images.network import HOST, PUBLIC, Network, certificate, http

URI = f"http://{HOST}/a.png?size=1"
PLAIN = ImageUris((HOST, "*.cdn.example"), (80,), ("http",))
MOST = 64 * 1024


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    return Network(monkeypatch)


@pytest.fixture
async def fetcher(network: Network) -> AsyncIterator[Fetcher]:
    made = Fetcher(20.0, network.resolve)
    yield made
    made.close()


async def refused(fetcher: Fetcher, uri: str = URI, uris: ImageUris = PLAIN) -> Reason:
    with pytest.raises(Refused) as raised:
        await fetcher.fetch(uri, uris, MOST)
    return raised.value.reason


async def test_an_image_is_fetched_from_the_address_that_was_checked(
    network: Network, fetcher: Fetcher
) -> None:
    async with network.serving(http(drawn(), Content_Type="text/html", Set_Cookie="a=b")):
        assert [await fetcher.fetch(URI, PLAIN, MOST) for _ in range(2)] == [drawn()] * 2
    assert network.asked == [HOST] * 2
    assert network.connected == [(PUBLIC, 80)] * 2


async def test_a_request_tells_nothing_of_ours(
    network: Network, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://proxy.example:3128")
    monkeypatch.setenv("NETRC", "/dev/null")
    async with network.serving(http(drawn(), Set_Cookie="a=b")):
        await fetcher.fetch(URI, PLAIN, MOST)
        await fetcher.fetch(URI, PLAIN, MOST)
    line, *fields = network.requests[1].decode().strip().split("\r\n")
    assert line == "GET /a.png?size=1 HTTP/1.1"
    assert {field.partition(":")[0] for field in fields} == {
        *("Host", "Accept", "Accept-Encoding", "User-Agent", "Connection")
    }
    assert f"Host: {HOST}" in fields and "Accept-Encoding: identity" in fields


async def test_for_an_address_that_is_refused_nothing_is_asked(
    network: Network, fetcher: Fetcher
) -> None:
    for one in URIS:
        assert await refused(fetcher, one.uri, ALLOWED) is one.reason
    assert await refused(fetcher, "https://images.example/", ImageUris()) is Reason.URI_NOT_ALLOWED
    assert not network.asked and not network.connected


async def test_a_name_that_leads_inside_is_not_connected_to(
    network: Network, fetcher: Fetcher
) -> None:
    for address in NOT_PUBLIC:
        for addresses in ((address,), (PUBLIC, address), (address, PUBLIC)):
            network.addresses[HOST] = addresses
            assert await refused(fetcher) is Reason.URI_ADDRESS, addresses
    assert network.asked and not network.connected


async def test_a_name_that_changes_its_mind_is_resolved_once(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([(PUBLIC,), ("127.0.0.1",), ("127.0.0.1",)])

    async def rebinding(host: str, port: int) -> tuple[str, ...]:
        return next(answers)

    def no_other_way(*args: object, **more: object) -> None:
        raise AssertionError("resolved anew")

    monkeypatch.setattr(socket, "getaddrinfo", no_other_way)
    async with network.serving(http(drawn())):
        assert await Fetcher(20.0, rebinding).fetch(URI, PLAIN, MOST) == drawn()
    assert network.connected == [(PUBLIC, 80)]


async def test_a_name_that_leads_nowhere_is_unresolved(network: Network, fetcher: Fetcher) -> None:
    assert await refused(fetcher, "http://a.cdn.example/") is Reason.URI_UNRESOLVED
    network.addresses[HOST] = ()
    assert await refused(fetcher) is Reason.URI_UNRESOLVED
    assert not network.connected


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "307 Moved", "308 Moved"])
async def test_no_redirect_is_followed(network: Network, fetcher: Fetcher, status: str) -> None:
    for place in ("http://169.254.169.254/", "http://a.cdn.example/", f"http://{HOST}/b.png"):
        async with network.serving(http(status=status, Location=place)):
            assert await refused(fetcher) is Reason.URI_REDIRECT
    assert network.asked == [HOST] * 3
    assert network.connected == [(PUBLIC, 80)] * 3


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (http(status="404 Not Found"), Reason.URI_STATUS),
        (http(status="206 Partial Content", body=b"x"), Reason.URI_STATUS),
        (http(gzip.compress(bytes(2**20)), Content_Encoding="gzip"), Reason.URI_ENCODED),
        (http(b"x", length=MOST + 1), Reason.TOO_LARGE),
        (b"HTTP/1.1 200 OK\r\n\r\n" + bytes(MOST + 1), Reason.TOO_LARGE),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
            + (b"8000\r\n" + bytes(0x8000) + b"\r\n") * 3,
            Reason.TOO_LARGE,
        ),
        (http(b"too short", length=100), Reason.URI_UNREACHABLE),
        (b"HTTP/1.1 200 OK\r\nX: " + bytes([120]) * 100_000 + b"\r\n\r\n", Reason.URI_UNREACHABLE),
        (b"SSH-2.0-OpenSSH_9.9\r\n", Reason.URI_UNREACHABLE),
        (b"", Reason.URI_UNREACHABLE),
    ],
    ids=[
        *("not found", "a part", "compressed", "too large as it says", "too large without a word"),
        *("too large in pieces", "broken off", "endless header", "another protocol", "nothing"),
    ],
)
async def test_answers_are_bounded(
    network: Network, fetcher: Fetcher, answer: bytes, reason: Reason
) -> None:
    async with network.serving(answer):
        assert await refused(fetcher) is reason


async def test_a_server_that_never_ends_is_left(network: Network) -> None:
    left = asyncio.Event()
    async with network.serving(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", then=left.wait):
        assert await refused(Fetcher(0.3, network.resolve)) is Reason.URI_TOO_SLOW
        left.set()


async def test_a_resolver_that_never_answers_is_left() -> None:
    async def silent(host: str, port: int) -> tuple[str, ...]:
        await asyncio.Event().wait()
        raise AssertionError

    assert await refused(Fetcher(0.05, silent)) is Reason.URI_TOO_SLOW


@pytest.mark.parametrize(("host", "trusted"), [(HOST, True), (HOST, False), ("evil.example", True)])
async def test_tls_must_be_of_the_host_and_trusted(
    network: Network,
    fetcher: Fetcher,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    host: str,
    trusted: bool,
) -> None:
    own = certificate(tmp_path, host)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(own)
    if trusted:
        authorities = ssl.create_default_context(cafile=own)
        monkeypatch.setattr("aiohttp.connector._SSL_CONTEXT_VERIFIED", authorities)
    async with network.serving(http(drawn()), tls=tls):
        if host == HOST and trusted:
            assert await fetcher.fetch(f"https://{HOST}/", ALLOWED, MOST) == drawn()
        else:
            assert await refused(fetcher, f"https://{HOST}/", ALLOWED) is Reason.URI_UNREACHABLE
            assert not network.requests
    assert network.connected == [(PUBLIC, 443)]


async def test_names_are_resolved_by_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def getaddrinfo(host: str, port: int, **how: int) -> list[tuple[object, ...]]:
        asked.append((host, port))
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    fetcher = Fetcher(20.0)
    assert await refused(fetcher) is Reason.URI_ADDRESS
    assert asked == [(HOST, 80)]
    fetcher.close()
