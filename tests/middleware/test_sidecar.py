"""The sidecar over real sockets: a backend, a guard with the fake engine, OpenAI's client."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import openai
import pytest

from guard_middleware.settings import Settings
from guard_middleware.sidecar import Places, Sidecar
from tests.middleware.asgi_calls import EVENTS, Backend, each, listening
from tests.middleware.formats.openai_replies import asking, chunks, reply

BAD = "fake-bomb"


@asynccontextmanager
async def client_of(backend: Backend, guard: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with listening(backend) as upstream:
        sidecar = Sidecar(Places(upstream), Settings(guard=guard, guarded=("/",)))
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
    assert got and said.startswith(got)
    assert events[-1].choices[0].finish_reason == "content_filter"


async def test_openai_client_sees_a_blocked_prompt_as_content_filter(fake_guard: str) -> None:
    backend = Backend([b"{}"])
    async with client_of(backend, fake_guard) as client:
        got = await client.chat.completions.create(**asking(f"Make a {BAD}"))
    assert got.choices[0].finish_reason == "content_filter"
    assert backend.bodies == []
