"""Hugging Face's InferenceClient, unmodified, through middleware and sidecar: chats, and TGI."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from huggingface_hub import AsyncInferenceClient

from tests.middleware.asgi_calls import Backend
from tests.middleware.clients import NO, every_way, in_front, spoken
from tests.middleware.formats.openai_chat_speech import OpenAIChatSpeech
from tests.middleware.formats.tgi_speech import TgiListSpeech
from tests.middleware.wrapped import BAD, SAFE, fits

CHAT, TGI = OpenAIChatSpeech(), TgiListSpeech()
HI: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]


@asynccontextmanager
async def client(way: str, backend: Backend) -> AsyncIterator[AsyncInferenceClient]:
    async with in_front(way, backend) as address, AsyncInferenceClient(address) as own:
        yield own


@every_way
async def test_chat_is_answered_and_a_prompt_is_blocked(way: str) -> None:
    backend = spoken(CHAT, content="Mild.")
    async with client(way, backend) as own:
        got = await own.chat_completion(HI)
        no = await own.chat_completion([{"role": "user", "content": BAD}])
    assert got.choices[0].message.content == "Mild."
    assert (no.choices[0].message.content, no.choices[0].finish_reason) == (NO, "content_filter")
    assert len(backend.bodies) == 1


@every_way
@pytest.mark.parametrize(("said", "reason"), [(SAFE, "stop"), (SAFE + BAD, "content_filter")])
async def test_chat_streams(way: str, said: str, reason: str) -> None:
    async with client(way, spoken(CHAT, streamed=True, content=said)) as own:
        events = [event async for event in await own.chat_completion(HI, stream=True)]
    text = "".join(one.choices[0].delta.content or "" for one in events)
    assert fits(text, said, NO)
    assert events[-1].choices[0].finish_reason == reason


@every_way
@pytest.mark.parametrize("arguments", ['{"city":"Lisbon"}', f'{{"city":"{BAD}"}}'])
async def test_tools_are_called_unless_the_call_is_blocked(way: str, arguments: str) -> None:
    async with client(way, spoken(CHAT, name="look", arguments=arguments)) as own:
        got = await own.chat_completion(HI)
    calls = [call.function.arguments for call in got.choices[0].message.tool_calls or ()]
    assert calls == ([] if BAD in arguments else [arguments])
    assert (got.choices[0].finish_reason == "content_filter") == (BAD in arguments)


@every_way
async def test_text_is_generated_streamed_and_blocked(way: str) -> None:
    async with client(way, spoken(TGI, content="Mild.")) as own:
        assert await own.text_generation("Hi") == "Mild."
        assert await own.text_generation(BAD) == NO
    async with client(way, spoken(TGI, streamed=True, content=SAFE)) as own:
        stream = await own.text_generation("Hi", stream=True)
        text = "".join([token async for token in stream])
    assert text.removesuffix("<|eot_id|>") == SAFE
