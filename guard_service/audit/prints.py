"""Keyed fingerprints of what was judged: equal for equal content, and nothing without the key."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Iterator

from guard_service.conversation import Conversation, Image, Message, Part, Text, ToolCall


def fingerprint(conversation: Conversation, key: bytes) -> str:
    """HMAC-SHA-256 of a conversation, in hexadecimal. Every byte and the place of every part count;
    of an image its encoded bytes, or its address where these are not there."""
    return _mac(conversation.messages, key)


def last_turn(conversation: Conversation, key: bytes) -> str:
    """The same of the last message as a conversation of its own."""
    return _mac(conversation.messages[-1:], key)


def _mac(messages: Iterable[Message], key: bytes) -> str:
    mac = hmac.new(key, digestmod=hashlib.sha256)
    for message in messages:
        mac.update(b"M")
        _add(mac, message.role.value.encode())
        for part in message.parts:
            for field in _fields(part):
                _add(mac, field)
    return mac.hexdigest()


def _add(mac: hmac.HMAC, field: bytes) -> None:
    mac.update(b"F" + len(field).to_bytes(8, "big") + field)


def _fields(part: Part) -> Iterator[bytes]:
    match part:
        case Text():
            yield from (b"text", _text(part.text))
        case Image(data=bytes() as data):
            yield from (b"image", data)
        case Image():
            yield from (b"address", _text(part.uri or ""))
        case ToolCall():
            yield from (b"call", _text(part.name), _text(part.arguments))
        case _:
            yield from (b"result", _text(part.text))


def _text(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
