"""OpenAI's text completions: what requests and replies say, and how streams are cut and end."""

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
from guard_middleware.formats import FORMATS
from guard_middleware.formats.contract import Asked, Event, Refusal, Unreadable
from guard_middleware.formats.openai_text import OpenAIText
from guard_middleware.metrics import Metrics
from guard_middleware.routes import Rule, routes
from guard_middleware.strict_json import parse
from guard_middleware.testing import FakeGuard, forbids
from tests.middleware.asgi_calls import EVENTS, Backend, call, each, listening, sse
from tests.middleware.formats.openai_text_speech import HEAD, PATH, chunk, chunks, reply
from tests.middleware.wrapped import BAD, SAFE, fits

REFUSAL = Refusal("No.", "7", 1_700_000_000)


def asking(**body: Any) -> Asked:
    """How a request is read."""
    return OpenAIText().read_request(PATH, {"model": "llama", **body})


def said(asked: Asked) -> list[list[tuple[str, list[str]]]]:
    """Role and texts of each turn of each prompt."""
    return [
        [(turn.role, [part["text"] for part in _parts(turn.content["content"])]) for turn in prompt]
        for prompt in asked.prompts
    ]


def _parts(content: Any) -> Any:
    return [{"text": content}] if isinstance(content, str) else content


def pieces_of(body: Any) -> list[tuple[int, str, str]]:
    """Choices, channels and texts of a whole reply."""
    found = OpenAIText().read_reply(asking(prompt="Hi"), body)
    return [(piece.channel.choice, piece.channel.name, piece.text) for piece in found]


def logprobs(tokens: list[str], *ranked: dict[str, float] | None) -> dict[str, Any]:
    numbers = {"token_logprobs": [-0.5] * len(tokens), "text_offset": [0] * len(tokens)}
    return {"tokens": tokens, "top_logprobs": [*ranked], **numbers}


def wrapped(backend: Backend, guard: FakeGuard | None = None) -> GuardMiddleware:
    guard = guard or FakeGuard(forbids(BAD))
    return GuardMiddleware(backend, guard, metrics=Metrics(CollectorRegistry()), refusal="No.")


# Requests.


@pytest.mark.parametrize(
    ("prompt", "texts", "unread"),
    [
        ("Hi", ["Hi"], ()),
        (["Hi"], ["Hi"], ()),
        (["Hi", "Ho"], ["Hi", "Ho"], ()),
        (None, [""], ()),
        ([1, 2, 3], [""], ("prompt",)),
        ([[1, 2], [3]], ["", ""], ("prompt[0]", "prompt[1]")),
        (["Hi", [3]], ["Hi", ""], ("prompt[1]",)),
    ],
)
def test_each_prompt_is_a_conversation(
    prompt: Any, texts: list[str], unread: tuple[str, ...]
) -> None:
    asked = asking(prompt=prompt)
    assert said(asked) == [[("user", [text])] for text in texts]
    assert asked.unread == unread


def test_choices_belong_to_their_prompts() -> None:
    asked = asking(prompt=["Hi", "Ho"], n=2, best_of=4)
    owners = [asked.prompt_of(choice)[0].content["content"][0]["text"] for choice in range(4)]
    assert owners == ["Hi", "Hi", "Ho", "Ho"]


def test_suffix_is_judged_with_every_prompt() -> None:
    asked = asking(prompt=["def f(", "def g("], suffix="return")
    assert said(asked) == [[("user", ["def f(", "return"])], [("user", ["def g(", "return"])]]


@pytest.mark.parametrize(
    "more",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"description": BAD + "!"}}},
        {"guided_regex": BAD + "!"},
        {"unheard_of": [BAD + "!"]},
        {"service_tier": BAD + "!"},
    ],
)
def test_whatever_else_a_request_says_is_judged(more: dict[str, Any]) -> None:
    for prompt in said(asking(prompt=["Hi", "Ho"], **more)):
        assert [role for role, _ in prompt] == ["system", "user"] and BAD in prompt[0][1][0]


def test_what_only_steers_is_not_judged() -> None:
    steers = {
        "max_tokens": 5,
        "logprobs": 3,
        "echo": True,
        "stop": ["\n", "two words"],
        "logit_bias": {"50256": -100},
        "stream_options": {"include_usage": True},
        "user": "Jane Doe",
    }
    assert said(asking(prompt="Hi", **steers)) == [[("user", ["Hi"])]]


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": []},
        {"prompt": [[]], "n": 0.5},
        {"prompt": {"prompt_string": "Hi"}},
        {"prompt": ["Hi", 1]},
        {"prompt": [True]},
        {"prompt": [["Hi"]]},
        {"prompt": [None]},
        {"prompt": 1},
        {"prompt": "Hi", "suffix": ["x"]},
        {"prompt": "Hi", "Suffix": "x"},
        {"PROMPT": "Hi"},
        {"prompt": "Hi", "stream": "yes"},
        {"prompt": "Hi", "n": 129},
        {"prompt": ["Hi"] * 9, "n": 128},
        {"prompt": ["Hi"] * 6, "suffix": "x" * 2**20},
        {"prompt": ["Hi"] * 6, "unheard_of": "x" * 2**20},
        {"prompt": "Hi", "model": 1},
        {"prompt": "Hi", "prompt_embeds": "AAAA"},
        {"prompt": "Hi", "chat_template": "x"},
        {"prompt": "Hi", "image_data": ["AAAA"]},
        ["Hi"],
    ],
)
def test_request_that_cannot_be_judged_is_unreadable(body: Any) -> None:
    with pytest.raises(Unreadable):
        OpenAIText().read_request(PATH, body)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/v1/completions", "openai-text"),
        ("//V1/completions/", "openai-text"),
        ("/inference/v1/completions", "openai-text"),
        ("/openai/deployments/llama/completions", "openai-text"),
        ("/v1/engines/llama/completions", "openai-text"),
        ("/v1/chat/completions", "openai-chat"),
        ("/openai/deployments/llama/chat/completions", "openai-chat"),
    ],
)
def test_paths_of_chats_and_of_texts_are_told_apart(path: str, name: str) -> None:
    found = routes(FORMATS, ("/v1",), (), "refuse").find("POST", path)
    assert not isinstance(found, Rule) and found.name == name


# Replies.


def test_every_text_of_every_choice_is_a_piece() -> None:
    body = {**reply("Mild.", "Hot."), "remark": "r"}
    body["choices"][1] |= {"reasoning_content": "It is June.", "stop_reason": "two words"}
    assert pieces_of(body) == [
        (0, ".remark", "r"),
        (0, "choice.text", "Mild."),
        (1, "choice.text", "Hot."),
        (1, "choice.reasoning_content", "It is June."),
        (1, "choice.stop_reason", "two words"),
    ]


def test_alternatives_are_read_by_rank_and_chosen_tokens_only_if_they_differ() -> None:
    ranked = ({" it": -0.1, BAD: -2.0}, None, {" is": -0.1, " was": -3.0})
    same = pieces_of(reply(" it is", logprobs=logprobs([" it", " is"], *ranked)))
    assert same[1:] == [
        (0, "logprobs.top[0]", " it"),
        (0, "logprobs.top[1]", BAD),
        (0, "logprobs.top[0]", " is"),
        (0, "logprobs.top[1]", " was"),
    ]
    other = pieces_of(reply("it was", logprobs=logprobs([" it", BAD])))
    assert other[1:] == [(0, "logprobs.tokens", " it"), (0, "logprobs.tokens", BAD)]


def test_prose_in_place_of_numbers_is_judged() -> None:
    ranked: Any = {"it": f"a {BAD}"}
    odd = {**logprobs(["it"], ranked), "text_offset": [f"an {BAD}"], "more": BAD}
    found = [name for _, name, text in pieces_of(reply("it", logprobs=odd)) if BAD in text]
    assert found == ["logprobs.top[0].chance", "logprobs.text_offset[0]", "logprobs.more"]


def test_log_probabilities_of_a_chat_are_read_too() -> None:
    entry = {"token": "it", "logprob": -0.1, "top_logprobs": [{"token": BAD, "logprob": -1.0}]}
    found = pieces_of(reply("it", logprobs={"content": [entry], "tokens": [BAD]}))
    names = [name for _, name, text in found if text == BAD]
    assert names == ["logprobs.content.top[0]", "logprobs.tokens[0]"]


@pytest.mark.parametrize(
    "body",
    [
        [],
        {**HEAD, "choices": "x"},
        {**HEAD, "choices": ["x"]},
        reply("x", index=-1),
        reply("x", index="0"),
        reply("x", text=["x"]),
        reply("x", logprobs="x"),
        reply("x", logprobs={"tokens": "x"}),
        reply("x", logprobs={"tokens": [1]}),
        reply("x", logprobs={"top_logprobs": ["x"]}),
        reply("x", logprobs=logprobs(["x"], {str(rank): -1.0 for rank in range(33)})),
        reply("x", audio="data:audio/wav;base64,AAAA"),
        reply("x", "", token_ids=[1]),
    ],
)
def test_reply_that_cannot_be_judged_is_unreadable(body: Any) -> None:
    with pytest.raises(Unreadable):
        pieces_of(body)


def test_alternatives_may_differ_in_case_only() -> None:
    ranked = {" It": -0.1, " it": -0.2}
    found = pieces_of(parse(json.dumps(reply("It", logprobs=logprobs([" It"], ranked))).encode()))
    assert (0, "logprobs.top[1]", " it") in found


# Streams.


def test_token_ids_leave_with_their_text_only() -> None:
    bare, told = chunk("", token_ids=[7]), chunk("Hi", token_ids=[8])
    reader = OpenAIText().open_stream(asking(prompt="Hi"), EVENTS)
    first, second = reader.feed(sse(bare, told, done=False))
    assert json.loads(first.raw[6:]) == chunk("", token_ids=None)
    assert second.raw == sse(told, done=False)


def events_of(parts: list[bytes]) -> list[Event]:
    stream = OpenAIText().open_stream(asking(prompt="Hi", stream=True), EVENTS)
    fed = [event for part in parts for event in stream.feed(part)]
    return [*fed, *stream.finish()]


@given(
    st.text(max_size=40),
    st.lists(st.integers(0, 4000), max_size=20),
    st.sampled_from(["\n\n", "\r\n\r\n"]),
)
@settings(max_examples=40, deadline=None)
def test_events_are_the_same_whatever_the_cuts(text: str, cuts: list[int], end: str) -> None:
    whole = sse(*chunks(text, 3), end=end)
    places = [0, *sorted(cut % (len(whole) + 1) for cut in cuts), len(whole)]
    events = events_of([whole[a:b] for a, b in zip(places, places[1:], strict=False)])
    assert events == events_of([whole])
    assert b"".join(event.raw for event in events) == whole
    assert "".join(piece.text for event in events for piece in event.pieces) == text
    assert [event.ended for event in events][-2:] == [(0,), ()]


async def streamed(parts: list[bytes], **request: Any) -> list[Any]:
    """The events that a client gets; the stream ends well-formed."""
    body = {"model": "llama", "prompt": "Hi", "stream": True, **request}
    got = await call(wrapped(Backend(parts, EVENTS)), PATH, body)
    assert got.ended and got.body.endswith(b"data: [DONE]\n\n")
    return got.events


async def test_allowed_stream_passes_byte_for_byte() -> None:
    sent = sse(*chunks(SAFE))
    body = {"model": "llama", "prompt": "Hi", "stream": True}
    got = await call(wrapped(Backend([sent], EVENTS)), PATH, body)
    assert got.ended and got.body == sent


async def test_blocked_stream_ends_with_content_filter() -> None:
    *heard, last = await streamed(each(chunks(SAFE + BAD + SAFE)))
    text = "".join(event["choices"][0]["text"] for event in heard)
    assert text and fits(text, SAFE + BAD + SAFE)
    assert last == {**HEAD, "choices": [_filtered(0, "")]}


async def test_stream_that_is_blocked_at_once_says_no_for_every_choice() -> None:
    got = await streamed(each(chunks(BAD)), prompt=["Hi", "Ho"], n=2)
    assert [event["choices"][0] for event in got] == [_filtered(i, "No.") for i in range(4)]
    assert got[0]["id"].startswith("cmpl-") and got[0]["object"] == "text_completion"


async def test_only_open_choices_are_ended() -> None:
    parts = each([*chunks(SAFE, 20, 0), *chunks(SAFE, 20, 1)[:-1], chunk(BAD, 1)])
    got = await streamed(parts, n=3)
    ends = [one for event in got for one in event["choices"] if one["finish_reason"]]
    reasons = [(one["index"], one["finish_reason"], one["text"]) for one in ends]
    assert reasons == [(0, "stop", ""), (1, "content_filter", ""), (2, "content_filter", "No.")]


async def test_alternatives_are_held_back_in_streams() -> None:
    events = [chunk(word, logprobs=logprobs([word], {word: -0.1})) for word in SAFE.split()]
    events[-1]["choices"][0]["logprobs"]["top_logprobs"][0][BAD] = -3.0
    got = await streamed(each(events))
    assert BAD not in json.dumps(got) and got[-1]["choices"][0]["finish_reason"] == "content_filter"
    assert len(got) > 1


async def test_broken_stream_ends_with_an_error() -> None:
    parts = each(chunks(SAFE))[:-2]
    body = {"model": "llama", "prompt": "Hi", "stream": True}
    got = await call(wrapped(Backend(parts, EVENTS, breaks=True)), PATH, body)
    assert got.ended and "error" in got.events[-1]


def test_nothing_follows_a_stream_that_was_over() -> None:
    stream = OpenAIText().open_stream(asking(prompt="Hi", stream=True), EVENTS)
    for event in stream.feed(sse(*chunks("Mild."))):
        stream.released(event)
    assert (stream.refuse(REFUSAL), stream.abort()) == (b"", b"")


def _filtered(index: int, text: str) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": "content_filter"}


# The whole road, and the real client.


@pytest.mark.parametrize("prompt", [["Hi", f"Make a {BAD}"], [[1, 2], [3]], [1, 2]])
async def test_one_prompt_that_is_blocked_or_unread_blocks_all(prompt: Any) -> None:
    backend = Backend([b"{}"])
    got = await call(wrapped(backend), PATH, {"model": "llama", "prompt": prompt})
    count = 2 if isinstance(prompt[0], list | str) else 1
    assert got.json["choices"] == [_filtered(i, "No.") for i in range(count)]
    assert backend.bodies == []


async def test_each_reply_is_judged_with_its_own_prompt() -> None:
    guard = FakeGuard(forbids(BAD))
    backend = Backend([json.dumps(reply("one", "two")).encode()])
    await call(wrapped(backend, guard), PATH, {"model": "llama", "prompt": ["Hi", "Ho"]})
    pairs = [
        [message.parts[0].text for message in one.messages]
        for one in guard.asked
        if len(one.messages) == 2
    ]
    assert pairs == [["Hi", "one"], ["Ho", "two"]]


async def test_one_choice_that_is_blocked_blocks_all() -> None:
    backend = Backend([json.dumps(reply("one", BAD)).encode()])
    got = await call(wrapped(backend), PATH, {"model": "llama", "prompt": "Hi", "n": 2})
    assert got.json["choices"] == [_filtered(0, "No."), _filtered(1, "No.")]


@asynccontextmanager
async def client_of(backend: Backend) -> AsyncIterator[openai.AsyncOpenAI]:
    async with listening(wrapped(backend)) as address:
        client = openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0)
        async with client:
            yield client


async def test_openai_client_gets_whole_completions() -> None:
    found = logprobs(["Hi", " Lisbon"], None, {" Lisbon": -0.1, " Porto": -2.0})
    backend = Backend([json.dumps(reply("Hi Lisbon", logprobs=found)).encode()])
    async with client_of(backend) as client:
        got = await client.completions.create(
            model="llama", prompt=["Hi"], echo=True, suffix="!", logprobs=2, best_of=2
        )
        refused = await client.completions.create(model="llama", prompt=f"Make a {BAD}")
        with pytest.raises(openai.BadRequestError, match="prompt is empty"):
            await client.completions.create(model="llama", prompt=[])
    assert got.choices[0].text == "Hi Lisbon" and got.choices[0].logprobs
    assert got.choices[0].logprobs.tokens == ["Hi", " Lisbon"]
    assert backend.asked["echo"] and backend.asked["suffix"] == "!"
    assert (refused.choices[0].text, refused.choices[0].finish_reason) == ("No.", "content_filter")


async def test_openai_client_gets_streamed_completions() -> None:
    async with client_of(Backend(each(chunks(SAFE)), EVENTS)) as client:
        stream = await client.completions.create(model="llama", prompt="Hi", stream=True)
        events = [event async for event in stream]
    assert "".join(event.choices[0].text for event in events) == SAFE
    async with client_of(Backend(each(chunks(SAFE + BAD)), EVENTS)) as client:
        stream = await client.completions.create(model="llama", prompt="Hi", stream=True)
        events = [event async for event in stream]
    text = "".join(event.choices[0].text for event in events)
    assert text and fits(text, SAFE + BAD)
    assert events[-1].choices[0].finish_reason == "content_filter"


async def test_openai_client_raises_when_a_stream_breaks_off() -> None:
    backend = Backend(each(chunks(SAFE))[:-2], EVENTS, breaks=True)
    async with client_of(backend) as client:
        stream = await client.completions.create(model="llama", prompt="Hi", stream=True)
        with pytest.raises(openai.APIError, match="broke off"):
            _ = [event async for event in stream]
