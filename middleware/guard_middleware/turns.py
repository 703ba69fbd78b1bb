"""From what callers have at hand (a text, chat turns) to a conversation on the wire."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any

from guard_api.v1 import guard_pb2
from guard_policies.assessment import Direction

# A text (one turn of the user), chat turns as dicts, or the wire's own message.
Turns = str | Sequence[Mapping[str, Any]] | guard_pb2.Conversation

_ROLES = {
    "user": guard_pb2.ROLE_USER,
    "assistant": guard_pb2.ROLE_ASSISTANT,
    "system": guard_pb2.ROLE_SYSTEM,
    "developer": guard_pb2.ROLE_SYSTEM,
    "tool": guard_pb2.ROLE_TOOL,
}
_KEYS = frozenset({"role", "content", "tool_calls", "tool_call_id"})


def read_turns(turns: Turns) -> guard_pb2.Conversation:
    """A conversation from a text or from turns in the style of OpenAI's chat API.

    A turn is `{"role", "content"}`; content is a text or a list of parts (`text`, `image_url` with
    a data: URI or a URL, `image` with bytes as `data`). `tool_calls` of the assistant and turns of
    role "tool" are read too. Raises ValueError, which says where and what, for all else: nothing is
    left out.
    """
    if isinstance(turns, guard_pb2.Conversation):
        conversation = turns
    elif isinstance(turns, str):
        conversation = guard_pb2.Conversation()
        message = conversation.messages.add(role=guard_pb2.ROLE_USER)
        message.parts.add(text=_text(turns, "the text"))
    elif isinstance(turns, Sequence) and not isinstance(turns, bytes | bytearray):
        messages = (_message(turn, f"messages[{index}]") for index, turn in enumerate(turns))
        conversation = guard_pb2.Conversation(messages=messages)
    else:
        raise ValueError("a conversation is a text or a list of turns")
    if not conversation.messages:
        raise ValueError("the conversation has no messages")
    return conversation


def direction_of(conversation: guard_pb2.Conversation) -> Direction:
    """RESPONSE when the last message is the assistant's."""
    if conversation.messages[-1].role == guard_pb2.ROLE_ASSISTANT:
        return Direction.RESPONSE
    return Direction.PROMPT


def _message(turn: object, where: str) -> guard_pb2.Message:
    if not isinstance(turn, Mapping):
        raise ValueError(f"{where} is not a mapping with role and content")
    if any(value is not None and key not in _KEYS for key, value in turn.items()):
        raise ValueError(f"{where} has a key other than {', '.join(sorted(_KEYS))}")
    role = turn.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise ValueError(f"{where}.role is none of {', '.join(_ROLES)}")
    parts = _parts(turn.get("content"), f"{where}.content")
    if role == "tool":
        parts = [_as_result(part, turn.get("tool_call_id"), where) for part in parts]
    elif turn.get("tool_call_id") is not None:
        raise ValueError(f"{where}.tool_call_id belongs to turns of role tool")
    calls = turn.get("tool_calls")
    if calls is not None:
        parts += _tool_calls(calls, role, f"{where}.tool_calls")
    if not parts:
        raise ValueError(f"{where} has no content")
    return guard_pb2.Message(role=_ROLES[role], parts=parts)


def _parts(content: object, where: str) -> list[guard_pb2.Part]:
    if content is None:
        return []
    if isinstance(content, str):
        return [guard_pb2.Part(text=_text(content, where))]
    if isinstance(content, Sequence) and not isinstance(content, bytes | bytearray):
        return [_part(part, f"{where}[{index}]") for index, part in enumerate(content)]
    raise ValueError(f"{where} is neither a text nor a list of parts")


def _part(part: object, where: str) -> guard_pb2.Part:
    if not isinstance(part, Mapping):
        raise ValueError(f"{where} is not a mapping")
    kind = part.get("type")
    if kind == "text":
        return guard_pb2.Part(text=_text(part.get("text"), f"{where}.text"))
    if kind == "image_url":
        image_url = part.get("image_url")
        url = image_url.get("url") if isinstance(image_url, Mapping) else image_url
        return guard_pb2.Part(image=_image(url, f"{where}.image_url"))
    if kind == "image":
        data = part.get("data")
        if not isinstance(data, bytes) or not data:
            raise ValueError(f"{where}.data holds no bytes")
        return guard_pb2.Part(image=guard_pb2.Image(data=data))
    raise ValueError(f"{where}.type is none of text, image_url, image")


def _image(url: object, where: str) -> guard_pb2.Image:
    if not isinstance(url, str) or not url:
        raise ValueError(f"{where} is not a URL")
    scheme, _, rest = url.partition(":")
    if scheme.lower() != "data":
        return guard_pb2.Image(uri=_text(url, where))
    head, comma, payload = rest.partition(",")
    mime_type, *parameters = head.split(";")
    if not comma or not parameters or parameters[-1].strip().lower() != "base64":
        raise ValueError(f"{where} is a data: URI without base64 data")
    try:
        data = base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"{where} holds malformed base64") from None
    if not data:
        raise ValueError(f"{where} holds no data")
    return guard_pb2.Image(data=data, mime_type=_text(mime_type, where))


def _tool_calls(calls: object, role: str, where: str) -> list[guard_pb2.Part]:
    if role != "assistant":
        raise ValueError(f"{where} belong to turns of role assistant")
    if not isinstance(calls, Sequence) or isinstance(calls, str | bytes):
        raise ValueError(f"{where} is not a list")
    return [_tool_call(call, f"{where}[{index}]") for index, call in enumerate(calls)]


def _tool_call(call: object, where: str) -> guard_pb2.Part:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        raise ValueError(f"{where} has no function")
    return guard_pb2.Part(
        tool_call=guard_pb2.ToolCall(
            id=_text(call.get("id") or "", f"{where}.id"),
            name=_text(function.get("name"), f"{where}.function.name"),
            arguments=_text(function.get("arguments"), f"{where}.function.arguments"),
        )
    )


def _as_result(part: guard_pb2.Part, call_id: object, where: str) -> guard_pb2.Part:
    if part.WhichOneof("content") != "text":
        return part
    tool_call_id = _text(call_id or "", f"{where}.tool_call_id")
    return guard_pb2.Part(
        tool_result=guard_pb2.ToolResult(tool_call_id=tool_call_id, text=part.text)
    )


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where} is not a text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where} is not well-formed Unicode: it holds a lone surrogate") from None
    return value
