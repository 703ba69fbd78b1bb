"""Ollama's chat and completions: what requests and replies say, and how streams are cut and end."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import ollama
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from guard_middleware import GuardMiddleware
from guard_middleware.formats.contract import Asked, Event, Refusal, Unreadable
from guard_middleware.formats.ndjson import Lines
from guard_middleware.formats.ollama import OllamaChat, OllamaGenerate
from guard_middleware.metrics import Metrics
from guard_middleware.testing import FakeGuard, forbids
from guard_middleware.turns import read_turns
from tests.middleware.asgi_calls import Backend, Reply, call, listening
from tests.middleware.formats.ollama_speech import (
    CHAT,
    GENERATE,
    HEAD,
    LAST,
    NDJSON,
    chat_lines,
    generate_lines,
    ndjson,
)
from tests.middleware.wrapped import BAD, SAFE, fits

PIXEL = b"\x89PNG pixel"
IMAGE = base64.b64encode(PIXEL).decode()
REFUSAL = Refusal("No.", "7", 1_767_323_045)
WEATHER = {"name": "weather", "arguments": {"city": "Lisbon"}}


def chat(*messages: dict[str, Any], **more: Any) -> Asked:
    """How a chat request is read."""
    return OllamaChat().read_request(CHAT, {"model": "llama3.2", "messages": [*messages], **more})


def generate(**body: Any) -> Asked:
    """How a completion request is read."""
    return OllamaGenerate().read_request(GENERATE, {"model": "llama3.2", **body})


def said(asked: Asked) -> list[tuple[str, str]]:
    """Role and text of each turn."""
    return [(turn.role, text_of_parts(turn.content["content"])) for turn in asked.prompts[0]]


def text_of_parts(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part.get("text", "<image>") for part in content)


def pieces_of(body: dict[str, Any]) -> list[tuple[str, str]]:
    """Channels and texts of a whole reply to a chat."""
    found = OllamaChat().read_reply(chat(), body)
    return [(piece.channel.name, piece.text) for piece in found]


def answered(**message: Any) -> dict[str, Any]:
    return {**HEAD, "message": {"role": "assistant", "content": "", **message}, **LAST}


def wrapped(backend: Backend, guard: FakeGuard | None = None) -> GuardMiddleware:
    guard = guard or FakeGuard(forbids(BAD))
    return GuardMiddleware(backend, guard, metrics=Metrics(CollectorRegistry()), refusal="No.")


# Requests.


def test_chat_request_is_read_turn_by_turn() -> None:
    asked = chat(
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello", "thinking": "A greeting."},
    )
    expected = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello\nA greeting.")]
    assert said(asked) == expected
    assert [turn.place for turn in asked.prompts[0]] == [0, 1, 2]
    assert (asked.model, asked.choices, asked.unread) == ("llama3.2", 1, ())


@pytest.mark.parametrize(("given", "streams"), [({}, True), ({"stream": None}, True)])
@pytest.mark.parametrize("read", [chat, generate])
def test_stream_is_the_default(read: Any, given: dict[str, Any], streams: bool) -> None:
    assert read(**given).streams is streams
    assert read(stream=False).streams is False


def test_images_are_the_very_bytes() -> None:
    turn = chat({"role": "user", "content": "What?", "images": [IMAGE, IMAGE]}).prompts[0][0]
    image = {"type": "image", "data": PIXEL}
    assert turn.content["content"] == [{"type": "text", "text": "What?"}, image, image]
    alone = generate(prompt="", images=[IMAGE]).prompts[0][0]
    assert alone.content["content"] == [image]


@pytest.mark.parametrize(
    "image", ["", "?", IMAGE[:-1], IMAGE + "\n", "data:image/png;base64," + IMAGE, "AB==", None, 1]
)
def test_image_that_decoders_disagree_about_is_refused(image: object) -> None:
    with pytest.raises(Unreadable, match="images"):
        chat({"role": "user", "images": [image]})
    with pytest.raises(Unreadable, match="images"):
        generate(images=[image])


def test_tool_calls_and_results_are_read() -> None:
    asked = chat(
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": WEATHER}]},
        {"role": "tool", "content": "Mild.", "tool_name": "weather", "tool_call_id": "call_1"},
    )
    conversation = read_turns([turn.content for turn in asked.prompts[0]])
    part = conversation.messages[1].parts[0].tool_call
    assert (part.name, json.loads(part.arguments)) == ("weather", {"city": "Lisbon"})
    results = [one.tool_result for one in conversation.messages[2].parts]
    assert [(one.tool_call_id, one.text) for one in results] == [
        ("call_1", "Mild."),
        ("call_1", "weather"),
    ]


@pytest.mark.parametrize(
    "more",
    [
        {"tools": [{"type": "function", "function": {"description": BAD + "!"}}]},
        {"format": {"type": "object", "properties": {"a": {"description": BAD + "!"}}}},
        {"options": {"temperature": 0, "prefix": BAD + "!"}},
        {"unheard_of": BAD + "!"},
        {"think": BAD + "!"},
    ],
)
def test_whatever_else_a_request_says_is_judged(more: dict[str, Any]) -> None:
    for asked in (chat({"role": "user", "content": "Hi"}, **more), generate(prompt="Hi", **more)):
        (role, text), (user, _) = said(asked)
        assert (role, user) == ("system", "user") and BAD in text


def test_what_only_steers_is_not_judged() -> None:
    steers = {
        "options": {"temperature": 0.5, "num_ctx": 4096, "stop": ["\n", "two words"]},
        "keep_alive": "5m",
        "format": "json",
        "think": "high",
        "logprobs": True,
        "raw": False,
        "template": "",
        "context": [],
    }
    assert said(generate(prompt="Hi", **steers)) == [("user", "Hi")]
    assert said(chat({"role": "user", "content": "Hi"}, **steers)) == [("user", "Hi")]


def test_generate_request_is_read_with_its_suffix() -> None:
    asked = generate(system="Be brief.", prompt="def f(", suffix="return", images=[IMAGE])
    assert said(asked) == [("system", "Be brief."), ("user", "def f(\nreturn\n<image>")]
    assert asked.prompts[0][1].place is None


def test_request_that_only_loads_the_model_is_an_empty_turn() -> None:
    assert said(chat()) == said(generate(keep_alive=0)) == [("user", "")]
    assert read_turns([turn.content for turn in chat().prompts[0]]).messages[0].parts


def test_token_ids_of_an_earlier_conversation_cannot_be_read() -> None:
    assert generate(prompt="Hi", context=[1, 2]).unread == ("context",)


@pytest.mark.parametrize(
    "more", [{"template": "{{ .Prompt }}"}, {"raw": True}, {"Messages": []}, {"PROMPT": "x"}]
)
def test_what_changes_the_prompt_unseen_is_refused(more: dict[str, Any]) -> None:
    with pytest.raises(Unreadable):
        chat({"role": "user", "content": "Hi"}, **more)
    with pytest.raises(Unreadable):
        generate(prompt="Hi", **more)


@pytest.mark.parametrize(
    "message",
    [
        "Hi",
        {"content": "Hi"},
        {"role": "User", "content": "Hi"},
        {"role": ["user"], "content": "Hi"},
        {"role": "user", "content": ["Hi"]},
        {"role": "user", "Content": "Hi"},
        {"role": "user", "content": "Hi", "audio": "x"},
        {"role": "user", "images": IMAGE},
        {"role": "tool", "content": "x", "tool_call_id": "two words"},
        {"role": "assistant", "tool_calls": [{"function": {**WEATHER, "arguments": "{}"}}]},
        {"role": "assistant", "tool_calls": [{"function": {**WEATHER, "more": 1}}]},
        {"role": "assistant", "tool_calls": [{"function": WEATHER, "type": "two words"}]},
        {"role": "assistant", "tool_calls": [{}]},
    ],
)
def test_message_of_another_shape_is_unreadable(message: Any) -> None:
    with pytest.raises(Unreadable, match=r"messages\[0\]"):
        chat(message)


@pytest.mark.parametrize(
    "more",
    [
        {"stream": "no"},
        {"model": 1},
        {"prompt": ["x"]},
        {"system": 1},
        {"suffix": {}, "prompt": 1},
        {"context": "x"},
        {"options": [1]},
        {"options": {"stop": "x"}},
        {"options": {"stop": [1]}},
    ],
)
def test_request_of_another_shape_is_unreadable(more: dict[str, Any]) -> None:
    with pytest.raises(Unreadable):
        generate(**more)


def test_old_messages_are_left_out_by_place() -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": text} for text in "abc"]}
    left = OllamaChat().without(body, frozenset({0, 1}))
    assert left == {"model": "m", "messages": [{"role": "user", "content": "c"}]}
    assert len(body["messages"]) == 3
    assert OllamaGenerate().without({"prompt": "x"}, frozenset()) == {"prompt": "x"}


# Replies.


def test_every_text_of_a_reply_is_a_piece() -> None:
    body = answered(
        content="Mild.",
        thinking="Easy.",
        tool_calls=[{"id": "c1", "function": {**WEATHER, "index": 0, "note": "n"}, "why": "w"}],
        mood="calm",
    )
    assert dict(pieces_of({**body, "remark": "r"})) == {
        "message.content": "Mild.",
        "message.thinking": "Easy.",
        "message.mood": "calm",
        "tool_calls.name": "weather\n",
        "tool_calls.keys": "city\n\n",
        "tool_calls.arguments": "Lisbon\n",
        "tool_calls.function.note": "n",
        "tool_calls.why": "w",
        ".remark": "r",
    }


def test_known_keys_that_hold_prose_are_judged() -> None:
    body = {**answered(role=f"a {BAD}"), "done_reason": f"a {BAD}", "created_at": f"a {BAD}"}
    names = [name for name, text in pieces_of(body) if BAD in text]
    assert sorted(names) == [".created_at", ".done_reason", "message.role"]


def test_alternatives_are_judged_and_chosen_tokens_only_if_they_differ() -> None:
    ranks = [{"token": "Mild", "logprob": -0.1}, {"token": BAD, "logprob": -3.0}]
    logprobs = [{"token": "Mild", "logprob": -0.1, "top_logprobs": ranks}]
    same = dict(pieces_of({**answered(content="Mild"), "logprobs": logprobs}))
    assert same["logprobs.content.top[1]"] == BAD and "logprobs.content" not in same
    other = dict(pieces_of({**answered(content="Hot"), "logprobs": logprobs}))
    assert other["logprobs.content"] == "Mild"


@pytest.mark.parametrize(
    "body",
    [
        answered(images=[IMAGE]),
        {**answered(), "image": IMAGE},
        {**HEAD, "message": "Hi"},
        answered(tool_calls="x"),
        answered(tool_calls=["x"]),
        answered(tool_calls=[{"function": "x"}]),
        answered(tool_calls=[{"function": {"name": {}}}]),
        {**answered(), "logprobs": [{"token": 1}]},
        {**answered(), "logprobs": "x"},
        [],
    ],
)
def test_reply_that_cannot_be_judged_is_unreadable(body: Any) -> None:
    with pytest.raises(Unreadable):
        pieces_of(body)


# Streams.


def events_of(chunks: list[bytes]) -> list[Event]:
    stream = OllamaChat().open_stream(chat(), NDJSON)
    fed = [event for chunk in chunks for event in stream.feed(chunk)]
    return [*fed, *stream.finish()]


@given(st.text(max_size=40), st.lists(st.integers(0, 2000), max_size=20))
@settings(max_examples=40, deadline=None)
def test_events_are_the_same_whatever_the_cuts(text: str, cuts: list[int]) -> None:
    whole = ndjson(*chat_lines(text, 3))
    places = [0, *sorted(cut % (len(whole) + 1) for cut in cuts), len(whole)]
    events = events_of([whole[a:b] for a, b in zip(places, places[1:], strict=False)])
    assert events == events_of([whole])
    assert b"".join(event.raw for event in events) == whole
    assert "".join(piece.text for event in events for piece in event.pieces) == text
    assert [event.ended for event in events][-1] == (0,)


def test_empty_lines_are_dropped_and_a_last_newline_is_given() -> None:
    (event,) = events_of([b"\r\n \n", ndjson(answered(content="Hi")).rstrip(b"\n")])
    assert event.raw == ndjson(answered(content="Hi"))


@pytest.mark.parametrize(
    "line",
    [b'{"a":1}{"b":2}\n', b'{"a":1}\r{"b":2}\n', b"data: {}\n", b"[]\n", b'{"a":1,"a":2}\n'],
)
def test_line_that_readers_disagree_about_is_unreadable(line: bytes) -> None:
    with pytest.raises(ValueError):
        events_of([line])


def test_line_without_end_is_not_kept_for_ever() -> None:
    lines = Lines(max_line_bytes=100)
    assert list(lines.feed(b" " * 99 + b"\n" + b" " * 100)) == [b" " * 99 + b"\n"]
    with pytest.raises(Unreadable, match="100"):
        list(lines.feed(b" "))
    with pytest.raises(Unreadable, match="100"):
        list(Lines(max_line_bytes=100).feed(b" " * 100 + b"\n"))


@pytest.mark.parametrize(
    ("path", "lines"), [(CHAT, chat_lines), (GENERATE, generate_lines)], ids=["chat", "generate"]
)
class TestStreams:
    """Both protocols, through the whole road."""

    async def ask(self, path: str, lines: list[dict[str, Any]], **backend: Any) -> Reply:
        request: dict[str, Any] = {"model": "llama3.2", "prompt": "Hi"}
        if path == CHAT:
            request = {"model": "llama3.2", "messages": [{"role": "user", "content": "Hi"}]}
        chunks = [ndjson(line) for line in lines]
        got = await call(wrapped(Backend(chunks, NDJSON, **backend)), path, request)
        assert got.ended and got.body.endswith(b"\n")
        return got

    async def test_allowed_stream_passes_byte_for_byte(self, path: str, lines: Any) -> None:
        got = await self.ask(path, lines(SAFE))
        assert got.body == ndjson(*lines(SAFE))

    async def test_blocked_stream_ends_with_a_last_line(self, path: str, lines: Any) -> None:
        got = await self.ask(path, lines(SAFE + BAD + SAFE))
        *heard, last = map(json.loads, got.body.splitlines())
        assert ndjson(*lines(SAFE)).startswith(ndjson(*heard)) and heard
        assert (last["done"], last["done_reason"], last["model"]) == (
            True,
            "content_filter",
            "llama3.2",
        )
        assert text_of(last) == ""

    async def test_stream_that_is_blocked_at_once_says_no(self, path: str, lines: Any) -> None:
        got = await self.ask(path, lines(BAD))
        refusal, last = map(json.loads, got.body.splitlines())
        assert (text_of(refusal), refusal["done"], last["done"]) == ("No.", False, True)

    async def test_nothing_follows_a_stream_that_was_over(self, path: str, lines: Any) -> None:
        got = await self.ask(path, [*lines(SAFE), *lines(BAD)])
        *heard, last = map(json.loads, got.body.splitlines())
        assert heard == lines(SAFE)[: len(heard)] and last["done"] is True
        assert last == lines(SAFE)[-1] or last["done_reason"] == "content_filter"

    async def test_broken_stream_ends_with_an_error(self, path: str, lines: Any) -> None:
        got = await self.ask(path, lines(SAFE)[:-1], breaks=True)
        *heard, last = map(json.loads, got.body.splitlines())
        assert heard == lines(SAFE)[:-1] and set(last) == {"error"}

    async def test_error_line_is_judged_and_ends_it(self, path: str, lines: Any) -> None:
        good = await self.ask(path, [*lines(SAFE)[:-1], {"error": "out of memory"}])
        assert good.body.endswith(b'{"error": "out of memory"}\n')
        bad = await self.ask(path, [*lines(SAFE)[:-1], {"error": f"cannot say {BAD}"}])
        assert BAD not in bad.body.decode() and b"content_filter" in bad.body


def text_of(line: dict[str, Any]) -> str:
    """What a line says."""
    text: str = line["message"]["content"] if "message" in line else line["response"]
    return text


def test_keep_alive_does_not_outlive_the_stream() -> None:
    stream = OllamaChat().open_stream(chat(), NDJSON)
    assert stream.keep_alive() == b" "
    for event in stream.feed(ndjson(answered(content="Hi"))):
        stream.released(event)
    assert (stream.keep_alive(), stream.abort(), stream.refuse(REFUSAL)) == (b"", b"", b"")


def test_refusals_are_replies_of_their_protocol() -> None:
    created = {"model": "llama3.2", "created_at": "2026-01-02T03:04:05Z"}
    end = {"done": True, "done_reason": "content_filter"}
    given = OllamaChat().refuse(chat(stream=False), REFUSAL)
    message = {"role": "assistant", "content": "No."}
    assert json.loads(given.body) == {**created, "message": message, **end}
    given = OllamaGenerate().refuse(generate(stream=False), REFUSAL)
    assert json.loads(given.body) == {**created, "response": "No.", **end}
    given = OllamaGenerate().refuse(generate(), REFUSAL)
    assert given.content_type == NDJSON and given.body.count(b"\n") == 2


# The real client.


@asynccontextmanager
async def client_of(backend: Backend, guard: FakeGuard) -> AsyncIterator[ollama.AsyncClient]:
    async with listening(wrapped(backend, guard)) as address:
        client = ollama.AsyncClient(host=address)
        try:
            yield client
        finally:
            await client._client.aclose()


async def test_ollama_client_gets_whole_replies_images_and_calls() -> None:
    body = answered(content="Mild.", tool_calls=[{"function": WEATHER}])
    backend, guard = Backend([json.dumps(body).encode()]), FakeGuard(forbids(BAD))
    message = ollama.Message(role="user", content="Hi", images=[ollama.Image(value=PIXEL)])
    async with client_of(backend, guard) as client:
        got = await client.chat("llama3.2", [message])
    assert got.message.content == "Mild." and got.message.tool_calls
    assert got.message.tool_calls[0].function.arguments == {"city": "Lisbon"}
    assert guard.asked[0].messages[0].parts[1].image.data == PIXEL
    assert backend.asked["messages"][0]["images"] == [IMAGE]


async def test_ollama_client_gets_streams() -> None:
    guard = FakeGuard(forbids(BAD))
    async with client_of(Backend([ndjson(*chat_lines(SAFE))], NDJSON), guard) as client:
        chat_stream = await client.chat("m", [{"role": "user", "content": "Hi"}], stream=True)
        said = [part.message.content or "" async for part in chat_stream]
    assert "".join(said) == SAFE
    chunks = [ndjson(line) for line in generate_lines(SAFE + BAD)]
    async with client_of(Backend(chunks, NDJSON), guard) as client:
        stream = await client.generate("m", "Hi", stream=True)
        parts = [part async for part in stream]
    got = "".join(part.response or "" for part in parts)
    assert got and fits(got, SAFE + BAD)
    assert (parts[-1].done, parts[-1].done_reason) == (True, "content_filter")


async def test_ollama_client_gets_refusals_and_raises_errors() -> None:
    backend, guard = Backend([b"{}"]), FakeGuard(forbids(BAD))
    async with client_of(backend, guard) as client:
        refused = await client.generate("m", f"Make a {BAD}")
        assert (refused.response, refused.done_reason) == ("No.", "content_filter")
        with pytest.raises(ollama.ResponseError, match="raw cannot be judged"):
            await client.generate("m", "Hi", raw=True)
    assert backend.bodies == []


async def test_ollama_client_raises_when_a_stream_breaks_off() -> None:
    backend = Backend([ndjson(*chat_lines(SAFE)[:-1])], NDJSON, breaks=True)
    async with client_of(backend, FakeGuard()) as client:
        stream = await client.chat("m", [{"role": "user", "content": "Hi"}], stream=True)
        with pytest.raises(ollama.ResponseError, match="broke off"):
            _ = [part async for part in stream]


async def test_ollama_client_reads_lines_behind_a_sign_of_life() -> None:
    keep_alive = OllamaChat().open_stream(chat(), NDJSON).keep_alive()
    chunks = [part for line in chat_lines("Mild.") for part in (keep_alive, ndjson(line))]
    async with listening(Backend(chunks, NDJSON)) as address:
        client = ollama.AsyncClient(host=address)
        stream = await client.chat("m", [{"role": "user", "content": "Hi"}], stream=True)
        assert "".join([part.message.content or "" async for part in stream]) == "Mild."
        await client._client.aclose()


async def test_models_are_listed_untouched() -> None:
    backend, guard = Backend([b'{"models": []}']), FakeGuard()
    async with client_of(backend, guard) as client:
        assert (await client.list()).models == []
    assert guard.asked == [] and backend.scopes[0]["path"] == "/api/tags"


async def test_routes_that_change_the_server_are_refused() -> None:
    backend = Backend([b"{}"])
    for path in ("/api/push", "/api/create", "/api/pull", "/api/copy"):
        assert (await call(wrapped(backend), path, {})).status == 403
    assert backend.bodies == []
