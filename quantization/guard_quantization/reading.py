"""YAML from strangers into dataclasses, by the types of their fields; each mistake with its place.

The text is composed by the reader of policy files, which refuses tags, deep nesting and text that
is too large. Unlike there, aliases may be used (see `Reader`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from yaml.constructor import SafeConstructor
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from guard_policies.loader import read_bytes
from guard_policies.positions import Entry, Reader

_LONGEST = 1000  # characters of a text
_MOST = 2**53  # whole numbers up to here are exact in every reader of JSON
_WHOLE = re.compile(r"[-+]?\d+", re.ASCII)


def composed(path: Path) -> tuple[Reader, MappingNode]:
    """A file's mapping, and the reader that mistakes in it are reported to. Raises PolicyError."""
    reader = Reader(str(path), aliases=True)
    return reader, reader.compose(read_bytes(path))


def made(reader: Reader, kind: Any, node: Node, what: str) -> Any:
    """The value of type `kind` that `node` holds; None once a mistake in it was reported.

    `what` is the field's name in messages, with those of the fields around it; "" is the file.
    """
    if get_origin(kind) is UnionType:
        if isinstance(node, ScalarNode) and node.tag.endswith(":null"):
            return None
        (kind,) = (choice for choice in get_args(kind) if choice is not NoneType)
    if is_dataclass(kind) and isinstance(kind, type):
        return _record(reader, kind, node, what)
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Mapping:
        entries = reader.table(node, what, None)
        return {key: made(reader, inner[1], one.value, f"{what}.{key}")
                for key, one in entries.items()}  # fmt: skip
    if origin is tuple:
        return _items(reader, inner, node, what)
    return _SCALARS[kind](reader, node, what)


def _record(reader: Reader, kind: type, node: Node, what: str) -> Any:
    before = len(reader.problems)
    known = {field.name: field for field in fields(kind)}
    entries: dict[str, Entry] = reader.table(node, what or "the file", known)
    dot = f"{what}." if what else ""
    for name, field in known.items():
        required = field.default is MISSING and field.default_factory is MISSING
        if required and name not in entries and isinstance(node, MappingNode):
            reader.report(node, f"{dot}{name} is missing")
    hints = get_type_hints(kind)
    values = {
        name: made(reader, hints[name], one.value, dot + name) for name, one in entries.items()
    }
    if len(reader.problems) > before:
        return None
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        reader.report(node, str(error))
        return None


def _items(reader: Reader, kinds: tuple[Any, ...], node: Node, what: str) -> Any:
    items = [*reader.items(node, what)]
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(items)
    elif isinstance(node, SequenceNode) and len(items) != len(kinds):
        reader.report(node, f"{what} must be a list of {len(kinds)}, not of {len(items)}")
        return None
    return tuple(
        made(reader, kind, item, f"{what}[{at}]")
        for at, (kind, item) in enumerate(zip(kinds, items, strict=False))
    )


def _whole(reader: Reader, node: Node, what: str) -> int | None:
    return reader.integer(node, what, -_MOST, _MOST)


def _real(reader: Reader, node: Node, what: str) -> float | None:
    """As it stands: whole numbers stay int, so that what is hashed does not change."""
    value = reader.number(node, what, -1e300, 1e300)
    whole = isinstance(node, ScalarNode) and _WHOLE.fullmatch(node.value)
    return int(value) if value is not None and whole else value


def _text(reader: Reader, node: Node, what: str) -> str | None:
    if isinstance(node, ScalarNode) and node.style in ("'", '"') and not node.value:
        return ""
    return reader.text(node, what, _LONGEST)


def _anything(reader: Reader, node: Node, what: str) -> Any:
    """For whoever checks it afterwards; keys that stand twice are refused here."""
    if isinstance(node, MappingNode):
        entries = reader.table(node, what, None)
        return {key: _anything(reader, one.value, f"{what}.{key}") for key, one in entries.items()}
    if isinstance(node, SequenceNode):
        return [_anything(reader, one, what) for one in node.value]
    try:
        return SafeConstructor().construct_object(node)
    except ValueError as error:  # a date that there is not
        reader.report(node, f"{what}: {error}")
        return None


_SCALARS: Mapping[Any, Callable[[Reader, Node, str], Any]] = {
    int: _whole,
    float: _real,
    str: _text,
    bool: lambda reader, node, what: reader.flag(node, what),
    Any: _anything,
}
