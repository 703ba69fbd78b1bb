"""Which files an ONNX graph takes weights from: read off its protobuf, before it is loaded.

Older onnxruntime follows a location wherever it leads, so a graph is checked first. Graphs of this
project are flat; subgraphs, functions and sparse tensors, which could hide weights, are refused.
"""

from __future__ import annotations

from collections.abc import Iterator

# Field numbers of onnx.proto.
_MODEL_GRAPH, _MODEL_TRAINING, _MODEL_FUNCTIONS = 7, 20, 25
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_SPARSE = 1, 5, 15
_NODE_ATTRIBUTE = 5
_ATTRIBUTE_TENSORS, _ATTRIBUTE_HIDING = (5, 10), (6, 11, 22, 23)
_TENSOR_EXTERNAL = 13
_ENTRY_KEY, _ENTRY_VALUE = 1, 2


class UnreadableGraph(ValueError):
    """Not a flat ONNX graph. The text says why."""


def graph_files(content: bytes) -> frozenset[str]:
    """Locations of all external tensors. Raises UnreadableGraph."""
    found: set[str] = set()
    for field, model_part in _messages(memoryview(content)):
        if field in (_MODEL_TRAINING, _MODEL_FUNCTIONS):
            raise UnreadableGraph("it holds functions or training information")
        if field == _MODEL_GRAPH:
            for tensor in _tensors(model_part):
                found |= _locations(tensor)
    return frozenset(found)


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


def _locations(tensor: memoryview) -> set[str]:
    found = set()
    for field, entry in _messages(tensor):
        if field == _TENSOR_EXTERNAL:
            pairs = [(at, bytes(value)) for at, value in _messages(entry)]
            if (_ENTRY_KEY, b"location") in pairs:
                values = [value for at, value in pairs if at == _ENTRY_VALUE]
                found |= {value.decode("utf-8", "replace") for value in values}
    return found


def _messages(content: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and bytes of each length-delimited field; fields of other kinds are skipped."""
    at = 0
    while at < len(content):
        tag, at = _varint(content, at)
        kind = tag & 7
        if kind == 0:
            _, at = _varint(content, at)
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
