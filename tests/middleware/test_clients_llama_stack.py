"""Llama Stack's client, unmodified, through middleware and sidecar.

Where it is installed (pip install llama-stack-client fire): `dev` is without it, for it brings
pandas.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.middleware.asgi_calls import Backend
from tests.middleware.clients import NO, every_way, in_front, spoken
from tests.middleware.formats.llama_stack_speech import LlamaStackChatSpeech
from tests.middleware.wrapped import BAD, SAFE, fits

llama_stack_client = pytest.importorskip("llama_stack_client")

CHAT = LlamaStackChatSpeech()


def asking(text: str, **more: Any) -> dict[str, Any]:
    return {"model_id": "m", "messages": [{"role": "user", "content": text}], **more}


@asynccontextmanager
async def client(way: str, backend: Backend) -> AsyncIterator[Any]:
    async with (
        in_front(way, backend) as address,
        llama_stack_client.AsyncLlamaStackClient(base_url=address, max_retries=0) as own,
    ):
        yield own


@every_way
async def test_chat_is_answered_and_a_prompt_is_blocked(way: str) -> None:
    backend = spoken(CHAT, content="Mild.")
    async with client(way, backend) as own:
        got = await own.inference.chat_completion(**asking("Hi"))
        no = await own.inference.chat_completion(**asking(BAD))
    assert got.completion_message.content == "Mild."
    assert no.completion_message.content == NO and len(backend.bodies) == 1


@every_way
@pytest.mark.parametrize("said", [SAFE, SAFE + BAD])
async def test_chat_streams(way: str, said: str) -> None:
    async with client(way, spoken(CHAT, streamed=True, content=said)) as own:
        stream = await own.inference.chat_completion(**asking("Hi", stream=True))
        events = [chunk.event async for chunk in stream]
    text = "".join(one.delta.text for one in events if one.delta.type == "text")
    if said == SAFE:
        assert text == SAFE
    else:  # the protocol has no reason to end for that: the refusal follows what was said
        assert text.endswith(NO) and fits(text.removesuffix(NO).rstrip("\n"), said)
    assert events[-1].event_type == "complete" and events[-1].stop_reason == "end_of_turn"


@every_way
@pytest.mark.parametrize("arguments", ['{"city":"Lisbon"}', f'{{"city":"{BAD}"}}'])
async def test_tools_are_called_unless_the_call_is_blocked(way: str, arguments: str) -> None:
    async with client(way, spoken(CHAT, arguments=arguments)) as own:
        got = await own.inference.chat_completion(**asking("Hi"))
    calls = [call.arguments for call in got.completion_message.tool_calls or ()]
    assert calls == ([] if BAD in arguments else [arguments])


@every_way
async def test_request_that_cannot_be_read_is_a_bad_request(way: str) -> None:
    async with client(way, spoken(CHAT, content="Mild.")) as own:
        with pytest.raises(llama_stack_client.BadRequestError):
            await own.inference.chat_completion(
                model_id="m", messages=[{"role": "root", "content": "Hi"}]
            )
