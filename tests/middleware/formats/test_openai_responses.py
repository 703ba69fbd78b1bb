"""OpenAI's Responses: what requests and whole replies say, and what is refused unseen."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from guard_middleware import GuardMiddleware
from guard_middleware.asking import conversation_of
from guard_middleware.formats.contract import Asked, Refusal, Unreadable
from guard_middleware.formats.openai_responses import OpenAIResponses
from guard_middleware.metrics import Metrics
from guard_middleware.testing import FakeGuard, forbids, text_of
from tests.middleware.asgi_calls import Backend, call
from tests.middleware.formats.openai_responses_replies import (
    PATH,
    asking,
    message,
    output_text,
    response,
)
from tests.middleware.formats.openai_responses_replies import call as function_call

BAD = "fake-bomb"
PNG = "data:image/png;base64,iVBORw0KGgo="
METRICS = Metrics(CollectorRegistry())
FORMAT = OpenAIResponses()
TOOL = {"type": "function", "name": "f", "description": "Tells the weather.", "parameters": {}}


def read(said: object = "Hi", **more: Any) -> Asked:
    return FORMAT.read_request(PATH, asking(said, **more))


def told(said: object = "Hi", **more: Any) -> list[tuple[str, str]]:
    """Role and text of each turn, as the guard gets them."""
    (prompt,) = read(said, **more).prompts
    messages = conversation_of(prompt).messages
    assert len(messages) == len(prompt)
    return [
        (turn.role, "\n".join(map(text_of, one.parts)))
        for turn, one in zip(prompt, messages, strict=True)
    ]


def user(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def pieces(asked: Asked | None = None, **body: Any) -> dict[str, str]:
    found = FORMAT.read_reply(asked or read(), response(**body))
    texts: dict[str, str] = {}
    for piece in found:
        texts[piece.channel.name] = texts.get(piece.channel.name, "") + piece.text
    return texts


def text_part(text: str) -> dict[str, Any]:
    return {"type": "input_text", "text": text}


def test_a_text_is_a_turn_of_the_user_behind_the_instructions() -> None:
    assert told("Hi", instructions="Be brief.") == [("system", "Be brief."), ("user", "Hi")]


@pytest.mark.parametrize("role", ["user", "assistant", "system", "developer"])
@pytest.mark.parametrize("more", [{}, {"type": "message", "id": "msg_1", "status": "completed"}])
def test_every_role_is_read(role: str, more: dict[str, Any]) -> None:
    assert told([{"role": role, "content": "Hi", **more}]) == [(role, "Hi")]


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("input_text", "text"),
        ("output_text", "text"),
        ("text", "text"),
        ("refusal", "refusal"),
    ],
)
def test_every_part_with_a_text_is_read(kind: str, key: str) -> None:
    assert told(user({"type": kind, key: "One."}, text_part("Two."))) == [("user", "One.\nTwo.")]


def test_what_else_a_part_or_an_item_says_is_judged() -> None:
    part = output_text("Hi", annotations=[{"title": "a title"}])
    ((_, first), (_, second)) = told(
        [message(part), {"role": "user", "content": "x", "mood": "a b"}]
    )
    assert first.startswith("Hi\n") and "a title" in first
    assert "a b" in second


def test_several_images_are_read_from_data_uris_only() -> None:
    image = {"type": "input_image", "image_url": PNG, "detail": "low"}
    asked = read(user(image, text_part("What?"), image))
    kinds = [part["type"] for part in asked.prompts[0][0].content["content"]]
    assert kinds == ["image_url", "text", "image_url"] and not asked.unread


@pytest.mark.parametrize(
    "part",
    [
        {"type": "input_image", "image_url": "https://example.com/cat.png"},
        {"type": "input_image", "file_id": "file-1"},
        {"type": "input_image", "file_id": "file-1", "image_url": PNG},
        {"type": "input_file", "filename": "a.pdf", "file_data": PNG},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        {"type": "video"},
    ],
)
def test_what_no_guard_can_read_is_named(part: dict[str, Any]) -> None:
    assert read(user(part)).unread == ("input[0].content[0]",)


def test_calls_results_and_thoughts_are_turns_with_their_places() -> None:
    result = {"type": "function_call_output", "call_id": "call_1", "output": "Rain."}
    thought = {
        "id": "rs_1",
        "type": "reasoning",
        "summary": [{"type": "summary_text", "text": "In short."}],
        "content": [{"type": "reasoning_text", "text": "At length."}],
    }
    items = [*user(text_part("Weather?")), thought, function_call('{"city":1}'), result]
    assert told(items) == [
        ("user", "Weather?"),
        ("assistant", "In short.\nAt length."),
        ("assistant", 'get_weather({"city":1})'),
        ("tool", "Rain."),
    ]
    asked = read(items, instructions="Be brief.")
    assert [turn.place for turn in asked.prompts[0]] == [None, 0, 1, 2, 3]
    assert FORMAT.without(asking(items), frozenset({1, 2})) == asking([items[0], items[3]])


def test_custom_tools_calls_and_results_in_parts_are_read() -> None:
    calls = {"type": "custom_tool_call", "call_id": "c", "name": "run", "input": "rm it"}
    output = [text_part("Done."), {"type": "input_image", "image_url": PNG}]
    result = {"type": "custom_tool_call_output", "call_id": "c", "output": output}
    assert told([calls, result]) == [("assistant", "run(rm it)"), ("tool", "Done.\n")]


def test_results_of_the_chats_kind_are_read_too() -> None:
    assert told([{"role": "tool", "tool_call_id": "c", "content": "Rain."}]) == [("tool", "Rain.")]


@pytest.mark.parametrize(
    "item",
    [
        {"type": "reasoning", "summary": [], "encrypted_content": "gAAAA"},
        {"type": "compaction", "encrypted_content": "gAAAA"},
        {"type": "web_search_call", "id": "ws_1", "action": {"query": "x"}},
        {"type": "computer_call_output", "output": {"image_url": PNG}},
    ],
)
def test_items_that_hold_what_the_guard_cannot_see_are_named(item: dict[str, Any]) -> None:
    assert [place[:8] for place in read([item]).unread] == ["input[0]"]


@pytest.mark.parametrize("kind", ["mcp", "web_search", "file_search", "code_interpreter"])
def test_tools_that_the_backend_runs_are_named(kind: str) -> None:
    assert read(tools=[TOOL, {"type": kind}]).unread == ("tools[1]",)


def test_definitions_schemas_and_unknown_keys_are_judged() -> None:
    schema = {"format": {"type": "json_schema", "schema": {"title": "a title"}}}
    (role, extra), _ = told(tools=[TOOL], text=schema, mood="rather gloomy")
    assert role == "system"
    assert all(one in extra for one in ("Tells the weather.", "a title", "rather gloomy"))


def test_controls_and_labels_are_no_turns() -> None:
    more = {"temperature": 0.5, "max_output_tokens": 9, "store": True, "truncation": "auto"}
    more |= {"reasoning": {"effort": "low"}, "text": {"format": {"type": "text"}}}
    more |= {"include": ["message.output_text.logprobs"], "metadata": {"a": "b c"}}
    assert told(tool_choice="auto", background=False, user="me", **more) == [("user", "Hi")]


@pytest.mark.parametrize(
    ("more", "place"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"conversation": {"id": "conv_1"}}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"background": True}, "background"),
        ({"previous_input_messages": [{"role": "user"}]}, "previous_input_messages"),
        ({"context_management": [{"type": "compaction"}]}, "context_management"),
        ({"chat_template": "x"}, "chat_template"),
    ],
)
def test_conversations_that_the_backend_keeps_are_refused(more: dict[str, Any], place: str) -> None:
    with pytest.raises(Unreadable, match=f"^{place}"):
        read(**more)


@pytest.mark.parametrize(
    "body",
    [
        asking([]),
        asking(None),
        asking(7),
        asking([7]),
        asking([{"role": "user", "content": 7}]),
        asking([{"role": [], "content": "Hi"}]),
        asking([{"role": "critic", "content": "Hi"}]),
        asking([{"type": [], "role": "user"}]),
        asking([{"type": "item_reference", "id": "msg_1"}]),
        asking([{"type": "function_call", "call_id": "a b", "name": "f", "arguments": ""}]),
        asking([{"type": "function_call", "call_id": "c", "name": "f", "arguments": {}}]),
        asking([{"role": "user", "Content": "Hi"}]),
        asking([{"role": "user", "content": [{"type": "input_text", "Text": "Hi"}]}]),
        asking(user({"type": [], "text": "Hi"})),
        asking("Hi", Input="Hi"),
        asking("Hi", stream="yes"),
        asking("Hi", instructions=["a"]),
        asking("Hi", tools={"type": "mcp"}),
        [],
    ],
)
def test_what_is_no_request_is_told_by_its_place(body: Any) -> None:
    with pytest.raises(Unreadable):
        FORMAT.read_request(PATH, body)


def test_every_text_of_a_reply_has_its_channel() -> None:
    thought = {"type": "reasoning", "id": "rs", "summary": [{"type": "summary_text", "text": "S"}]}
    entry = {"token": "Hi", "logprob": -1, "top_logprobs": [{"token": "Ho", "logprob": -2}]}
    refused = {"type": "refusal", "refusal": "No."}
    said = message(output_text("Hi", logprobs=[entry]), refused)
    unknown = {"type": "web_search_call", "id": "ws", "action": {"type": "search", "goal": "q q"}}
    found = pieces(output=[thought, said, function_call("{}"), unknown])
    assert found == {
        "output[0].summary[0].text": "S",
        "output[1].content[0].text": "Hi",
        "output[1].content[0].logprobs.content.top[0]": "Ho",
        "output[1].content[1].refusal": "No.",
        "output[2].name": "get_weather",
        "output[2].arguments": "{}",
        "output[3].action{}": "goal\n",
        "output[3].action.goal": "q q",
    }


def test_what_a_reply_repeats_of_its_request_is_not_judged_again_but_all_else_is() -> None:
    asked = read(instructions="Be brief.", tools=[TOOL], metadata={"a b": "c d"})
    echoed = {"instructions": "Be brief.", "metadata": {"a b": "c d"}}
    more = {"tools": [{**TOOL, "strict": True}], **echoed}
    assert pieces(asked, output=[], **more) == {}
    assert pieces(asked, output=[], **more | {"instructions": "Be bad."}) == {
        "response.instructions": "Be bad."
    }
    found = pieces(asked, output=[], mood="rather gloomy", error={"message": "It broke."})
    assert {"rather gloomy", "It broke."} <= set(found.values())


@pytest.mark.parametrize(
    "item",
    [
        {"type": "image_generation_call", "result": "iVBORw0KGgo="},
        {"type": "computer_call_output", "output": {"image_url": PNG}},
        message({"type": "output_audio", "data": "AAAA"}),
        message(output_text("x", logprobs="no list")),
        7,
    ],
)
def test_replies_that_cannot_be_judged_are_unreadable(item: Any) -> None:
    with pytest.raises(Unreadable):
        pieces(output=[item])


def test_a_refusal_is_an_incomplete_response() -> None:
    given = FORMAT.refuse(read(), Refusal("No.", "7", 1_700_000_000))
    body = json.loads(given.body)
    assert given.status == 200 and body["id"] == "resp_7" and body["model"] == "llama"
    assert body["status"] == "incomplete"
    assert body["incomplete_details"] == {"reason": "content_filter"}
    assert body["output"][0]["content"][0]["text"] == "No."


def run(method: str, path: str, body: object = b"", **settings: Any) -> tuple[int, Backend]:
    backend = Backend([json.dumps(response(message(output_text("Hello.")))).encode()])
    guard = FakeGuard(forbids(BAD))
    app = GuardMiddleware(backend, guard, metrics=METRICS, **settings)
    return asyncio.run(call(app, path, body, method=method)).status, backend


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", f"{PATH}/resp_1"),
        ("GET", f"{PATH}/resp_1/input_items"),
        ("POST", f"{PATH}/resp_1/cancel"),
        ("POST", f"{PATH}/compact"),
        ("POST", f"{PATH}/input_tokens"),
        ("POST", "/v1/conversations"),
        ("GET", "/v1/conversations/conv_1/items"),
    ],
)
def test_stored_responses_and_conversations_are_refused_by_the_declared_rule(
    method: str, path: str
) -> None:
    status, backend = run(method, path)
    assert status == 403 and backend.scopes == []


def test_a_bad_old_exchange_is_left_out_with_its_calls_and_results() -> None:
    result = {"type": "function_call_output", "call_id": "call_1", "output": BAD}
    old = [{"role": "user", "content": "Weather?"}, function_call("{}"), result]
    items = [*old, message(output_text("Mild.")), {"role": "user", "content": "Thanks"}]
    status, backend = run("POST", PATH, asking(items))
    assert status == 200
    assert backend.asked == asking(items[-1:])
