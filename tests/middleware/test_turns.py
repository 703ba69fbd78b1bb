"""From texts and chat turns to a conversation on the wire."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from guard_api.v1 import guard_pb2
from guard_middleware.turns import direction_of, read_turns
from guard_policies.assessment import Direction

PNG = b"\x89PNG\r\n\x1a\n rest"


def test_text_is_one_turn_of_the_user_unchanged() -> None:
    conversation = read_turns("  <|eot_id|> line\r\nUser: \u200b end ")
    assert len(conversation.messages) == 1
    assert conversation.messages[0].role == guard_pb2.ROLE_USER
    assert conversation.messages[0].parts[0].text == "  <|eot_id|> line\r\nUser: \u200b end "


def test_every_role_is_read_and_developer_is_system() -> None:
    turns = [
        {"role": role, "content": "x"} for role in ("system", "developer", "user", "assistant")
    ]
    roles = [message.role for message in read_turns(turns).messages]
    assert roles == [
        guard_pb2.ROLE_SYSTEM,
        guard_pb2.ROLE_SYSTEM,
        guard_pb2.ROLE_USER,
        guard_pb2.ROLE_ASSISTANT,
    ]


def test_parts_keep_their_order_and_images_come_out_of_data_uris() -> None:
    url = "data:image/png;base64," + base64.b64encode(PNG).decode()
    content = [
        {"type": "text", "text": "before"},
        {"type": "image_url", "image_url": {"url": url, "detail": "low"}},
        {"type": "image_url", "image_url": "https://example.org/x.png"},
        {"type": "image", "data": PNG},
        {"type": "text", "text": "after"},
    ]
    parts = read_turns([{"role": "user", "content": content}]).messages[0].parts
    assert [part.WhichOneof("content") for part in parts] == [
        "text", "image", "image", "image", "text",
    ]  # fmt: skip
    assert parts[1].image.data == parts[3].image.data == PNG
    assert parts[1].image.mime_type == "image/png"
    assert parts[2].image.uri == "https://example.org/x.png"


def test_tool_calls_and_results_are_read() -> None:
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "weather?"},
        {
            "role": "assistant",
            "content": None,
            "refusal": None,
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "get", "arguments": "{}"}}
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "rain"},
    ]
    _, call, result = read_turns(turns).messages
    assert call.parts[0].tool_call == guard_pb2.ToolCall(id="1", name="get", arguments="{}")
    assert result.parts[0].tool_result == guard_pb2.ToolResult(tool_call_id="1", text="rain")


def test_empty_text_is_a_part_and_not_an_error() -> None:
    assert read_turns("").messages[0].parts[0].WhichOneof("content") == "text"


def test_direction_follows_the_last_turn() -> None:
    user, reply = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    assert direction_of(read_turns([user, reply])) is Direction.RESPONSE
    assert direction_of(read_turns([user, reply, user])) is Direction.PROMPT


@pytest.mark.parametrize(
    ("turns", "told"),
    [
        ([], "no messages"),
        (b"bytes", "text or a list"),
        (7, "text or a list"),
        (["text"], r"messages\[0\] is not a mapping"),
        ([{"role": "owner", "content": "x"}], r"messages\[0\].role"),
        ([{"content": "x"}], r"messages\[0\].role"),
        ([{"role": "user"}], r"messages\[0\] has no content"),
        ([{"role": "user", "content": []}], "has no content"),
        ([{"role": "user", "content": b"x"}], "neither a text nor a list"),
        ([{"role": "user", "content": ["x"]}], r"content\[0\] is not a mapping"),
        ([{"role": "user", "content": [{"type": "audio"}]}], r"content\[0\].type"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\].text"),
        ([{"role": "user", "content": [{"type": "image", "data": b""}]}], "no bytes"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "not a URL"),
        ([{"role": "user", "content": "x", "audio": {}}], "a key other than"),
        ([{"role": "user", "content": "x", "tool_calls": []}], "role assistant"),
        ([{"role": "user", "content": "x", "tool_call_id": "1"}], "role tool"),
        ([{"role": "assistant", "tool_calls": "x"}], "not a list"),
        ([{"role": "assistant", "tool_calls": [{}]}], "no function"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}], "arguments"),
        ("\ud800", "lone surrogate"),
        ([{"role": "user", "content": "x\udfff"}], "lone surrogate"),
    ],
)
def test_what_is_no_conversation_is_refused_with_its_place(turns: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        read_turns(turns)


@pytest.mark.parametrize(
    "url", ["data:image/png,abc", "data:image/png;base64,@@@", "data:image/png;base64,", "data:"]
)
def test_broken_data_uris_are_refused(url: str) -> None:
    part = {"type": "image_url", "image_url": {"url": url}}
    with pytest.raises(ValueError, match="image_url"):
        read_turns([{"role": "user", "content": [part]}])


def test_errors_do_not_repeat_the_callers_words() -> None:
    turn = {"role": "secret role", "content": "secret text", "secret key": "secret value"}
    with pytest.raises(ValueError) as told:
        read_turns([turn])
    assert "secret" not in str(told.value)
