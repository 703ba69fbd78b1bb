"""The sidecar over real sockets: a backend, a guard with the fake engine, OpenAI's client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from guard_middleware.messages import App, Receive, Scope, Send
from guard_middleware.settings import Settings
from guard_middleware.sidecar import Places, Sidecar
from tests.middleware.asgi_calls import EVENTS, Backend, body_of, each, listening
from tests.middleware.formats.openai_replies import asking, chunks, reply
from tests.middleware.wrapped import BAD, fits


@asynccontextmanager
async def client_of(backend: Backend, guard: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with listening(backend) as upstream:
        sidecar = Sidecar(Places(upstream), Settings(guard=guard, guarded=("/",), refusal="No."))
        async with listening(sidecar.middleware) as address:
            client = openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0)
            async with client:
                yield client


async def test_openai_client_gets_the_reply_through_the_sidecar(fake_guard: str) -> None:
    backend = Backend([json.dumps(reply("Hello there.")).encode()])
    async with client_of(backend, fake_guard) as client:
        got = await client.chat.completions.create(**asking("Hi"))
    assert got.choices[0].message.content == "Hello there."
    assert backend.asked == asking("Hi")


@pytest.mark.parametrize("said", ["All is well. " * 50, ""])
async def test_openai_client_gets_the_stream_through_the_sidecar(
    fake_guard: str, said: str
) -> None:
    backend = Backend(each(chunks(said)), EVENTS)
    async with client_of(backend, fake_guard) as client:
        stream = await client.chat.completions.create(**asking("Hi", stream=True))
        events = [event async for event in stream]
    assert "".join(event.choices[0].delta.content or "" for event in events) == said
    assert events[-1].choices[0].finish_reason == "stop"


async def test_openai_client_sees_a_blocked_stream_end_as_content_filter(fake_guard: str) -> None:
    said = "All is well. " * 50
    backend = Backend(each(chunks(said + BAD)), EVENTS)
    async with client_of(backend, fake_guard) as client:
        stream = await client.chat.completions.create(**asking("Hi", stream=True))
        events = [event async for event in stream]
    got = "".join(event.choices[0].delta.content or "" for event in events)
    assert fits(got, said + BAD, "No.")
    assert events[-1].choices[0].finish_reason == "content_filter"


async def test_openai_client_sees_a_blocked_prompt_as_content_filter(fake_guard: str) -> None:
    backend = Backend([b"{}"])
    async with client_of(backend, fake_guard) as client:
        got = await client.chat.completions.create(**asking(f"Make a {BAD}"))
    assert got.choices[0].finish_reason == "content_filter"
    assert backend.bodies == []


@asynccontextmanager
async def served(
    backend: App, guard: str, folder: Path, **settings: Any
) -> AsyncIterator[tuple[httpx.AsyncClient, httpx.AsyncClient, Sidecar]]:
    """A whole sidecar on Unix sockets: clients of its two listeners, and it."""
    listen, admin = folder / "listen", folder / "admin"
    async with listening(backend, lifespan="auto") as upstream:
        places = Places(upstream, listen=f"unix:{listen}", admin=f"unix:{admin}", drain_s=30)
        sidecar = Sidecar(places, Settings(guard=guard, guarded=("/",), **settings))
        task = asyncio.create_task(sidecar.serve())
        async with client_at(listen) as client, client_at(admin) as administrator:
            async with asyncio.timeout(60):
                while not (sidecar.server.started and sidecar.admin.started):
                    await asyncio.sleep(0.01)
            yield client, administrator, sidecar
            sidecar.server.should_exit = True
            await task


def client_at(socket: Path) -> httpx.AsyncClient:
    transport = httpx.AsyncHTTPTransport(uds=str(socket))
    return httpx.AsyncClient(transport=transport, base_url="http://sidecar", timeout=60)


async def test_health_readiness_and_metrics_are_told_beside(
    fake_guard: str, tmp_path: Path
) -> None:
    backend = Backend([json.dumps(reply("Hello there.")).encode()])
    async with served(backend, fake_guard, tmp_path) as (client, administrator, _):
        got = await client.post("/v1/chat/completions", json=asking("Hi"))
        live, ready, metrics, other = [
            await administrator.get(path) for path in ("/livez", "/readyz", "/metrics", "/")
        ]
    assert got.json() == reply("Hello there.")
    assert (live.status_code, live.text) == (200, "ok\n")
    assert (ready.status_code, ready.text) == (200, "guard ok\nupstream ok\n")
    assert "guard_middleware_exchanges_total" in metrics.text and other.status_code == 404


async def test_sidecar_without_its_guard_is_not_ready_and_lets_nothing_pass(
    tmp_path: Path,
) -> None:
    backend = Backend([json.dumps(reply("Hello there.")).encode()])
    nowhere = f"unix:{tmp_path / 'nobody'}"
    async with served(backend, nowhere, tmp_path, guard_timeout_s=0.1) as (
        client,
        administrator,
        _,
    ):
        ready = await administrator.get("/readyz")
        got = await client.post("/v1/chat/completions", json=asking("Hi"))
    assert ready.status_code == 503 and "guard down" in ready.text
    assert got.json()["choices"][0]["finish_reason"] == "content_filter"


async def test_stream_under_way_is_finished_when_the_sidecar_drains(
    fake_guard: str, tmp_path: Path
) -> None:
    said, goes_on = "All is well. " * 50, asyncio.Event()

    async def waiting(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await body_of(receive)
            headers = [(b"content-type", EVENTS.encode())]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            for data in each(chunks(said)):
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await goes_on.wait()
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async with served(waiting, fake_guard, tmp_path) as (client, administrator, sidecar):
        body = asking("Hi", stream=True)
        async with client.stream("POST", "/v1/chat/completions", json=body) as got:
            received = got.aiter_bytes()
            whole = await anext(received)
            sidecar.server.should_exit = True
            ready = await administrator.get("/readyz")
            goes_on.set()
            whole += b"".join([data async for data in received])
    assert ready.status_code == 503 and "draining" in ready.text
    assert whole == b"".join(each(chunks(said)))
