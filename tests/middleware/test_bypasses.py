"""Attempts to have a backend read what the guard did not judge: each is judged or refused.

The attempts are those of the conformance set, each sent over a connection of its own to a sidecar's
proxy inside the middleware. The backend records every byte that it is sent, and is read as lenient
as any might be. `outcomes()` is the table of names and outcomes.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import zlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from urllib.parse import unquote_to_bytes

import pytest
from prometheus_client import CollectorRegistry

from guard_middleware import GuardMiddleware
from guard_middleware.conformance.cases import Case, attempts, basics
from guard_middleware.conformance.requests import PROTOCOLS, Place
from guard_middleware.conformance.run import Outcome, read
from guard_middleware.formats import FORMATS
from guard_middleware.metrics import Metrics
from guard_middleware.proxy import Proxy
from guard_middleware.testing import FakeGuard, forbids, text_of
from tests.middleware.asgi_calls import listening
from tests.middleware.formats.openai_replies import reply
from tests.middleware.wrapped import BAD

PLACE = Place("sidecar.test")
ATTEMPTS = {case.name: case for case in attempts(PLACE, BAD)}
WHOLE = json.dumps(reply("Hello.")).encode()
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s"


class Lenient:
    """A backend that answers whatever it is sent, and keeps all of it."""

    def __init__(self) -> None:
        self.sent = bytearray()

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                self.sent += data
                if b"\r\n\r\n" in data:
                    writer.write(ANSWER % (len(WHOLE), WHOLE))
        await closed(writer)

    def read(self) -> Iterator[bytes]:
        """What was sent, in every way in which somebody might read it."""
        sent = bytes(self.sent)
        yield sent
        yield unquote_to_bytes(sent)
        yield re.sub(rb"\\u00([0-9a-f]{2})", lambda found: bytes.fromhex(found[1].decode()), sent)
        yield sent.replace(b"\x00", b"")  # UTF-16, UTF-32
        yield re.sub(rb"\r?\n[0-9a-fA-F]+[^\r\n]*\r?\n", b"", sent)  # chunks
        yield from _unpacked(sent)


def _unpacked(sent: bytes, depth: int = 2) -> Iterator[bytes]:
    starts = (found.start() for found in re.finditer(rb"\x1f\x8b\x08|\x78[\x01\x9c\xda]", sent))
    for at in starts:
        with suppress(zlib.error):
            unpacked = zlib.decompressobj(32 + zlib.MAX_WBITS).decompress(sent[at:])
            yield unpacked
            yield from _unpacked(unpacked, depth - 1) if depth else ()


@asynccontextmanager
async def sidecar(backend: Lenient, guard: FakeGuard) -> AsyncIterator[tuple[str, int]]:
    """A proxy inside a middleware that guards every path; yields its host and port."""
    server = await asyncio.start_server(backend.talk, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    proxy = Proxy(f"http://{host}:{port}")
    metrics = Metrics(CollectorRegistry())
    guarded = GuardMiddleware(proxy, guard, metrics=metrics, guarded=("/",))
    async with server, listening(guarded, lifespan="off") as address:
        host, _, listens = address.removeprefix("http://").partition(":")
        yield host, int(listens)
        await proxy.close()


async def closed(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()


async def tried(case: Case) -> tuple[Outcome, Lenient, FakeGuard]:
    """What became of a case, what the backend was sent, whom the guard was asked about."""
    backend, guard = Lenient(), FakeGuard(forbids(BAD))
    async with sidecar(backend, guard) as place:
        reader, writer = await asyncio.open_connection(*place)
        answer = b""
        with suppress(ConnectionError):
            writer.write(case.request)
            async with asyncio.timeout(60):
                await writer.drain()
                answer = await reader.read()
        await closed(writer)
    return read(answer, case.spare)[0], backend, guard


async def outcomes() -> dict[str, Outcome]:
    """What becomes of every attempt, by its name."""
    return {name: (await tried(case))[0] for name, case in ATTEMPTS.items()}


@pytest.mark.parametrize("name", ATTEMPTS)
async def test_attempt_is_judged_and_blocked_or_refused(name: str) -> None:
    outcome, backend, guard = await tried(ATTEMPTS[name])
    assert outcome in (Outcome.BLOCKED, Outcome.REFUSED)
    for seen in backend.read():
        assert BAD.encode() not in seen
    if outcome is Outcome.BLOCKED and name not in UNREAD:
        parts = [part for one in guard.asked for turn in one.messages for part in turn.parts]
        assert any(BAD in text_of(part) for part in parts)


# What no guard can read is blocked unasked.
UNREAD = {"part: of unknown kind", "part: a file", "part: audio", "part: an image's address"}


def test_there_are_many_attempts_of_every_kind() -> None:
    kinds = {name.partition(":")[0] for name in ATTEMPTS if ":" in name}
    assert len(ATTEMPTS) >= 60
    assert {"role", "part", "coding", "charset", "media type", "path", "target"} <= kinds
    assert {"method", "framing", "connection", "prefill", "query", "header"} <= kinds


async def test_harmless_request_of_every_framing_would_be_served() -> None:
    """So that what is refused above is not refused for want of anything else."""
    harmless = next(basics(PLACE, PROTOCOLS[0], BAD))
    outcome, backend, _ = await tried(harmless)
    assert outcome is Outcome.ANSWERED and b"Portugal" in backend.sent


@pytest.mark.parametrize(
    "name",
    [
        *("framing: chunked", "framing: a chunk for each byte", "framing: chunk extensions"),
        *("coding: gzip", "coding: deflate", "media type: none", "path: doubled slash"),
        *("role: system", "definition of a tool", "second prompt of a batch"),
        *("text in Unicode escapes", "connection: expects to be told to go on"),
    ],
)
async def test_what_is_blocked_is_blocked_for_what_it_says(name: str) -> None:
    assert (await tried(ATTEMPTS[name]))[0] is Outcome.BLOCKED
    harmless = {case.name: case for case in attempts(PLACE, "something nice")}[name]
    outcome, backend, _ = await tried(harmless)
    assert outcome is Outcome.ANSWERED and backend.sent


async def test_lenient_backend_reads_what_it_is_sent() -> None:
    """The recorder would see each way of hiding the text, were it let through."""
    raw = json.dumps({"a": BAD}).encode()
    for hidden in (
        raw,
        gzip.compress(raw),
        zlib.compress(gzip.compress(raw)),
        raw.decode().encode("utf-16"),
        raw.replace(b"b", b"\\u0062"),
        raw.replace(b"b", b"%62"),
        raw.replace(b"bomb", b"b\r\n3;a=b\r\nomb"),
    ):
        backend = Lenient()
        backend.sent += b"POST / HTTP/1.1\r\n\r\n" + hidden
        assert any(BAD.encode() in seen for seen in backend.read())


def test_every_protocol_has_its_basics() -> None:
    names = {one.name for one in FORMATS}
    assert {one.name for one in PROTOCOLS} <= names
    unnamed = names - {one.name for one in PROTOCOLS}
    assert all(name.startswith("llama-stack-") for name in unnamed)  # its batches, its texts
