"""OpenAI's client, unmodified: chats, responses and completions through middleware and sidecar."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import openai
import pytest

from tests.middleware.asgi_calls import Backend
from tests.middleware.clients import NO, every_way, in_front, spoken
from tests.middleware.formats.openai_chat_speech import OpenAIChatSpeech
from tests.middleware.formats.openai_replies import asking
from tests.middleware.formats.openai_responses_speech import OpenAIResponsesSpeech
from tests.middleware.formats.openai_text_speech import OpenAITextSpeech
from tests.middleware.wrapped import BAD, SAFE, fits

CHAT, RESPONSES, TEXT = OpenAIChatSpeech(), OpenAIResponsesSpeech(), OpenAITextSpeech()


@asynccontextmanager
async def client(way: str, backend: Backend) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        in_front(way, backend) as address,
        openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0) as own,
    ):
        yield own


@every_way
async def test_chat_is_answered_and_a_prompt_is_blocked(way: str) -> None:
    backend = spoken(CHAT, content="Mild.")
    async with client(way, backend) as own:
        got = await own.chat.completions.create(**asking("Hi"))
        no = await own.chat.completions.create(**asking(BAD))
    assert got.choices[0].message.content == "Mild."
    assert (no.choices[0].message.content, no.choices[0].finish_reason) == (NO, "content_filter")
    assert len(backend.bodies) == 1


@every_way
@pytest.mark.parametrize(("said", "reason"), [(SAFE, "stop"), (SAFE + BAD, "content_filter")])
async def test_chat_streams(way: str, said: str, reason: str) -> None:
    async with client(way, spoken(CHAT, streamed=True, content=said)) as own:
        stream = await own.chat.completions.create(**asking("Hi", stream=True))
        events = [event async for event in stream]
    text = "".join(one.choices[0].delta.content or "" for one in events)
    assert fits(text, said, NO)
    assert events[-1].choices[0].finish_reason == reason


@every_way
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("arguments", ['{"city":"Lisbon"}', f'{{"city":"{BAD}"}}'])
async def test_tools_are_called_unless_the_call_is_blocked(
    way: str, streamed: bool, arguments: str
) -> None:
    backend = spoken(CHAT, streamed, name="look", arguments=arguments)
    async with client(way, backend) as own:
        if streamed:
            async with own.chat.completions.stream(**asking("Hi")) as stream:
                _ = [event async for event in stream]
                completion = stream.current_completion_snapshot
        else:
            completion = await own.chat.completions.create(**asking("Hi"))
    calls = [call.function for call in completion.choices[0].message.tool_calls or ()]
    if BAD in arguments:
        assert completion.choices[0].finish_reason == "content_filter"
        assert BAD not in "".join(call.arguments or "" for call in calls)
    else:
        assert [(call.name, call.arguments) for call in calls] == [("look", arguments)]


@every_way
async def test_responses_are_answered_streamed_and_blocked(way: str) -> None:
    async with client(way, spoken(RESPONSES, content="Mild.")) as own:
        assert (await own.responses.create(model="m", input="Hi")).output_text == "Mild."
        no = await own.responses.create(model="m", input=BAD)
        assert no.output_text == NO and no.status == "incomplete"
    async with (
        client(way, spoken(RESPONSES, streamed=True, content=SAFE)) as own,
        own.responses.stream(model="m", input="Hi") as stream,
    ):
        assert (await stream.get_final_response()).output_text == SAFE


@every_way
async def test_completions_are_answered_streamed_and_blocked(way: str) -> None:
    async with client(way, spoken(TEXT, text="Mild.")) as own:
        got = await own.completions.create(model="m", prompt="Hi")
        no = await own.completions.create(model="m", prompt=["Hi", BAD])
    assert got.choices[0].text == "Mild."
    assert [one.finish_reason for one in no.choices] == ["content_filter"] * 2
    async with client(way, spoken(TEXT, streamed=True, text=SAFE)) as own:
        stream = await own.completions.create(model="m", prompt="Hi", stream=True)
        assert "".join([one.choices[0].text async for one in stream if one.choices]) == SAFE


@every_way
async def test_request_that_cannot_be_read_is_a_bad_request(way: str) -> None:
    async with client(way, spoken(CHAT, content="Mild.")) as own:
        with pytest.raises(openai.BadRequestError, match="role"):
            await own.chat.completions.create(
                model="m",
                messages=[{"role": "root", "content": "Hi"}],  # type: ignore[list-item,misc]
            )
