"""Images that a request names by address: where they stand in the protocols that could as well
hold them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from guard_middleware.strict_json import Json

# Where a protocol has its messages, and by what name an image goes in their contents.
_IN_OPENAI = frozenset({"image_url", "input_image"})
_LISTS: Mapping[str, str] = {
    "openai-chat": "messages",
    "openai-responses": "input",
    "llama-stack-chat-completion": "messages",
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where an address stands; `put` writes another in its place."""

    holder: dict[str, Any]
    key: str

    @property
    def url(self) -> str:
        """The address."""
        return str(self.holder[self.key])

    def put(self, url: str) -> None:
        """Change it."""
        self.holder[self.key] = url


def image_urls(protocol: str, body: Json) -> list[Place]:
    """The places of addresses in a request that its format has read; data: URIs are none."""
    if not isinstance(body, dict) or protocol not in _LISTS:
        return []
    places = (
        place
        for message in _dicts(body.get(_LISTS[protocol]))
        for item in _dicts(message.get("content"))
        for place in _of(item)
    )
    return [place for place in places if place.url[:5].lower() != "data:"]


def _of(item: dict[str, Any]) -> Iterator[Place]:
    kind = item.get("type")
    if kind in _IN_OPENAI:
        yield from _address(item, "image_url", "url")
    elif kind == "image" and isinstance(item.get("image"), dict):
        yield from _address(item["image"], "url", "uri")


def _address(holder: dict[str, Any], key: str, inner: str) -> Iterator[Place]:
    """A text, or an object that has it under another key."""
    value = holder.get(key)
    if isinstance(value, str):
        yield Place(holder, key)
    elif isinstance(value, dict) and isinstance(value.get(inner), str):
        yield Place(value, inner)


def _dicts(value: object) -> Iterator[dict[str, Any]]:
    for one in value if isinstance(value, list) else (value,):
        if isinstance(one, dict):
            yield one
