"""What an ONNX graph takes its weights from: read off its protobuf, before it is loaded.

Older onnxruntime follows a location wherever it leads, so a graph is checked first. Graphs of this
project are flat; subgraphs, functions and sparse tensors, which could hide weights, are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

# Field numbers of onnx.proto.
_MODEL_GRAPH, _MODEL_TRAINING, _MODEL_FUNCTIONS = 7, 20, 25
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_SPARSE = 1, 5, 15
_NODE_ATTRIBUTE = 5
_ATTRIBUTE_TENSORS, _ATTRIBUTE_HIDING = (5, 10), (6, 11, 22, 23)
_TENSOR_DIMS, _TENSOR_NAME, _TENSOR_RAW, _TENSOR_EXTERNAL = 1, 8, 9, 13
_ENTRY_KEY, _ENTRY_VALUE = 1, 2


class UnreadableGraph(ValueError):
    """Not a flat ONNX graph. The text says why."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A constant of a graph: in `raw`, or `length` bytes of the file `location`."""

    name: str
    dims: tuple[int, ...]
    raw: bytes
    location: str
    offset: int
    length: int


def graph_tensors(content: bytes) -> list[Tensor]:
    """All tensors, initializers and those of attributes. Raises UnreadableGraph."""
    found: list[Tensor] = []
    for field, model_part in _messages(memoryview(content)):
        if field in (_MODEL_TRAINING, _MODEL_FUNCTIONS):
            raise UnreadableGraph("it holds functions or training information")
        if field == _MODEL_GRAPH:
            found += map(_tensor, _tensors(model_part))
    return found


def _tensors(graph: memoryview) -> Iterator[memoryview]:
    for field, part in _messages(graph):
        if field == _GRAPH_SPARSE:
            raise UnreadableGraph("it holds sparse tensors")
        if field == _GRAPH_INITIALIZER:
            yield part
        if field == _GRAPH_NODE:
            for attribute in (part for at, part in _messages(part) if at == _NODE_ATTRIBUTE):
                for kind, value in _messages(attribute):
                    if kind in _ATTRIBUTE_HIDING:
                        raise UnreadableGraph("it holds subgraphs or sparse tensors")
                    if kind in _ATTRIBUTE_TENSORS:
                        yield value


def _tensor(content: memoryview) -> Tensor:
    dims: list[int] = []
    name, raw = "", b""
    place: dict[str, str] = {}
    for field, value in _fields(content):
        if field == _TENSOR_DIMS:
            dims += [value] if isinstance(value, int) else _packed(value)
        elif isinstance(value, int):
            continue
        elif field == _TENSOR_NAME:
            name = _text(value)
        elif field == _TENSOR_RAW:
            raw = bytes(value)
        elif field == _TENSOR_EXTERNAL:
            entry = {at: _text(part) for at, part in _messages(value)}
            key = entry.get(_ENTRY_KEY, "")
            if key in place:
                raise UnreadableGraph("a tensor has two places")
            place[key] = entry.get(_ENTRY_VALUE, "")
    return Tensor(
        name,
        tuple(dims),
        raw,
        place.get("location", ""),
        _number(place.get("offset", "0")),
        _number(place.get("length", "0")),
    )


def _number(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise UnreadableGraph("a tensor's place is not a number")
    return int(text)


def _text(content: memoryview) -> str:
    return bytes(content).decode("utf-8", "replace")


def _packed(content: memoryview) -> list[int]:
    found, at = [], 0
    while at < len(content):
        value, at = _varint(content, at)
        found.append(value)
    return found


def _messages(content: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and bytes of each length-delimited field; fields of other kinds are skipped."""
    for field, value in _fields(content):
        if not isinstance(value, int):
            yield field, value


def _fields(content: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """Number and value of each field: bytes, or an integer; fixed-width fields are skipped."""
    at = 0
    while at < len(content):
        tag, at = _varint(content, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(content, at)
            yield tag >> 3, value
            continue
        if kind in (1, 5):
            at += 8 if kind == 1 else 4
            continue
        if kind != 2:
            raise UnreadableGraph("it is not an ONNX file")
        length, at = _varint(content, at)
        if length > len(content) - at:
            raise UnreadableGraph("it is cut short")
        yield tag >> 3, content[at : at + length]
        at += length


def _varint(content: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(content):
            raise UnreadableGraph("it is cut short")
        value |= (content[at] & 0x7F) << shift
        at += 1
        if content[at - 1] < 0x80:
            return value, at
    raise UnreadableGraph("it is not an ONNX file")
