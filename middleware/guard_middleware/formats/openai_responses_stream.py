"""A streamed Response: read, and ended well-formed wherever it has to be cut."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from guard_middleware.formats import fields, sse
from guard_middleware.formats.contract import Asked, Channel, Event, Piece, Refusal, Unreadable
from guard_middleware.formats.openai_responses_texts import (
    ENDS,
    PARTS,
    TEXTS,
    Found,
    event_texts,
    part_index,
)
from guard_middleware.strict_json import dump, parse

_STEMS = {place.type: stem for stem, place in TEXTS.items() if place.type}
_PART_STEMS = {"content": "response.content_part", "summary": "response.reasoning_summary_part"}

At = tuple[int, str, int]  # an item's number, a list of its parts, a part's number


class ResponsesStream(sse.SseStream):
    """A streamed Response; `own` are the strings of the request that it may repeat."""

    def __init__(self, asked: Asked, own: frozenset[str]) -> None:
        super().__init__()
        self._asked = asked
        self._own = own
        self._said = Said()
        self._ids: dict[str, int] = {}
        self._seen = Seen()

    def read(self, frame: sse.Frame) -> Event:
        """The event of a frame."""
        if not frame.data or frame.data.strip() == b"[DONE]":
            return Event(frame.raw)
        body = fields.obj(parse(frame.data), "an event")
        kind = fields.text(body.get("type"), "type") or frame.name
        output = self._output(body)
        wholes: dict[str, str] = defaultdict(str)
        pieces = []
        for found in event_texts(kind, body, output, self._own):
            if found.whole:
                wholes[found.path] += found.text
            else:
                pieces += self._said.more(found)
        for path, text in wholes.items():
            pieces += self._said.whole(path, text)
        ended = (0,) if kind in ENDS or kind == "error" else ()
        return Event(frame.raw, tuple(pieces), ended, (kind, output, body))

    def released(self, event: Event) -> None:
        """Keep what the closing events have to repeat."""
        if event.value is not None:
            kind, output, body = event.value
            self._seen.see(kind, output, body, event.pieces)

    def refuse(self, refusal: Refusal) -> bytes:
        """Messages that were open are closed as incomplete; calls of tools that were are not: who
        runs them must not take a part for the whole."""
        seen = self._seen
        if seen.over:
            return b""
        return b"".join(Closing(self._asked, refusal, seen, self._said).events())

    def abort(self) -> bytes:
        """The response has failed; an error event if the client has not seen it begin."""
        seen = self._seen
        if seen.over:
            return b""
        error = {"code": "server_error", "message": "The model's stream broke off."}
        if not seen.head:
            return seen.event("error", **error, param=None)
        output = [seen.done[index] for index in sorted(seen.done)]
        response = {**seen.head, "status": "failed", "error": error, "output": output}
        return seen.event("response.failed", response=response)

    def _output(self, body: Mapping[str, Any]) -> int:
        """The number of the item that an event is about: by its id where there is no number."""
        if body.get("output_index") is not None:
            return fields.count(body["output_index"], "output_index", 0, 1023)
        item = body.get("item")
        id_ = body.get("item_id") or (item.get("id") if isinstance(item, dict) else None)
        if id_ is None:
            return 0
        return self._ids.setdefault(fields.text(id_, "item_id"), len(self._ids))


class Said:
    """What has been said at each path, to tell repetitions from new texts."""

    def __init__(self) -> None:
        self._parts: dict[str, list[str]] = defaultdict(list)
        self._versions: dict[str, list[str]] = defaultdict(list)
        self._chars = 0

    def text(self, path: str) -> str:
        """All that was said there."""
        parts = self._parts[path]
        parts[:] = ["".join(parts)]
        return parts[0]

    def more(self, found: Found) -> list[Piece]:
        """A text that adds to its path."""
        if not found.text:
            return []
        self._keep(self._parts[found.path], found.text)
        return [Piece(Channel(0, found.path), found.text)]

    def whole(self, path: str, text: str) -> list[Piece]:
        """A text that stands for the whole path: nothing new if it is just that; else a text of
        its own."""
        if not text:
            return []
        said, versions = self.text(path), self._versions[path]
        if not said:
            return self.more(Found(path, text))
        if text == said or text in versions:
            return []
        self._keep(versions, text)
        return [Piece(Channel(0, f"{path}#{len(versions)}"), text)]

    def _keep(self, texts: list[str], text: str) -> None:
        self._chars += len(text)
        if self._chars > sse.MAX_EVENT_BYTES:  # the last event could not repeat it
            raise Unreadable(f"the stream says more than {sse.MAX_EVENT_BYTES} characters")
        texts.append(text)


class Seen:
    """What the client has seen of a stream."""

    def __init__(self) -> None:
        self.head: dict[str, Any] = {}
        self.open: dict[int, dict[str, Any]] = {}
        self.done: dict[int, dict[str, Any]] = {}
        self.parts: dict[At, tuple[dict[str, Any], bool]] = {}
        self.chars: Counter[str] = Counter()
        self.spoken = False
        self.over = False
        self._number = -1

    def see(self, kind: str, output: int, body: Mapping[str, Any], pieces: Sequence[Piece]) -> None:
        """Take note of an event and of the texts in it."""
        number = body.get("sequence_number")
        self._number = number if isinstance(number, int) else self._number + 1
        for piece in pieces:
            self.chars[piece.channel.name] += len(piece.text)
            self.spoken |= piece.channel.name.startswith("output[")
        self.over |= kind in ENDS or kind == "error"
        stem, _, stage = kind.rpartition(".")
        if isinstance(response := body.get("response"), dict):
            self.head = {key: value for key, value in response.items() if key != "output"}
        elif isinstance(item := body.get("item"), dict):
            self._item(output, item, stage == "done")
        elif stem in PARTS:
            group = PARTS[stem]
            at = (output, group, part_index(group, body))
            self.parts[at] = (dict(body["part"]), stage == "done")
        elif stem in TEXTS and (place := TEXTS[stem]).group:
            at = (output, place.group, part_index(place.group, body))
            self.parts.setdefault(at, ({"type": place.type, place.key: ""}, False))

    def event(self, kind: str, **body: Any) -> bytes:
        """An event of ours, numbered behind those that were seen."""
        self._number += 1
        return sse.event(dump({"type": kind, "sequence_number": self._number, **body}), kind)

    def _item(self, output: int, item: dict[str, Any], done: bool) -> None:
        self.open.pop(output, None)
        (self.done if done else self.open)[output] = item


class Closing:
    """The end of a stream that is cut."""

    def __init__(self, asked: Asked, refusal: Refusal, seen: Seen, said: Said) -> None:
        self._refusal = refusal
        self._seen = seen
        self._said = said
        self._head = seen.head or new_head(asked, refusal)
        self._silent = not seen.spoken
        self._events: list[bytes] = []

    def events(self) -> list[bytes]:
        """All of them; to be asked for once."""
        seen = self._seen
        if not seen.head:
            self._add("response.created", response={**self._head, "output": []})
        output = dict(seen.done)
        for index, item in sorted(seen.open.items()):
            if item.get("type") in ("message", "reasoning"):
                output[index] = self._close(index, item)
        if self._silent:
            index = max((*seen.open, *output), default=-1) + 1
            message = {**new_message(self._refusal, ""), "content": [], "status": "in_progress"}
            self._add("response.output_item.added", output_index=index, item=message)
            output[index] = self._close(index, message)
        items = [output[index] for index in sorted(output)]
        self._add("response.incomplete", response=incomplete(self._head, items))
        return self._events

    def _close(self, index: int, item: dict[str, Any]) -> dict[str, Any]:
        """Close an item; it, as it is then."""
        parts = [at for at in sorted(self._seen.parts) if at[0] == index]
        if self._silent and item.get("type") == "message" and not parts:
            parts = [(index, "content", 0)]
            part = {"type": "output_text", "text": "", "annotations": []}
            self._seen.parts[parts[0]] = (part, False)
            self._add_at("response.content_part.added", parts[0], item, part=part)
        groups: dict[str, list[Any]] = {}
        for at in parts:
            groups.setdefault(at[1], []).append(self._close_part(at, item))
        closed = {**item, **groups, "status": "incomplete"}
        self._add("response.output_item.done", output_index=index, item=closed)
        return closed

    def _close_part(self, at: At, item: Mapping[str, Any]) -> dict[str, Any]:
        part, done = self._seen.parts[at]
        stem = _STEMS.get(str(part.get("type")))
        if done or stem is None:
            return part
        output, group, index = at
        key = TEXTS[stem].key
        path = f"output[{output}].{group}[{index}].{key}"
        text = self._said.text(path)[: self._seen.chars[path]]
        more: dict[str, Any] = {"logprobs": []} if part["type"] == "output_text" else {}
        if self._silent and more:
            self._silent = False
            text = self._refusal.text
            self._add_at(f"{stem}.delta", at, item, delta=text, **more)
        part = {**part, key: text}
        self._add_at(f"{stem}.done", at, item, **{key: text}, **more)
        self._add_at(f"{_PART_STEMS[group]}.done", at, item, part=part)
        return part

    def _add_at(self, kind: str, at: At, item: Mapping[str, Any], **body: Any) -> None:
        output, group, index = at
        place = {"item_id": item.get("id"), "output_index": output, f"{group}_index": index}
        self._add(kind, **place, **body)

    def _add(self, kind: str, **body: Any) -> None:
        self._events.append(self._seen.event(kind, **body))


def new_head(asked: Asked, refusal: Refusal) -> dict[str, Any]:
    """The beginning of a response of ours; its output is to be added."""
    return {
        "id": f"resp_{refusal.id}",
        "object": "response",
        "created_at": refusal.created,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "metadata": {},
        "model": asked.model,
        "parallel_tool_calls": True,
        "temperature": None,
        "tool_choice": "auto",
        "tools": [],
        "top_p": None,
        "usage": None,
    }


def new_message(refusal: Refusal, text: str) -> dict[str, Any]:
    """A message of ours."""
    return {
        "id": f"msg_{refusal.id}",
        "type": "message",
        "role": "assistant",
        "status": "incomplete",
        "content": [{"type": "output_text", "text": text, "annotations": []}],
    }


def incomplete(head: Mapping[str, Any], output: list[dict[str, Any]]) -> dict[str, Any]:
    """A response that a content filter ended."""
    details = {"reason": "content_filter"}
    return {**head, "status": "incomplete", "incomplete_details": details, "output": output}
