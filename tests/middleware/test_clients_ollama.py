"""Ollama's client, unmodified, through middleware and sidecar."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import ollama
import pytest

from tests.middleware.asgi_calls import Backend
from tests.middleware.clients import NO, every_way, in_front, spoken
from tests.middleware.formats.ollama_speech import OllamaChatSpeech, OllamaGenerateSpeech
from tests.middleware.wrapped import BAD, SAFE, fits

CHAT, GENERATE = OllamaChatSpeech(), OllamaGenerateSpeech()
HI: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]


@asynccontextmanager
async def client(way: str, backend: Backend) -> AsyncIterator[ollama.AsyncClient]:
    async with in_front(way, backend) as address:
        own = ollama.AsyncClient(host=address)
        try:
            yield own
        finally:
            await own._client.aclose()


@every_way
async def test_chat_is_answered_and_a_prompt_is_blocked(way: str) -> None:
    backend = spoken(CHAT, content="Mild.")
    async with client(way, backend) as own:
        got = await own.chat("m", HI)
        no = await own.chat("m", [{"role": "user", "content": BAD}])
    assert got.message.content == "Mild."
    assert (no.message.content, no.done_reason) == (NO, "content_filter")
    assert len(backend.bodies) == 1


@every_way
@pytest.mark.parametrize(("said", "reason"), [(SAFE, "stop"), (SAFE + BAD, "content_filter")])
async def test_chat_streams(way: str, said: str, reason: str) -> None:
    async with client(way, spoken(CHAT, streamed=True, content=said)) as own:
        parts = [part async for part in await own.chat("m", HI, stream=True)]
    text = "".join(part.message.content or "" for part in parts)
    assert fits(text, said, NO)
    assert parts[-1].done_reason == reason


@every_way
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("name", ["look", BAD])
async def test_tools_are_called_unless_the_call_is_blocked(
    way: str, streamed: bool, name: str
) -> None:
    async with client(way, spoken(CHAT, streamed, name=name)) as own:
        if streamed:
            parts = [part async for part in await own.chat("m", HI, stream=True)]
        else:
            parts = [await own.chat("m", HI)]
    calls = [call.function.name for part in parts for call in part.message.tool_calls or ()]
    assert calls == ([] if name == BAD else [name])
    assert (parts[-1].done_reason == "content_filter") == (name == BAD)


@every_way
async def test_generate_is_answered_streamed_and_blocked(way: str) -> None:
    async with client(way, spoken(GENERATE, content="Mild.")) as own:
        assert (await own.generate("m", "Hi")).response == "Mild."
        assert (await own.generate("m", BAD)).response == NO
    async with client(way, spoken(GENERATE, streamed=True, content=SAFE)) as own:
        stream = await own.generate("m", "Hi", stream=True)
        assert "".join([part.response or "" async for part in stream]) == SAFE
