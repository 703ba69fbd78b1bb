"""OpenAI's streamed Responses: cut anywhere, repeated texts, well-formed ends, the real client."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from guard_middleware import GuardMiddleware
from guard_middleware.formats.contract import Asked, Event, Refusal, ReplyStream, Unreadable
from guard_middleware.formats.openai_responses import OpenAIResponses
from guard_middleware.metrics import Metrics
from guard_middleware.testing import FakeGuard, forbids
from tests.middleware.asgi_calls import EVENTS, Backend, call, listening
from tests.middleware.formats.openai_responses_replies import (
    PATH,
    asking,
    at,
    message,
    numbered,
    opening,
    output_text,
    response,
    stream,
)
from tests.middleware.formats.openai_responses_replies import call as function_call
from tests.middleware.wrapped import BAD, SAFE, fits

REFUSAL = Refusal("No.", "7", 1_700_000_000)
METRICS = Metrics(CollectorRegistry())
ASKED = OpenAIResponses().read_request(PATH, asking(stream=True))


def opened(asked: Asked = ASKED) -> ReplyStream:
    return OpenAIResponses().open_stream(asked, EVENTS)


def texts(events: list[dict[str, Any]], asked: Asked = ASKED) -> list[list[tuple[str, str]]]:
    """Channels and texts of each event."""
    read = opened(asked).feed(b"".join(numbered(events)))
    return [[(piece.channel.name, piece.text) for piece in event.pieces] for event in read]


def cut(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What ends a stream of which the client has seen these events."""
    reader = opened()
    for event in reader.feed(b"".join(numbered(events))):
        reader.released(event)
    return decoded(reader.refuse(REFUSAL))


def decoded(body: bytes) -> list[dict[str, Any]]:
    blocks = body.split(b"\n\n")
    assert blocks.pop() == b""
    return [json.loads(block.partition(b"\ndata: ")[2]) for block in blocks]


@given(st.lists(st.integers(0, 10_000), max_size=8))
@settings(max_examples=50, deadline=None)
def test_events_are_the_same_however_the_bytes_are_cut(cuts: list[int]) -> None:
    whole = b"".join(numbered(stream("Grüße, 🌍! " * 3)))
    places = [0, *sorted(min(one, len(whole)) for one in cuts), len(whole)]
    reader = opened()
    events: list[Event] = []
    for a, b in zip(places, places[1:], strict=False):
        events += reader.feed(whole[a:b])
    events += reader.finish()
    assert b"".join(event.raw for event in events) == whole
    assert events == opened().feed(whole)


def test_what_repeats_the_whole_text_is_judged_only_where_it_says_something_else() -> None:
    said = texts(stream("Hello there."))
    assert [piece for pieces in said for piece in pieces] == [
        ("output[0].content[0].text", one) for one in ("Hell", "o th", "ere.")
    ]
    other = texts([*stream("Hello")[:-1], at("output_text.done", text="Bye"), *stream("Bye")[-3:]])
    assert other[-4:] == [[("output[0].content[0].text#1", "Bye")], [], [], []]


def test_texts_that_come_with_an_item_begin_its_channels() -> None:
    added = {"type": "response.output_item.added", "output_index": 2, "item": function_call("")}
    grown = {"type": "response.function_call_arguments.delta", "output_index": 2, "delta": "{}"}
    done = {"type": "response.function_call_arguments.done", "output_index": 2, "arguments": "{}"}
    finished = {"type": "response.output_item.done", "output_index": 2, "item": function_call("{}")}
    assert texts([added, grown, done, finished]) == [
        [("output[2].name", "get_weather")],
        [("output[2].arguments", "{}")],
        [],
        [],
    ]


def test_items_are_told_apart_by_their_ids_where_backends_do_not_number_them() -> None:
    def said(item: str, delta: str) -> dict[str, Any]:
        return {"type": "response.output_text.delta", "item_id": item, "delta": delta}

    end = response(message(output_text("ac")), message(output_text("b")))
    last = {"type": "response.completed", "response": end}
    assert texts([said("m1", "a"), said("m2", "b"), said("m1", "c"), last]) == [
        [("output[0].content[0].text", "a")],
        [("output[1].content[0].text", "b")],
        [("output[0].content[0].text", "c")],
        [],
    ]


def test_texts_of_unknown_events_grow_together() -> None:
    events = [{"type": "response.thought.done", "thought": one} for one in (BAD[:4], BAD[4:])]
    said: dict[str, str] = {}
    for name, text in (piece for pieces in texts(events) for piece in pieces):
        said[name] = said.get(name, "") + text
    assert BAD in said.values()


def test_alternatives_and_annotations_are_channels_of_their_own() -> None:
    entry = {"token": "a", "logprob": -1, "top_logprobs": [{"token": "b", "logprob": -2}]}
    note = at("output_text.annotation.added", annotation={"type": "x", "title": "a b"})
    read = texts([at("output_text.delta", delta="a", logprobs=[entry]), note])
    path = "output[0].content[0]"
    assert read[0] == [(f"{path}.text", "a"), (f"{path}.logprobs.content.top[0]", "b")]
    assert "a b" in [text for _, text in read[1]]


def test_the_echo_of_a_request_does_not_wait_for_a_verdict() -> None:
    asked = OpenAIResponses().read_request(PATH, asking(stream=True, instructions="Be brief."))
    begun = response(status="in_progress", instructions="Be brief.")
    assert texts([{"type": "response.created", "response": begun}], asked) == [[]]
    assert texts([{"type": "response.created", "response": begun}]) != [[]]


@pytest.mark.parametrize(
    "event",
    [
        {"type": "response.audio.delta", "delta": "AAAA"},
        {"type": "response.image_generation_call.partial_image", "partial_image_b64": "AAAA"},
        {"type": "response.output_text.delta", "delta": {"text": "x"}},
        {"type": "response.output_text.delta", "output_index": -1, "delta": "x"},
        {"type": "response.output_item.done", "item": 7},
        {"type": "response.completed"},
        {"type": 7},
        {"type": "response.created", "response": {"output": 7}},
    ],
)
def test_events_that_cannot_be_judged_are_unreadable(event: dict[str, Any]) -> None:
    with pytest.raises(Unreadable):
        texts([event])


def test_more_text_than_the_last_event_could_repeat_is_unreadable() -> None:
    reader = opened()
    (chunk,) = numbered([at("output_text.delta", delta="x" * 2**20)])
    with pytest.raises(Unreadable, match="characters"):
        for _ in range(5):
            reader.feed(chunk)


def test_a_stream_cut_before_anything_was_seen_says_the_refusal_from_the_beginning() -> None:
    events = cut([])
    assert [event["type"] for event in events] == [
        "response.created",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert [event["sequence_number"] for event in events] == list(range(8))
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == "No."


def test_a_stream_cut_before_its_first_text_says_the_refusal_in_the_open_part() -> None:
    events = cut(opening())
    assert [event["type"] for event in events] == [
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert events[0]["delta"] == "No." and events[0]["sequence_number"] == len(opening())


def test_a_stream_cut_in_the_middle_repeats_what_was_seen_and_no_more() -> None:
    reader = opened()
    read = reader.feed(b"".join(numbered(stream("Hello there."))))
    for event in read[:6]:
        reader.released(event)
    events = decoded(reader.refuse(REFUSAL))
    assert [event["type"] for event in events[:-1]] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
    ]
    end = events[-1]["response"]
    assert end["id"] == "resp_7" and end["incomplete_details"] == {"reason": "content_filter"}
    assert end["output"] == [message(output_text("Hello th"), status="incomplete")]


def test_a_call_that_was_open_is_not_finished() -> None:
    added = {"type": "response.output_item.added", "output_index": 0, "item": function_call("")}
    grown = {"type": "response.function_call_arguments.delta", "output_index": 0, "delta": "{}"}
    (end,) = cut([added, grown])[1:]
    assert end["type"] == "response.incomplete" and end["response"]["output"] == []


def test_thoughts_that_were_open_are_closed_as_incomplete() -> None:
    item = {"id": "rs_1", "type": "reasoning", "summary": []}
    place = {"item_id": "rs_1", "output_index": 0, "summary_index": 0}
    added = {"type": "response.output_item.added", "output_index": 0, "item": item}
    grown = {"type": "response.reasoning_summary_text.delta", **place, "delta": "Hm"}
    end = cut([*opening()[:1], added, grown])[-1]["response"]
    parts = [{"type": "summary_text", "text": "Hm"}]
    assert end["output"] == [{**item, "summary": parts, "status": "incomplete"}]


@pytest.mark.parametrize("ending", ["completed", "incomplete", "failed"])
def test_nothing_follows_a_stream_that_was_over(ending: str) -> None:
    last = {"type": f"response.{ending}", "response": response(status=ending)}
    assert cut([*stream("Hi")[:-1], last]) == []


def test_a_stream_that_broke_off_has_failed() -> None:
    reader = opened()
    (error,) = decoded(reader.abort())
    assert error["type"] == "error" and error["code"] == "server_error"
    for event in reader.feed(b"".join(numbered(stream("Hi")[:-1]))):
        reader.released(event)
    (failed,) = decoded(reader.abort())
    assert failed["type"] == "response.failed" and failed["response"]["status"] == "failed"
    assert failed["response"]["output"] == [message(output_text("Hi"))]


@asynccontextmanager
async def client_of(backend: Backend) -> AsyncIterator[openai.AsyncOpenAI]:
    app = GuardMiddleware(backend, FakeGuard(forbids(BAD)), metrics=METRICS, refusal="No.")
    async with listening(app) as address:
        base = f"{address}/v1"
        async with openai.AsyncOpenAI(base_url=base, api_key="x", max_retries=0) as client:
            yield client


async def test_openai_client_gets_whole_responses_and_refusals() -> None:
    backend = Backend([json.dumps(response(message(output_text("Hello.")))).encode()])
    async with client_of(backend) as client:
        got = await client.responses.create(model="llama", input="Hi")
        refused = await client.responses.create(model="llama", input=BAD)
        with pytest.raises(openai.PermissionDeniedError):
            await client.responses.retrieve("resp_7")
        with pytest.raises(openai.BadRequestError, match="previous_response_id"):
            await client.responses.create(model="llama", input="x", previous_response_id="resp_7")
    assert got.output_text == "Hello." and got.status == "completed"
    assert refused.output_text == "No." and refused.status == "incomplete"
    assert refused.incomplete_details and refused.incomplete_details.reason == "content_filter"
    assert len(backend.bodies) == 1


async def test_openai_client_gets_the_stream_byte_for_byte() -> None:
    chunks = numbered(stream(SAFE))
    app = GuardMiddleware(Backend(chunks, EVENTS), FakeGuard(), metrics=METRICS)
    got = await call(app, PATH, asking(stream=True))
    assert got.body == b"".join(chunks)
    async with (
        client_of(Backend(chunks, EVENTS)) as client,
        client.responses.stream(model="llama", input="Hi") as events,
    ):
        final = await events.get_final_response()
    assert final.output_text == SAFE


@pytest.mark.parametrize("said", [SAFE + BAD, BAD])
async def test_openai_client_sees_a_cut_stream_end_as_incomplete(said: str) -> None:
    async with (
        client_of(Backend(numbered(stream(said)), EVENTS)) as client,
        client.responses.stream(model="llama", input="Hi") as manager,
    ):
        events = [event async for event in manager]
    text = "".join(one.delta for one in events if one.type == "response.output_text.delta")
    assert fits(text, said, "No.")
    last = events[-1]
    assert last.type == "response.incomplete"
    assert last.response.output_text == text
    assert last.response.incomplete_details
    assert last.response.incomplete_details.reason == "content_filter"
