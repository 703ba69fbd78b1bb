"""The items of a request to /v1/responses as turns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from guard_middleware.formats import fields
from guard_middleware.formats.contract import Turn, Unreadable
from guard_middleware.strict_json import dump

_ROLES = {"user", "assistant", "system", "developer", "tool"}
_STRUCTURE = fields.names("type id status role phase detail namespace caller async")
_ITEM_KEYS = fields.names(
    """
    type id status role phase content name call_id tool_call_id arguments input output summary
    encrypted_content
    """
)
_PART_KEYS = fields.names(
    """
    type text refusal image_url file_id file_data file_url filename detail input_audio annotations
    logprobs
    """
)
_TEXT_PARTS = {
    "input_text": "text",
    "output_text": "text",
    "text": "text",
    "summary_text": "text",
    "reasoning_text": "text",
    "refusal": "refusal",
}
_CALLS = {"function_call": "arguments", "custom_tool_call": "input"}
_RESULTS = ("function_call_output", "custom_tool_call_output")

Parts = list[dict[str, Any]]


def read_input(value: object, unread: list[str]) -> list[Turn]:
    """The turns of `input`: a text of the user, or items. Places that nobody can read go to
    `unread`. Raises Unreadable."""
    if isinstance(value, str):
        return [Turn({"role": "user", "content": [_text(value)]})]
    turns = [
        Turn(_item(item, f"input[{index}]", unread), index)
        for index, item in enumerate(fields.array(value, "input"))
    ]
    if not turns:
        raise Unreadable("input is empty")
    return turns


def _item(value: object, place: str, unread: list[str]) -> dict[str, Any]:
    item = fields.obj(value, place, _ITEM_KEYS)
    kind = fields.text(item.get("type"), f"{place}.type") or "message"
    if kind == "message":
        return _message(item, place, unread)
    if kind in _CALLS:
        return _call(item, place, _CALLS[kind])
    if kind in _RESULTS:
        return _result(item, "output", "call_id", place, unread)
    if kind == "reasoning":
        return _reasoning(item, place, unread)
    if kind == "item_reference":
        raise Unreadable(f"{place} stands for an item that the guard cannot see")
    unread.append(place)
    return {"role": "assistant", "content": [_text("")]}


def _message(item: Mapping[str, Any], place: str, unread: list[str]) -> dict[str, Any]:
    role = fields.role(item.get("role"), f"{place}.role", _ROLES)
    if role == "tool":
        return _result(item, "content", "tool_call_id", place, unread)
    parts = _content(item.get("content"), f"{place}.content", unread)
    parts += _rest(item, {"content"})
    return {"role": role, "content": parts or [_text("")]}


def _result(
    item: Mapping[str, Any], key: str, id_key: str, place: str, unread: list[str]
) -> dict[str, Any]:
    parts = _content(item.get(key), f"{place}.{key}", unread)
    parts += _rest(item, {key, id_key})
    call = fields.identifier(item.get(id_key), f"{place}.{id_key}")
    return {"role": "tool", "content": parts or [_text("")], "tool_call_id": call}


def _call(item: Mapping[str, Any], place: str, key: str) -> dict[str, Any]:
    function = {
        "name": fields.text(item.get("name"), f"{place}.name"),
        "arguments": fields.text(item.get(key), f"{place}.{key}"),
    }
    call = fields.identifier(item.get("call_id"), f"{place}.call_id")
    return {
        "role": "assistant",
        "content": _rest(item, {"name", key, "call_id"}),
        "tool_calls": [{"id": call, "function": function}],
    }


def _reasoning(item: Mapping[str, Any], place: str, unread: list[str]) -> dict[str, Any]:
    """What the model thought; what only the backend can decipher is read by nobody else."""
    if item.get("encrypted_content"):
        unread.append(f"{place}.encrypted_content")
    parts = _content(item.get("summary"), f"{place}.summary", unread)
    parts += _content(item.get("content"), f"{place}.content", unread)
    parts += _rest(item, {"summary", "content", "encrypted_content"})
    return {"role": "assistant", "content": parts or [_text("")]}


def _content(value: object, place: str, unread: list[str]) -> Parts:
    if isinstance(value, str):
        return [_text(value)]
    parts: Parts = []
    for index, one in enumerate(fields.array(value, place)):
        part = fields.obj(one, f"{place}[{index}]", _PART_KEYS)
        kind = fields.text(part.get("type"), f"{place}[{index}].type")
        key = _TEXT_PARTS.get(kind)
        if key is not None:
            parts.append(_text(fields.text(part.get(key), f"{place}[{index}].{key}")))
            parts += _rest(part, {key})
        elif kind in ("input_image", "image_url") and (url := _data_url(part, f"{place}[{index}]")):
            parts.append({"type": "image_url", "image_url": url})
            parts += _rest(part, {"image_url"})
        else:
            unread.append(f"{place}[{index}]")
    return parts


def _data_url(part: Mapping[str, Any], place: str) -> str | None:
    """The image's data: URI; None for addresses and files, whose content the guard cannot see."""
    image = part.get("image_url")
    if isinstance(image, dict):
        image = fields.only(image, f"{place}.image_url", {"url", "detail"}).get("url")
    url = fields.text(image, f"{place}.image_url")
    return url if url[:5].lower() == "data:" and part.get("file_id") is None else None


def _rest(value: Mapping[str, Any], read: set[str]) -> Parts:
    """What else it says, in one text: citations, labels, what is not known."""
    rest = {key: inner for key, inner in value.items() if key not in read}
    others = fields.others(rest, _STRUCTURE)
    return [_text(dump(others).decode())] if others else []


def _text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}
