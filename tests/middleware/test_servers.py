"""Under every ASGI server that people run: the same replies, and nothing is left open."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress

import httpx
import hypercorn.asyncio
import openai
import pytest
from granian.constants import Interfaces
from granian.server.embed import Server as Granian
from hypercorn.config import Config as HypercornConfig

from guard_middleware.messages import App
from guard_middleware.testing import FakeGuard, forbids
from tests.middleware.asgi_calls import EVENTS, Backend, each, listening, sse
from tests.middleware.formats.openai_replies import PATH, asking, chunk, chunks, reply
from tests.middleware.wrapped import BAD, SAFE, Wrapped, fits

NO = "No."

Serve = Callable[[App], AbstractAsyncContextManager[str]]


@asynccontextmanager
async def under_hypercorn(app: App) -> AsyncIterator[str]:
    over = asyncio.Event()
    bound = socket.create_server(("127.0.0.1", 0))
    address = "http://{}:{}".format(*bound.getsockname())
    config = HypercornConfig()
    config.bind = [f"fd://{bound.detach()}"]  # which is the server's now
    config.accesslog = config.errorlog = None
    config.graceful_timeout = 2
    task = asyncio.create_task(
        hypercorn.asyncio.serve(app, config, shutdown_trigger=over.wait)  # type: ignore[arg-type]
    )
    try:
        yield address
    finally:
        over.set()
        await task


@asynccontextmanager
async def under_granian(app: App) -> AsyncIterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = Granian(app, address="127.0.0.1", port=port, interface=Interfaces.ASGI)
    task = asyncio.create_task(server.serve())
    try:
        for _ in range(1000):
            with suppress(OSError):
                socket.create_connection(("127.0.0.1", port), 0.1).close()
                break
            await asyncio.sleep(0.01)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.stop()  # type: ignore[no-untyped-call]
        await task


every_server = pytest.mark.parametrize("serve", [listening, under_hypercorn, under_granian])


def client(address: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0, timeout=60)


@every_server
async def test_whole_reply_passes_and_a_request_is_blocked(serve: Serve) -> None:
    backend = Backend([json.dumps(reply("Hello there.")).encode()])
    async with serve(Wrapped(backend)) as address, client(address) as ai:
        passed = await ai.chat.completions.create(**asking("Hi"))
        blocked = await ai.chat.completions.create(**asking(f"Make a {BAD}"))
    assert passed.choices[0].message.content == "Hello there."
    assert blocked.choices[0].finish_reason == "content_filter" and len(backend.bodies) == 1


@every_server
async def test_streams_pass_and_end_filtered(serve: Serve) -> None:
    for said, reason in ((SAFE, "stop"), (SAFE + BAD, "content_filter")):
        app = Wrapped(Backend(each(chunks(said)), EVENTS), refusal=NO)
        async with serve(app) as address, client(address) as ai:
            stream = await ai.chat.completions.create(**asking("Hi", stream=True))
            events = [event async for event in stream]
        text = "".join(one.choices[0].delta.content or "" for one in events)
        assert fits(text, said, NO)
        assert events[-1].choices[0].finish_reason == reason


@every_server
async def test_client_that_leaves_ends_backend_and_guard(serve: Serve) -> None:
    guard = FakeGuard(forbids(BAD))
    goes_on = itertools.repeat(sse(chunk({"content": SAFE}), done=False))
    app = Wrapped(Backend(goes_on, EVENTS), guard)
    async with serve(app) as address, httpx.AsyncClient(timeout=60) as http:
        async with http.stream("POST", address + PATH, json=asking("Hi", stream=True)) as got:
            async for _ in got.aiter_bytes():
                break
        async with asyncio.timeout(60):
            while app.counted("in_progress"):
                await asyncio.sleep(0.01)
    assert guard.open_streams == 0 and sum(app.results.values()) == 1


@every_server
async def test_unknown_guarded_paths_are_refused_and_other_routes_pass(serve: Serve) -> None:
    backend = Backend([b"any", b"thing"], "text/plain")
    async with serve(Wrapped(backend)) as address, httpx.AsyncClient(timeout=60) as http:
        for path in ("/v1/unknown", "//v1/unknown", "/v1/%2e%2e/v1/unknown"):
            url = httpx.URL(address).copy_with(raw_path=path.encode())
            got = await http.post(url, json={"input": "x"})
            head = await http.head(url)
            assert (got.status_code, head.status_code, backend.bodies) == (403, 403, [])
        passed = await http.put(f"{address}/own", content=b"\xff")
    assert passed.content == b"anything" and backend.bodies == [b"\xff"]
