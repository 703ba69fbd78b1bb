"""Strict looks into JSON of a known shape, and the texts of what has no known shape."""

from __future__ import annotations

import base64
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from guard_middleware.formats.contract import Channel, Piece, Turn, Unreadable
from guard_middleware.strict_json import Json, dump

MOST_EACH = 128  # choices of one prompt
MOST_CHOICES = 1024  # of all prompts together
_MOST_REPEATED = 2**22  # code points that are judged again with every prompt, all told

# Ids, names of models, dates, enumerations: what backends, not models, write.
_PLAIN = re.compile(r"[\w.:/@+\-]{0,128}", re.ASCII)
# An address that holds its data, of a media type or in base64; not a sentence that begins "Data: ".
_DATA_URI = re.compile(r"\s*data:(?=[^\s,]*(?:/|;base64))[^\s,]*,", re.IGNORECASE)


def names(listed: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(listed.split())


def obj(value: object, place: str, known: Collection[str] = ()) -> dict[str, Any]:
    """The object at this place.

    Raises Unreadable also when a key is one of `known` but for its case: some backends would read
    it as that.
    """
    if not isinstance(value, dict):
        raise Unreadable(f"{place} is not an object")
    strange = {key.casefold() for key in value if key not in known} if known else None
    if strange and not strange.isdisjoint({name.casefold() for name in known}):
        raise Unreadable(f"{place} has a key that is a known one in another case")
    return value


def only(value: object, place: str, known: Collection[str]) -> dict[str, Any]:
    """The object at this place; raises Unreadable when it says anything else than `known`."""
    found = obj(value, place, known)
    if any(key not in known for key in others(found, ())):
        raise Unreadable(f"{place} has a key that is not known")
    return found


def identifier(value: object, place: str) -> str:
    """An id, which nobody judges: raises Unreadable for what could be prose."""
    found = text(value, place)
    if not plain(found):
        raise Unreadable(f"{place} is not an id")
    return found


def array(value: object, place: str) -> list[Any]:
    """The list at this place; an absent one is empty."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise Unreadable(f"{place} is not a list")
    return value


def text(value: object, place: str) -> str:
    """The text at this place; an absent one is empty."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Unreadable(f"{place} is not a text")
    return value


def role(value: object, place: str, known: Collection[str]) -> str:
    """One of the known roles at this place."""
    found = text(value, place)
    if found not in known:
        raise Unreadable(f"{place} is none that is known")
    return found


def without(body: object, key: str, places: frozenset[int]) -> dict[str, Any]:
    """The body, less the members of its array `key` at these places; not changed in place."""
    asked = obj(body, "the body")
    members = array(asked[key], key)
    return {**asked, key: [one for index, one in enumerate(members) if index not in places]}


def images(value: object, place: str) -> list[dict[str, Any]]:
    """Parts for a list of base64. Raises Unreadable for what a lenient decoder reads otherwise."""
    parts: list[dict[str, Any]] = []
    for index, one in enumerate(array(value, place)):
        encoded = text(one, f"{place}[{index}]")
        try:
            data = base64.b64decode(encoded, validate=True)
        except ValueError:
            data = b""
        if not data or base64.b64encode(data) != encoded.encode():
            raise Unreadable(f"{place}[{index}] is not base64 as every decoder reads it")
        parts.append({"type": "image", "data": data})
    return parts


def flag(value: object, place: str) -> bool:
    """The truth value at this place; an absent one is false."""
    if value is None:
        return False
    if not isinstance(value, bool):
        raise Unreadable(f"{place} is neither true nor false")
    return value


def count(value: object, place: str, default: int, most: int) -> int:
    """The number at this place, from 0 to `most`; raises Unreadable for others."""
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise Unreadable(f"{place} is not a whole number from 0 to {most}")
    return value


def refuse_keys(body: Mapping[str, Any], keys: Collection[str]) -> None:
    """Raises Unreadable for what could put text before the model that nobody judged."""
    for key in keys:
        if body.get(key) is not None:
            raise Unreadable(f"{key} cannot be judged and is not let through")


def check_batch(
    prompts: Sequence[Sequence[Turn]], choices: int, extra: Iterable[Turn], more: int = 0
) -> None:
    """Raises Unreadable for too many choices, and for too much that is judged with each prompt:
    the `extra` turns, and `more` code points."""
    if choices * len(prompts) > MOST_CHOICES:
        raise Unreadable(f"asks for more than {MOST_CHOICES} choices")
    repeated = more + sum(len(turn.content["content"]) for turn in extra)
    if (len(prompts) - 1) * repeated > _MOST_REPEATED:
        raise Unreadable("says too much that belongs to each of its prompts")


def plain(value: Json) -> bool:
    """Whether it cannot hold prose: numbers, truth values, ids, and what is made of these."""
    if isinstance(value, str):
        return _PLAIN.fullmatch(value) is not None
    if isinstance(value, dict):
        return all(plain(key) and plain(inner) for key, inner in value.items())
    if isinstance(value, list):
        return all(map(plain, value))
    return True


def others(value: Mapping[str, Any], structure: Collection[str]) -> dict[str, Any]:
    """What is neither structure nor empty: structure counts as such only while it is plain."""
    return {
        key: inner
        for key, inner in value.items()
        if inner not in (None, "", [], {}) and not (key in structure and plain(inner))
    }


def other_pieces(
    value: Mapping[str, Any], structure: Collection[str], choice: int, path: str
) -> Iterator[Piece]:
    """The texts of all keys of a reply's object that are not structure: a channel for each."""
    for key, inner in others(value, structure).items():
        yield from tree_pieces(inner, choice, f"{path}.{key}")


def tree_pieces(value: Json, choice: int, path: str) -> Iterator[Piece]:
    """All texts of a value of unknown shape, keys of objects too, a channel for each place."""
    if isinstance(value, dict):
        keys = " ".join(value)
        if keys:
            yield Piece(Channel(choice, f"{path}{{}}"), f"{keys}\n")
        for key, inner in value.items():
            yield from tree_pieces(inner, choice, f"{path}.{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from tree_pieces(inner, choice, f"{path}[{index}]")
    elif isinstance(value, str) and value:
        no_data(value)
        yield Piece(Channel(choice, path), value)


def no_data(text: str) -> None:
    """Raise Unreadable for a text of a reply that is an image or the like (RFC 2397)."""
    if _DATA_URI.match(text):
        raise Unreadable("a reply holds data that cannot be judged")


def extra_turns(
    body: Mapping[str, Any], read: Collection[str], controls: Collection[str]
) -> tuple[Turn, ...]:
    """A turn of the system that holds what a request says besides the keys `read` elsewhere: tool
    definitions, schemas, whatever is not known. Controls count as such only while they are plain.
    """
    extra = {
        key: inner
        for key, inner in others(body, controls).items()
        if key not in read and not (plain(key) and isinstance(inner, int | float))
    }
    if not extra:
        return ()
    return (Turn({"role": "system", "content": dump(extra).decode()}),)
