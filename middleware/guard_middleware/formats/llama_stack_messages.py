"""Messages and contents of Llama Stack's requests, as turns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from guard_middleware.formats import fields
from guard_middleware.formats.contract import Unreadable
from guard_middleware.strict_json import dump

Parts = list[dict[str, Any]]

_MESSAGE_KEYS = fields.names("role content context call_id tool_name tool_calls stop_reason")
_CALL_KEYS = fields.names("call_id tool_name arguments arguments_json")
_ROLES = {"user": "user", "system": "system", "assistant": "assistant"} | dict.fromkeys(
    ("tool", "ipython"), "tool"
)


def turn(value: object, place: str, unread: list[str]) -> dict[str, Any]:
    """A message's turn; the places of what no guard can read go to `unread`."""
    message = fields.only(value, place, _MESSAGE_KEYS)
    role = _ROLES.get(fields.text(message.get("role"), f"{place}.role"))
    if role is None:
        raise Unreadable(f"{place}.role is none that is known")
    for key in ("call_id", "tool_name", "stop_reason"):
        fields.identifier(message.get(key), f"{place}.{key}")
    parts = content(message.get("content"), f"{place}.content", unread)
    parts += content(message.get("context"), f"{place}.context", unread)
    found: dict[str, Any] = {"role": role, "content": parts}
    if role == "tool":
        found["tool_call_id"] = message.get("call_id")
    calls = fields.array(message.get("tool_calls"), f"{place}.tool_calls")
    if calls:
        found["tool_calls"] = [_call(call, f"{place}.tool_calls[]") for call in calls]
    elif not parts:
        parts.append({"type": "text", "text": ""})
    return found


def _call(value: object, place: str) -> dict[str, Any]:
    """With the arguments as they are given: as text or object, and perhaps once more as JSON."""
    call = fields.only(value, place, _CALL_KEYS)
    name = fields.text(call.get("tool_name"), f"{place}.tool_name")
    given = spelled(call.get("arguments"))
    again = fields.text(call.get("arguments_json"), f"{place}.arguments_json")
    return {
        "id": fields.identifier(call.get("call_id"), f"{place}.call_id"),
        "function": {"name": name, "arguments": "\n".join(filter(None, (given, again)))},
    }


def content(value: object, place: str, unread: list[str]) -> Parts:
    """A text, an item, or a list of items."""
    if value is None:
        return []
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    parts: Parts = []
    items = [value] if isinstance(value, dict) else fields.array(value, place)
    for index, one in enumerate(items):
        where = f"{place}[{index}]"
        item = fields.obj(one, where, {"type", "text", "image"})
        if item.get("type") == "text":
            said = fields.only(item, where, {"type", "text"}).get("text")
            parts.append({"type": "text", "text": fields.text(said, f"{where}.text")})
        elif item.get("type") == "image" and (url := _data_url(item, where)):
            parts.append({"type": "image_url", "image_url": url})
        else:
            unread.append(where)
    return parts


def _data_url(item: Mapping[str, Any], place: str) -> str | None:
    """The image's data: URI; None for an address, behind which another image may lie next time."""
    image = fields.only(item, place, {"type", "image"}).get("image")
    given = fields.only(image, f"{place}.image", {"data", "url"})
    url, data = given.get("url"), fields.text(given.get("data"), f"{place}.image.data")
    if data and url is not None:
        raise Unreadable(f"{place}.image is given twice")
    if data:
        return f"data:;base64,{data}"
    if isinstance(url, dict):
        url = fields.only(url, f"{place}.image.url", {"uri"}).get("uri")
    address = fields.text(url, f"{place}.image.url")
    return address if address[:5].lower() == "data:" else None


def spelled(arguments: Any) -> str:
    """A call's arguments, which are a text or an object, as a text."""
    if arguments in (None, {}):
        return ""
    return arguments if isinstance(arguments, str) else dump(arguments).decode()
