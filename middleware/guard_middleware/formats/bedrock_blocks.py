"""The content blocks of AWS Bedrock's Converse: each holds one thing, under the name of its kind.

Images, documents and the like carry their bytes in base64, or the address of a file in S3, behind
which another file may lie next time: that one is never read.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping
from typing import Any

from guard_middleware.formats import fields
from guard_middleware.formats.contract import Channel, Piece, Unreadable
from guard_middleware.strict_json import Json, dump

Parts = list[dict[str, Any]]

_TEXTUAL = ("citationsContent", "searchResult", "toolAddition", "toolRemoval", "json")
_PLAIN_TEXT = ("txt", "md", "csv")
_OPAQUE = frozenset({"bytes", "s3Location", "redactedContent"})


def block(value: object, place: str) -> tuple[str, Any]:
    """Kind and content. Raises Unreadable for what is none, or several in one."""
    found = {key: inner for key, inner in fields.obj(value, place).items() if inner is not None}
    if len(found) != 1:
        raise Unreadable(f"{place} does not hold one thing")
    return next(iter(found.items()))


def parts(kind: str, value: Any, place: str, unread: list[str]) -> Parts:
    """What a guard reads of a request's block; the places of what it cannot go to `unread`."""
    match kind:
        case "text":
            return [_text(value, place)]
        case "image":
            return _image(value, place, unread)
        case "document":
            return _document(value, place, unread)
        case "guardContent":
            return _guard_content(value, place, unread)
        case "reasoningContent":
            return _reasoning(value, place, unread)
        case "cachePoint" if fields.plain(fields.obj(value, place)):
            return []
        case _ if kind in _TEXTUAL:
            return [_text(dump(value).decode(), place)]
        case _:
            unread.append(place)
            return []


def tool_use(value: object, place: str) -> dict[str, Any]:
    """A call of a tool."""
    call = fields.only(value, place, {"toolUseId", "name", "input", "type"})
    fields.identifier(call.get("type"), f"{place}.type")
    return {
        "id": fields.identifier(call.get("toolUseId"), f"{place}.toolUseId"),
        "function": {
            "name": fields.text(call.get("name"), f"{place}.name"),
            "arguments": dump(call.get("input", {})).decode(),
        },
    }


def tool_result(value: object, place: str, unread: list[str]) -> dict[str, Any]:
    """A tool's turn."""
    result = fields.only(value, place, {"toolUseId", "content", "status", "type"})
    for key in ("status", "type"):
        fields.identifier(result.get(key), f"{place}.{key}")
    found: Parts = []
    for index, one in enumerate(fields.array(result.get("content"), f"{place}.content")):
        where = f"{place}.content[{index}]"
        found += parts(*block(one, where), where, unread)
    called = fields.identifier(result.get("toolUseId"), f"{place}.toolUseId")
    return {"role": "tool", "content": found, "tool_call_id": called}


def pieces(found: Mapping[str, Any], index: int) -> Iterator[Piece]:
    """The texts of a reply's block, or of what a stream adds to one. Texts of all blocks are one
    text, for that is how they are read."""
    for kind, value in found.items():
        if value is None:
            continue
        if kind == "text":
            yield from _said("text", value)
        elif kind == "toolUse":
            yield from _called(fields.obj(value, kind), f"toolUse[{index}]")
        elif kind == "reasoningContent":
            thought = fields.obj(value, kind)
            yield from _thought(fields.obj(thought.get("reasoningText", thought), kind), index)
        else:
            refuse_opaque({kind: value})
            yield from fields.tree_pieces(value, 0, f"{kind}[{index}]")


def refuse_opaque(value: Json) -> None:
    """Raises Unreadable where there are bytes of an image or the like, or the address of some."""
    if isinstance(value, dict):
        if any(key in _OPAQUE and inner for key, inner in value.items()):
            raise Unreadable("holds data that cannot be judged")
        for inner in value.values():
            refuse_opaque(inner)
    elif isinstance(value, list):
        for inner in value:
            refuse_opaque(inner)


def _said(name: str, value: object) -> Iterator[Piece]:
    if said := fields.text(value, name):
        yield Piece(Channel(0, name), said)


def _called(call: Mapping[str, Any], path: str) -> Iterator[Piece]:
    given = call.get("input")
    if given not in (None, "", {}):
        text = given if isinstance(given, str) else dump(given).decode()
        yield Piece(Channel(0, f"{path}.input"), text)
    rest = {key: value for key, value in call.items() if key != "input"}
    yield from fields.other_pieces(rest, {"toolUseId", "type"}, 0, path)


def _thought(thought: Mapping[str, Any], index: int) -> Iterator[Piece]:
    yield from _said("reasoning", thought.get("text"))
    rest = {key: value for key, value in thought.items() if key != "text"}
    refuse_opaque(rest)
    yield from fields.other_pieces(rest, (), 0, f"reasoning[{index}]")


def _text(value: object, place: str) -> dict[str, Any]:
    return {"type": "text", "text": fields.text(value, place)}


def _image(value: object, place: str, unread: list[str]) -> Parts:
    image = fields.only(value, place, {"format", "source"})
    kind, data = block(image.get("source"), f"{place}.source")
    if kind != "bytes":
        unread.append(f"{place}.source")
        return []
    form = fields.identifier(image.get("format"), f"{place}.format")
    encoded = fields.text(data, f"{place}.source.bytes")
    return [{"type": "image_url", "image_url": f"data:image/{form};base64,{encoded}"}]


def _document(value: object, place: str, unread: list[str]) -> Parts:
    document = fields.only(value, place, {"format", "name", "source", "context", "citations"})
    if not fields.plain(document.get("citations")):
        raise Unreadable(f"{place}.citations holds more than it may")
    found = [
        _text(document[key], f"{place}.{key}") for key in ("name", "context") if document.get(key)
    ]
    kind, source = block(document.get("source"), f"{place}.source")
    if kind == "text":
        found.append(_text(source, f"{place}.source.text"))
    elif kind == "content":
        for one in fields.array(source, f"{place}.source.content"):
            inner, said = block(one, f"{place}.source.content[]")
            found += parts(inner, said, f"{place}.source.content[]", unread)
    elif kind == "bytes" and document.get("format") in _PLAIN_TEXT:
        found.append(_text(_decoded(source, place), place))
    else:
        unread.append(f"{place}.source")
    return found


def _decoded(value: object, place: str) -> str:
    try:
        data = base64.b64decode(fields.text(value, place), validate=True)
        return data.decode()
    except (binascii.Error, ValueError):
        raise Unreadable(f"{place} holds no text in base64 and UTF-8") from None


def _guard_content(value: object, place: str, unread: list[str]) -> Parts:
    kind, inner = block(value, place)
    if kind == "text":
        said = fields.only(inner, place, {"text", "qualifiers"})
        if not fields.plain(said.get("qualifiers")):
            raise Unreadable(f"{place}.qualifiers holds more than it may")
        inner = said.get("text")
    return parts(kind, inner, place, unread)


def _reasoning(value: object, place: str, unread: list[str]) -> Parts:
    kind, inner = block(value, place)
    if kind != "reasoningText":
        unread.append(place)
        return []
    thought = fields.only(inner, place, {"text", "signature"})
    return [_text(thought[key], place) for key in ("text", "signature") if thought.get(key)]
