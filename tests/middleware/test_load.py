"""Many streams, slow clients, clients that leave, a backend and a guard that are killed, a drain:
what clients saw, and that nothing stays open. `guardctl bench middleware` does it by the thousand.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from guard_api.v1 import guard_pb2
from guard_middleware.guards import Guard, RemoteGuard
from guard_middleware.messages import Message, Receive, Scope, Send
from guard_middleware.proxy import Proxy
from guard_middleware.settings import Settings
from guard_middleware.sidecar import Places, Sidecar
from guard_middleware.testing import FakeGuard, forbids
from tests.middleware.asgi_calls import EVENTS, Backend, body_of, call, each, listening, sse
from tests.middleware.fake_service import FakeService, serving, socket_in, verdict
from tests.middleware.formats.openai_replies import PATH, asking, chunk, chunks
from tests.middleware.wrapped import BAD, SAFE, Wrapped

MANY = 40
SENT = each(chunks(SAFE, size=40))
ASKED = asking("Hi", stream=True)


class Holding:
    """A backend whose streams wait in their middle, and which knows what became of each."""

    def __init__(self) -> None:
        self.goes_on = asyncio.Event()
        self.open = 0
        self.ends: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return
        await body_of(receive)
        self.open += 1
        told = asyncio.create_task(_until_left(receive))
        goes_on = asyncio.create_task(self.goes_on.wait())
        try:
            await _start(send)
            half = len(SENT) // 2
            for data in SENT[:half]:
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await asyncio.wait((told, goes_on), return_when=asyncio.FIRST_COMPLETED)
            if told.done():
                self.ends.append("told")
                return
            await send({"type": "http.response.body", "body": b"".join(SENT[half:])})
            self.ends.append("said all")
        except asyncio.CancelledError:
            self.ends.append("cancelled")
            raise
        finally:
            self.open -= 1
            told.cancel()
            goes_on.cancel()


async def _until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _start(send: Send) -> None:
    headers = [(b"content-type", EVENTS.encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})


@asynccontextmanager
async def behind_sidecar(backend: Any, guard: Guard) -> AsyncIterator[tuple[Wrapped, str]]:
    """A middleware around a proxy towards the backend, and its address."""
    async with listening(backend, lifespan="auto") as upstream:
        proxy = Proxy(upstream)
        app = Wrapped(proxy, guard)
        async with listening(app, lifespan="off") as address:
            yield app, address
            await proxy.close()


@asynccontextmanager
async def begun(
    http: httpx.AsyncClient, url: str, number: int
) -> AsyncIterator[list[tuple[bytes, AsyncIterator[bytes]]]]:
    """So many streams, of each its first bytes and what reads the rest."""
    async with AsyncExitStack() as stack:

        async def one() -> tuple[bytes, AsyncIterator[bytes]]:
            stream = http.stream("POST", url, json=ASKED)
            received = (await stack.enter_async_context(stream)).aiter_bytes()
            return await anext(received), received

        yield await asyncio.gather(*(one() for _ in range(number)))


def client(**more: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=None), **more)


async def until(gone: Any) -> None:
    async with asyncio.timeout(60):
        while not gone():
            await asyncio.sleep(0.01)


def ours_left() -> list[str]:
    return [name for task in asyncio.all_tasks() if (name := task.get_name()).startswith("guard-")]


async def test_many_streams_at_once_each_get_all_and_leave_nothing_open() -> None:
    backend, guard = Holding(), FakeGuard(forbids(BAD))
    async with behind_sidecar(backend, guard) as (app, address), client() as http:
        async with begun(http, address + PATH, MANY) as streams:
            assert backend.open == guard.open_streams == app.counted("in_progress") == MANY
            backend.goes_on.set()
            bodies = [first + b"".join([data async for data in rest]) for first, rest in streams]
        await until(lambda: not app.counted("in_progress"))
        assert guard.open_streams == backend.open == 0 and ours_left() == []
    assert set(bodies) == {b"".join(SENT)}
    assert backend.ends == ["said all"] * MANY and app.results == {"passed": MANY}


async def test_clients_that_vanish_end_their_guards_and_the_backend_is_told() -> None:
    backend, guard = Holding(), FakeGuard(forbids(BAD))
    async with behind_sidecar(backend, guard) as (app, address):
        async with client() as http, begun(http, address + PATH, MANY):
            assert backend.open == guard.open_streams == MANY
        await until(lambda: not (backend.open or app.counted("in_progress")))
        assert guard.open_streams == 0 and ours_left() == []
    assert backend.ends == ["told"] * MANY and app.results == {"gone": MANY}
    assert guard.streamed == []  # no reply came to its end


async def test_client_that_does_not_read_stops_the_backend() -> None:
    """What waits for a slow client is bounded: held text, and what one chunk may add."""
    never: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    leaves = asyncio.Event()
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while True:
            sent += 1
            if sent == 400:
                leaves.set()
            yield sse(chunk({"content": "four"}), done=False)

    app = Wrapped(Backend(endless(), EVENTS), hold_chars=400)

    async def stuck(scope: Scope, receive: Receive, send: Send) -> None:
        async def slow(message: Message) -> None:
            await send(message)
            if message["type"] == "http.response.body":
                asyncio.get_running_loop().call_later(0.05, leaves.set)
                await never

        await app(scope, receive, slow)

    await call(stuck, PATH, ASKED, leaves=leaves)
    assert sent <= 150 and app.results == {"gone": 1}


class Dying:
    """A backend on a socket that says half of a stream and is gone."""

    def __init__(self, chunked: bool) -> None:
        self._chunked = chunked

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
        said = b"".join(SENT[: len(SENT) // 2])
        if self._chunked:
            writer.write(head + b"transfer-encoding: chunked\r\n\r\n%x\r\n" % len(said) + said)
        else:
            writer.write(head + b"content-length: 100000\r\n\r\n" + said)
        await writer.drain()
        writer.transport.abort()


@pytest.mark.parametrize("chunked", [True, False])
async def test_backend_that_is_killed_in_a_stream_ends_it_with_the_protocols_error(
    chunked: bool,
) -> None:
    guard = FakeGuard(forbids(BAD))
    server = await asyncio.start_server(Dying(chunked).talk, "127.0.0.1", 0)
    proxy = Proxy("http://{}:{}".format(*server.sockets[0].getsockname()))
    app = Wrapped(proxy, guard)
    async with server, listening(app, lifespan="off") as address, client() as http:
        got = await http.post(address + PATH, json=ASKED)
        await proxy.close()
    whole = b"".join(SENT)
    *told, error, done, end = got.content.split(b"\n\n")
    assert got.status_code == 200 and b"upstream_failed" in error
    assert (done, end) == (b"data: [DONE]", b"")  # well-formed to its end
    assert told and whole.startswith(b"\n\n".join(told))
    assert app.results == {"aborted": 1} and guard.open_streams == 0


class Killed(FakeService):
    """A guard that allows the beginning of a stream, and is gone once the client has it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = threading.Event()

    def ClassifyStream(self, request_iterator: Any, context: grpc.ServicerContext) -> Any:
        said = 0
        for step in request_iterator:
            said += len(step.piece.text)
            if said >= 40:
                yield guard_pb2.ClassifyStreamResponse(verdict=verdict(), covered_chars=40)
                self.seen.wait(60)
                return


async def test_guard_that_is_killed_in_a_stream_ends_it_filtered_and_one_that_is_back_judges(
    tmp_path: Path,
) -> None:
    address = socket_in(tmp_path)
    guard, killed = RemoteGuard(Settings(guard=address, guard_failures=0)), Killed()
    app = Wrapped(Backend(SENT, EVENTS), guard)

    async def watched(scope: Scope, receive: Receive, send: Send) -> None:
        async def heard(message: Message) -> None:
            await send(message)
            if b"weather" in message.get("body", b""):
                killed.seen.set()

        await app(scope, receive, heard)

    try:
        with serving(killed, address):
            cut = await call(watched, PATH, ASKED)
        away = await call(app, PATH, ASKED)
        with serving(FakeService(), address):
            for _ in range(100):  # gRPC waits a while before it connects again
                back = await call(app, PATH, ASKED)
                if back.text() == SAFE:
                    break
                await asyncio.sleep(0.1)
    finally:
        await guard.close()
    assert cut.text() == SAFE[:40]
    for got in (cut, away):
        assert got.events[-1]["choices"][0]["finish_reason"] == "content_filter"
    assert away.text() == "I can't help with that."
    assert back.text() == SAFE


class Hung(FakeService):
    """A guard that takes everything and answers nothing: neither verdicts nor what its policy
    declares."""

    def ClassifyBatch(self, request: Any, context: grpc.ServicerContext) -> Any:
        _hang(context)

    def ListPolicies(self, request: Any, context: grpc.ServicerContext) -> Any:
        _hang(context)


def _hang(context: grpc.ServicerContext) -> None:
    left = threading.Event()
    context.add_callback(left.set)
    left.wait(60)


async def test_guard_that_hangs_refuses_after_its_time(tmp_path: Path) -> None:
    backend = Backend(SENT, EVENTS)
    with serving(Hung(), socket_in(tmp_path)) as target:
        guard = RemoteGuard(Settings(guard=target, guard_timeout_s=0.1))
        got = await call(Wrapped(backend, guard), PATH, ASKED)
        await guard.close()
    assert backend.bodies == [] and got.text() == "I can't help with that."


async def test_sidecar_told_to_end_finishes_every_stream_and_returns(tmp_path: Path) -> None:
    backend, guard = Holding(), FakeGuard(forbids(BAD))
    listen = tmp_path / "listen"
    async with listening(backend, lifespan="auto") as upstream:
        places = Places(upstream, listen=f"unix:{listen}", admin=f"unix:{tmp_path / 'admin'}")
        sidecar = Sidecar(places, Settings(), guard)
        ended = asyncio.create_task(sidecar.until_signal())
        await until(lambda: sidecar.server.started and sidecar.admin.started)
        over_socket = httpx.AsyncHTTPTransport(uds=str(listen))
        async with client(transport=over_socket) as http:
            async with begun(http, f"http://sidecar{PATH}", MANY) as streams:
                os.kill(os.getpid(), signal.SIGTERM)
                await until(lambda: sidecar.server.should_exit)
                backend.goes_on.set()
                bodies = [first + b"".join([d async for d in rest]) for first, rest in streams]
            async with asyncio.timeout(60):
                await ended  # it returns: the signal does not end the process
            with pytest.raises(httpx.ConnectError):
                await http.post(f"http://sidecar{PATH}", json=ASKED)
    assert set(bodies) == {b"".join(SENT)} and backend.ends == ["said all"] * MANY
    assert guard.open_streams == 0 and ours_left() == []
