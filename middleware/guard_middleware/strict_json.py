"""JSON from strangers: one meaning only, bounded; whatever two parsers could read differently is
refused."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, NoReturn

Json = dict[str, Any] | list[Any] | str | int | float | bool | None

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_STRUCTURE = (b"[", b"{", b",")


class Malformed(ValueError):
    """What was sent is no JSON, or JSON that parsers disagree about. Holds none of its content."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a document is held to; `items` bounds the memory that small values take when parsed."""

    depth: int = 64
    items: int = 1_000_000


BOUNDS = Bounds()


def parse(data: bytes, bounds: Bounds = BOUNDS, *, folded: bool = False) -> Json:
    """The document's value. Raises Malformed.

    Refused besides what is no JSON: another encoding than UTF-8, a byte order mark, keys that occur
    twice, NaN and infinities, lone surrogates, too deep nesting, too many values. With `folded`
    keys that differ in case only count as the same one, as some backends take them.
    """
    decoder = _FOLDED if folded else _EXACT
    if sum(map(data.count, _STRUCTURE)) > bounds.items:
        raise Malformed(f"has more than {bounds.items} values")
    try:
        text = data.decode()
        if text.startswith("\ufeff"):
            raise Malformed("begins with a byte order mark")
        value: Json = decoder.decode(text)
        if _SURROGATE.search(data):
            dump(value)
    except Malformed:
        raise
    except UnicodeDecodeError:
        raise Malformed("is not UTF-8") from None
    except RecursionError:
        raise Malformed(f"is nested deeper than {bounds.depth}") from None
    except ValueError:
        raise Malformed("is not valid JSON") from None
    if data.count(b"[") + data.count(b"{") > bounds.depth:
        _check_depth(value, bounds.depth)
    return value


def dump(value: Json) -> bytes:
    """UTF-8, compact. Raises Malformed for lone surrogates and for numbers beyond a double."""
    try:
        return _ENCODER.encode(value).encode()
    except UnicodeEncodeError:
        raise Malformed("holds a lone surrogate") from None
    except ValueError:
        raise Malformed("holds a number that is too large") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise Malformed("has an object with a key twice")
    return found


def _folded(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key.casefold() for key, _ in pairs}) != len(pairs):
        raise Malformed("has an object with a key twice, or twice but for its case")
    return dict(pairs)


def _no_constant(name: str) -> NoReturn:
    raise Malformed(f"holds {name}, which is no JSON")


# Made once: `json` makes one anew for every call that has options.
_EXACT = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_constant)
_FOLDED = json.JSONDecoder(object_pairs_hook=_folded, parse_constant=_no_constant)
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _check_depth(value: Json, most: int) -> None:
    level: list[Json] = [value]
    for _ in range(most + 1):
        inner = (
            one.values() if isinstance(one, dict) else one
            for one in level
            if isinstance(one, dict | list)
        )
        level = [item for items in inner for item in items]
        if not level:
            return
    raise Malformed(f"is nested deeper than {most}")
