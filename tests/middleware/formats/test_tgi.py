"""TGI's own protocol: requests, whole replies, streams, and the real client."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from huggingface_hub import AsyncInferenceClient
from huggingface_hub.errors import GenerationError, ValidationError
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from guard_middleware import GuardMiddleware
from guard_middleware.formats.contract import Asked, Event, Refusal, Unreadable
from guard_middleware.formats.tgi import Tgi
from guard_middleware.metrics import Metrics
from guard_middleware.testing import FakeGuard, forbids
from tests.middleware.asgi_calls import EVENTS, Backend, call, listening
from tests.middleware.formats.tgi_speech import (
    DETAILS,
    STREAM,
    WHOLE,
    asking,
    chunks,
    last,
    step,
    steps,
    streamed_events,
    token,
)
from tests.middleware.wrapped import BAD, SAFE, fits

PNG = "data:image/png;base64,iVBORw0KGgo="
REFUSAL = Refusal("No.", "7", 1_700_000_000)
METRICS = Metrics(CollectorRegistry())


def read(said: str = "Hi", path: str = WHOLE, **parameters: Any) -> Asked:
    return Tgi().read_request(path, asking(said, **parameters))


def pieces(body: Any, asked: Asked | None = None) -> dict[str, str]:
    found = Tgi().read_reply(asked or read(), body)
    assert len({piece.channel for piece in found}) == len(found)
    return {piece.channel.name: piece.text for piece in found}


def texts(events: list[dict[str, Any]], asked: Asked | None = None) -> list[list[tuple[str, str]]]:
    reader = Tgi().open_stream(asked or read(), EVENTS)
    found = reader.feed(b"".join(chunks(events)))
    return [[(piece.channel.name, piece.text) for piece in event.pieces] for event in found]


def test_the_prompt_is_a_turn_of_the_user() -> None:
    ((turn,),) = read("Hi", temperature=0.5, stop=["###"], seed=7, best_of=None).prompts
    assert turn.content == {"role": "user", "content": [{"type": "text", "text": "Hi"}]}


@pytest.mark.parametrize(
    ("path", "stream", "streams"),
    [(WHOLE, None, False), (STREAM, None, True), ("/", True, True), ("/", False, False)],
)
def test_what_streams_is_told_by_path_and_body(path: str, stream: Any, streams: bool) -> None:
    assert Tgi().read_request(path, {**asking(), "stream": stream}).streams == streams


def test_images_are_read_out_of_the_prompt() -> None:
    ((turn,),) = read(f"![]({PNG})What is this?![]({PNG})").prompts
    assert [part["type"] for part in turn.content["content"]] == ["image_url", "text", "image_url"]


def test_images_behind_addresses_are_named_and_stay_in_the_text() -> None:
    asked = read("![](https://example.com/cat.png)What is this?")
    assert asked.unread == ("inputs",)
    (part,) = asked.prompts[0][0].content["content"]
    assert part["text"].startswith("![](https")


def test_a_prompt_that_the_backend_cuts_is_named() -> None:
    assert read(truncate=5).unread == ("parameters.truncate",)


def test_grammars_and_unknown_parameters_are_judged() -> None:
    grammar = {"type": "regex", "value": "very (bad|good)"}
    body = {**asking(grammar=grammar, mood="rather gloomy"), "options": {"mood": "quite merry"}}
    *extra, _ = Tgi().read_request(WHOLE, body).prompts[0]
    said = "".join(str(turn.content["content"]) for turn in extra)
    assert all(one in said for one in ("very (bad|good)", "rather gloomy", "quite merry"))
    assert {turn.role for turn in extra} == {"system"}


@pytest.mark.parametrize(
    "body",
    [
        [],
        {},
        {"inputs": ""},
        {"inputs": ["Hi"]},
        {"inputs": {"text": "Hi"}},
        {"Inputs": "Hi", "inputs": "Hi"},
        {"inputs": "Hi", "messages": [{"role": "user"}]},
        {"inputs": "Hi", "input_ids": [1, 2]},
        {"inputs": "Hi", "parameters": [1]},
        {"inputs": "Hi", "parameters": {"Stop": ["x"]}},
        {"inputs": "Hi", "parameters": {"adapter_id": "x"}},
        {"inputs": "Hi", "stream": "yes"},
        {"inputs": "Hi", "model": "a model that says things"},
    ],
)
def test_what_is_no_request_is_unreadable(body: Any) -> None:
    with pytest.raises(Unreadable):
        Tgi().read_request(WHOLE, body)


def test_details_that_repeat_the_text_are_not_judged_again() -> None:
    tokens = [token("He"), token("llo"), token("<|eot_id|>", special=True)]
    prefill = [{"id": 1, "text": "<|begin_of_text|>"}, {"id": 2, "text": "Hi"}]
    details = {**DETAILS, "tokens": tokens, "prefill": prefill}
    assert pieces({"generated_text": "Hello", "details": details}) == {"content": "Hello"}
    assert pieces([{"generated_text": "HiHello", "details": details}]) == {"content": "HiHello"}


def test_details_that_say_something_else_are_channels_of_their_own() -> None:
    tokens = [token("Bye"), token("not a name", special=True)]
    other = {"generated_text": "Ho", "tokens": [token("Hm")], "prefill": [], **DETAILS}
    details = {
        "tokens": tokens,
        "prefill": [token("What?")],
        "top_tokens": [[token("a"), token("b")]],
        "best_of_sequences": [other],
        "finish_reason": "because it was told to",
    }
    assert pieces({"generated_text": "Hello", "details": details, "mood": "m m"}) == {
        "content": "Hello",
        "tokens": "Byenot a name",
        "prefill": "What?",
        "top[0]": "a",
        "top[1]": "b",
        "best_of[0].content": "Ho",
        "best_of[0].tokens": "Hm",
        "details.finish_reason": "because it was told to",
        ".mood": "m m",
    }


@pytest.mark.parametrize(
    "body",
    [
        7,
        [7],
        {"generated_text": 7},
        {"generated_text": "x", "details": 7},
        {"generated_text": "x", "details": {"tokens": [{"text": 7}]}},
        {"generated_text": "x", "details": {"top_tokens": [[token("a")] * 40]}},
        {"generated_text": "x", "image": PNG},
    ],
)
def test_replies_of_another_shape_are_unreadable(body: Any) -> None:
    with pytest.raises(Unreadable):
        pieces(body)


def test_the_last_event_is_judged_only_where_it_says_something_else() -> None:
    said = [[("content", "Hell")], [("content", "o")]]
    assert texts(steps("Hello")) == [*said, []]
    assert texts([*steps("Hello")[:-1], last("HiHello")]) == [*said, []]
    assert texts([*steps("Hello")[:-1], last("Bye")]) == [*said, [("generated_text", "Bye")]]


def test_alternatives_and_what_is_not_known_are_channels_of_their_own() -> None:
    event = step("a", top_tokens=[token("b"), token("c")], mood="m m")
    assert texts([event]) == [
        [("content", "a"), ("top[0]", "b"), ("top[1]", "c"), (".mood", "m m")]
    ]


def test_special_tokens_with_prose_in_them_are_judged() -> None:
    event = step("", token=token("<|how to|>", special=True))
    assert texts([event]) == [[("content", "<|how to|>")]]


@given(st.lists(st.integers(0, 10_000), max_size=8))
@settings(max_examples=50, deadline=None)
def test_events_are_the_same_however_the_bytes_are_cut(cuts: list[int]) -> None:
    whole = b"".join(chunks(steps("Grüße, 🌍! " * 3)))
    places = [0, *sorted(min(one, len(whole)) for one in cuts), len(whole)]
    reader = Tgi().open_stream(read(), EVENTS)
    events: list[Event] = []
    for a, b in zip(places, places[1:], strict=False):
        events += reader.feed(whole[a:b])
    events += reader.finish()
    assert b"".join(event.raw for event in events) == whole
    assert events == Tgi().open_stream(read(), EVENTS).feed(whole)


@pytest.mark.parametrize("seen", [0, 1, 3])
def test_a_cut_stream_ends_with_what_was_seen(seen: int) -> None:
    reader = Tgi().open_stream(read(), EVENTS)
    for event in reader.feed(b"".join(chunks(steps("Hello, you."))))[:seen]:
        reader.released(event)
    ends = streamed_events(reader.refuse(REFUSAL) + reader.keep_alive())
    if seen == 0:
        assert ends[0]["token"]["text"] == ends[0]["generated_text"] == "No."
    else:
        assert ends[0]["token"]["text"] == ""
        assert ends[0]["generated_text"] == "Hello, you."[: seen * 4]
    assert ends[0]["details"]["finish_reason"] == "content_filter"


@pytest.mark.parametrize("end", [last("Hi"), {"error": "It broke.", "error_type": "generation"}])
def test_nothing_follows_a_stream_that_was_over(end: dict[str, Any]) -> None:
    reader = Tgi().open_stream(read(), EVENTS)
    for event in reader.feed(b"".join(chunks([step("Hi"), end]))):
        reader.released(event)
    assert reader.refuse(REFUSAL) == reader.abort() == b""


def test_more_text_than_the_last_event_could_repeat_is_unreadable() -> None:
    reader = Tgi().open_stream(read(), EVENTS)
    (chunk,) = chunks([step("x" * 2**20)])
    with pytest.raises(Unreadable, match="characters"):
        for _ in range(5):
            reader.feed(chunk)


@asynccontextmanager
async def client_of(backend: Backend) -> AsyncIterator[AsyncInferenceClient]:
    guard = FakeGuard(forbids(BAD))
    app = GuardMiddleware(backend, guard, metrics=METRICS, refusal="No.")
    async with listening(app) as address, AsyncInferenceClient(address) as client:
        yield client


async def test_huggingface_client_gets_whole_replies_and_refusals() -> None:
    details = {**DETAILS, "prefill": [], "tokens": [token("Hello.")]}
    backend = Backend([json.dumps([{"generated_text": "Hello.", "details": details}]).encode()])
    async with client_of(backend) as client:
        got = await client.text_generation("Hi", details=True)
        refused = await client.text_generation(BAD, details=True)
    assert got.generated_text == "Hello." and got.details
    assert refused.generated_text == "No." and refused.details
    assert str(refused.details.finish_reason) == "content_filter"
    assert len(backend.bodies) == 1


async def test_huggingface_client_gets_the_stream_byte_for_byte() -> None:
    backend = Backend(chunks(steps(SAFE)), EVENTS)
    got = await call(GuardMiddleware(backend, FakeGuard(), metrics=METRICS), STREAM, asking())
    assert got.body == b"".join(chunks(steps(SAFE)))
    async with client_of(backend) as client:
        stream = await client.text_generation("Hi", stream=True, details=True)
        events = [event async for event in stream]
    assert "".join(one.token.text for one in events if not one.token.special) == SAFE
    assert events[-1].generated_text == SAFE


@pytest.mark.parametrize("said", [SAFE + BAD, BAD])
async def test_huggingface_client_sees_a_cut_stream_end_as_filtered(said: str) -> None:
    async with client_of(Backend(chunks(steps(said)), EVENTS)) as client:
        stream = await client.text_generation("Hi", stream=True, details=True)
        events = [event async for event in stream]
    text = "".join(one.token.text for one in events if not one.token.special)
    assert text == events[-1].generated_text
    assert fits(text, said, "No.")
    assert events[-1].details and str(events[-1].details.finish_reason) == "content_filter"


async def test_huggingface_client_raises_for_a_stream_that_broke_off() -> None:
    backend = Backend(chunks(steps(SAFE)[:-1]), EVENTS, breaks=True)
    async with client_of(backend) as client:
        stream = await client.text_generation("Hi", stream=True)
        with pytest.raises(GenerationError):
            [token async for token in stream]


async def test_huggingface_client_raises_for_a_request_that_cannot_be_read() -> None:
    async with client_of(Backend([b"{}"])) as client:
        with pytest.raises(ValidationError):
            await client.text_generation("Hi", adapter_id="other")
