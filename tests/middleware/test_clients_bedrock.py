"""AWS's client for Bedrock, unmodified, through middleware and sidecar: Converse and its stream."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import closing
from typing import Any

import boto3  # type: ignore[import-untyped]
import pytest
from botocore.config import Config  # type: ignore[import-untyped]
from botocore.exceptions import ClientError  # type: ignore[import-untyped]

from tests.middleware.asgi_calls import Backend
from tests.middleware.clients import NO, every_way, in_front, spoken
from tests.middleware.formats.bedrock_speech import MODEL, BedrockSpeech
from tests.middleware.wrapped import BAD, SAFE, fits

SPEECH = BedrockSpeech()


async def asked(way: str, backend: Backend, ask: Callable[[Any], Any]) -> Any:
    """What a client with made-up credentials makes of a backend's reply, in another thread."""

    def called(address: str) -> Any:
        own = boto3.client(
            "bedrock-runtime",
            endpoint_url=address,
            region_name="eu-west-1",
            aws_access_key_id="none",
            aws_secret_access_key="none",
            config=Config(retries={"total_max_attempts": 1}),
        )
        with closing(own):
            return ask(own)

    async with in_front(way, backend) as address:
        return await asyncio.to_thread(called, address)


def said(text: str) -> dict[str, Any]:
    return {"modelId": MODEL, "messages": [{"role": "user", "content": [{"text": text}]}]}


def whole(own: Any) -> Any:
    return own.converse(**said("Hi"))


def streamed(own: Any) -> list[dict[str, Any]]:
    return list(own.converse_stream(**said("Hi"))["stream"])


def text_of(events: list[dict[str, Any]]) -> str:
    deltas = (one["contentBlockDelta"]["delta"] for one in events if "contentBlockDelta" in one)
    return "".join(delta.get("text", "") for delta in deltas)


@every_way
async def test_conversation_is_answered(way: str) -> None:
    got = await asked(way, spoken(SPEECH, text="Mild."), whole)
    assert got["output"]["message"]["content"] == [{"text": "Mild."}]
    assert got["stopReason"] == "end_turn"


@every_way
async def test_prompt_is_blocked(way: str) -> None:
    backend = spoken(SPEECH, text="Mild.")
    no = await asked(way, backend, lambda own: own.converse(**said(BAD)))
    assert no["output"]["message"]["content"] == [{"text": NO}]
    assert no["stopReason"] == "guardrail_intervened" and backend.bodies == []
    events = await asked(way, backend, lambda own: list(own.converse_stream(**said(BAD))["stream"]))
    assert text_of(events) == NO and backend.bodies == []


@every_way
@pytest.mark.parametrize(
    ("text", "reason"), [(SAFE, "end_turn"), (SAFE + BAD, "guardrail_intervened")]
)
async def test_conversation_streams(way: str, text: str, reason: str) -> None:
    events = await asked(way, spoken(SPEECH, streamed=True, text=text), streamed)
    got = text_of(events)
    assert fits(got, text, NO)
    assert [one["messageStop"]["stopReason"] for one in events if "messageStop" in one] == [reason]


@every_way
@pytest.mark.parametrize("arguments", ["Lisbon", BAD])
async def test_tools_are_called_unless_the_call_is_blocked(way: str, arguments: str) -> None:
    got = await asked(way, spoken(SPEECH, name="look", arguments=arguments), whole)
    backend = spoken(SPEECH, streamed=True, name="look", arguments=arguments)
    events = await asked(way, backend, streamed)
    uses = [one["toolUse"] for one in got["output"]["message"]["content"] if "toolUse" in one]
    deltas = [one["contentBlockDelta"]["delta"] for one in events if "contentBlockDelta" in one]
    inputs = "".join(one["toolUse"]["input"] for one in deltas if "toolUse" in one)
    if arguments == BAD:
        assert uses == [] and BAD not in inputs
        assert got["stopReason"] == "guardrail_intervened"
    else:
        assert [(one["name"], one["input"]) for one in uses] == [("look", {"of": arguments})]
        assert inputs == arguments


@every_way
async def test_request_that_cannot_be_read_is_a_client_error(way: str) -> None:
    backend = spoken(SPEECH, text="Mild.")
    with pytest.raises(ClientError) as raised:
        await asked(way, backend, lambda own: own.converse(**said("Hi"), promptVariables={}))
    assert raised.value.response["Error"]["Code"] == "ValidationException"
    assert backend.bodies == []
