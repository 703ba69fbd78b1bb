"""Ollama's own chat and completions: lines of JSON, streamed unless a request says otherwise."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from guard_middleware.formats import fields, ndjson, openai
from guard_middleware.formats.contract import (
    Answer,
    Asked,
    Channel,
    Event,
    Piece,
    Refusal,
    ReplyStream,
    Turn,
    Unreadable,
)
from guard_middleware.strict_json import Json, dump, parse

_FILTERED = "content_filter"

# Of requests: what steers the backend and is plain.
_CONTROLS = fields.names(
    """
    model stream options format keep_alive think truncate shift logprobs top_logprobs
    width height steps
    """
)
# Of requests: what changes the prompt behind the guard's back.
_UNJUDGEABLE = fields.names("template raw")
_READ_BY_CHAT = frozenset({"messages"})
_READ_BY_GENERATE = fields.names("prompt suffix system images context")
_KNOWN = _CONTROLS | _UNJUDGEABLE | _READ_BY_CHAT | _READ_BY_GENERATE | {"tools"}

_ROLES = ("user", "assistant", "system", "developer", "tool")
_MESSAGE_TEXTS = ("content", "thinking", "tool_name")
_MESSAGE_KEYS = frozenset({*_MESSAGE_TEXTS, "role", "images", "tool_calls", "tool_call_id"})

# Of replies: what the backend, not the model, writes.
_REPLY_KEYS = fields.names(
    """
    model created_at done done_reason context remote_model remote_host completed total
    total_duration load_duration prompt_eval_count prompt_eval_duration eval_count eval_duration
    """
)
_CALL_STRUCTURE = frozenset({"id", "type"})
_FUNCTION_STRUCTURE = frozenset({"index"})


class _Ollama(ABC):
    """What both have in common. A reply has one choice."""

    name: str
    stream_types = ("application/x-ndjson", "application/ndjson")

    @abstractmethod
    def said(self, text: str) -> dict[str, Any]:
        """The part of a line that says this."""

    @abstractmethod
    def pieces(self, line: Mapping[str, Any]) -> Iterator[Piece]:
        """Every text of a line, or of a whole reply."""

    def without(self, body: Json, places: frozenset[int]) -> Json:
        """The body without these messages."""
        if not places:
            return fields.obj(body, "the body")
        return fields.without(body, "messages", places)

    def read_reply(self, asked: Asked, body: Json) -> Sequence[Piece]:
        """Every text of a whole reply."""
        return tuple(self.pieces(fields.obj(body, "the reply")))

    def open_stream(self, asked: Asked, content_type: str) -> ReplyStream:
        """A reader for one streamed reply."""
        return OllamaStream(self, asked)

    def refuse(self, asked: Asked, refusal: Refusal) -> Answer:
        """A reply with the reason of a content filter, which Ollama itself never gives."""
        if asked.streams:
            lines = self.refusal_lines(asked, refusal, refusal.text)
            return Answer(200, self.stream_types[0], lines)
        body = self._line(asked, refusal, refusal.text, done=True)
        return Answer(200, "application/json; charset=utf-8", dump(body))

    def refusal_lines(self, asked: Asked, refusal: Refusal, text: str) -> bytes:
        """What ends a stream; with a text in a line of its own, as readers skip the last one's."""
        lines = [self._line(asked, refusal, text, done=False)] if text else []
        lines.append(self._line(asked, refusal, "", done=True))
        return b"".join(dump(line) + b"\n" for line in lines)

    def error(self, status: int, code: str, message: str) -> Answer:
        """Ollama's error object, which has no place for a code."""
        return Answer(status, "application/json; charset=utf-8", dump({"error": message}))

    def _line(self, asked: Asked, refusal: Refusal, text: str, done: bool) -> dict[str, Any]:
        created = datetime.fromtimestamp(refusal.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        head = {"model": asked.model, "created_at": created, **self.said(text), "done": done}
        return {**head, "done_reason": _FILTERED} if done else head


class OllamaChat(_Ollama):
    """`/api/chat`. A request without messages loads the model."""

    name = "ollama-chat"
    paths = ("/**/api/chat",)

    def read_request(self, path: str, body: Json) -> Asked:
        """What is asked."""
        asked = _body(body)
        messages = fields.array(asked.get("messages"), "messages")
        turns = [_turn(message, index) for index, message in enumerate(messages)]
        turns = turns or [_turn_of("user", [])]
        return _asked(asked, (*_extra(asked, _READ_BY_CHAT), *turns))

    def said(self, text: str) -> dict[str, Any]:
        """A message."""
        return {"message": {"role": "assistant", "content": text}}

    def pieces(self, line: Mapping[str, Any]) -> Iterator[Piece]:
        """The message's texts and calls, and whatever stands beside it."""
        message = fields.obj(line.get("message") or {}, "message")
        _refuse_images(message)
        rest = {key: value for key, value in message.items() if key != "tool_calls"}
        yield from fields.other_pieces(rest, {"role"}, 0, "message")
        for call in fields.array(message.get("tool_calls"), "message.tool_calls"):
            yield from _call_pieces(fields.obj(call, "message.tool_calls[]"))
        rest = {key: value for key, value in line.items() if key != "message"}
        yield from _line_pieces(rest, message.get("content") or message.get("thinking"))


class OllamaGenerate(_Ollama):
    """`/api/generate`. A request without a prompt loads the model."""

    name = "ollama-generate"
    paths = ("/**/api/generate",)

    def read_request(self, path: str, body: Json) -> Asked:
        """What is asked: `suffix` stands behind the reply, and is judged with the prompt."""
        asked = _body(body)
        turns = list(_extra(asked, _READ_BY_GENERATE))
        if asked.get("system"):
            turns.append(_turn_of("system", _texts(asked, ("system",), "")))
        parts = _texts(asked, ("prompt", "suffix"), "") + fields.images(
            asked.get("images"), "images"
        )
        context = fields.array(asked.get("context"), "context")
        turns.append(_turn_of("user", parts))
        return _asked(asked, tuple(turns), unread=("context",) if context else ())

    def said(self, text: str) -> dict[str, Any]:
        """A response."""
        return {"response": text}

    def pieces(self, line: Mapping[str, Any]) -> Iterator[Piece]:
        """Response, thinking, and whatever stands beside them."""
        yield from _line_pieces(line, line.get("response") or line.get("thinking"))


class OllamaStream:
    """A streamed reply of either kind."""

    def __init__(self, speaks: _Ollama, asked: Asked) -> None:
        self._speaks = speaks
        self._asked = asked
        self._lines = ndjson.Lines()
        self._spoken = False
        self._done = False

    def feed(self, data: bytes) -> Sequence[Event]:
        """The lines that are complete now."""
        return [self._read(line) for line in self._lines.feed(data) if line.strip()]

    def finish(self) -> Sequence[Event]:
        """What was left."""
        return [self._read(line) for line in self._lines.finish()]

    def released(self, event: Event) -> None:
        """Keep what decides how the stream has to end."""
        self._spoken |= bool(event.pieces)
        self._done |= bool(event.ended)

    def refuse(self, refusal: Refusal) -> bytes:
        """A last line with the reason of a content filter."""
        if self._done:
            return b""
        text = "" if self._spoken else refusal.text
        return self._speaks.refusal_lines(self._asked, refusal, text)

    def abort(self) -> bytes:
        """A line with an error, as Ollama ends a stream that fails; its clients raise it."""
        return b"" if self._done else dump({"error": "The model's stream broke off."}) + b"\n"

    def keep_alive(self) -> bytes:
        """A space before the next line: clients take an empty line for broken JSON."""
        return b"" if self._done else b" "

    def _read(self, raw: bytes) -> Event:
        line = fields.obj(parse(raw), "a line")
        over = line.get("done") is True or line.get("error") is not None
        return Event(raw, tuple(self._speaks.pieces(line)), (0,) if over else ())


def _body(value: Json) -> dict[str, Any]:
    body = fields.obj(value, "the body", _KNOWN)
    # Clients written in Go send the empty ones too.
    fields.refuse_keys({key: inner for key, inner in body.items() if inner}, _UNJUDGEABLE)
    return body


def _asked(body: Mapping[str, Any], turns: tuple[Turn, ...], unread: tuple[str, ...] = ()) -> Asked:
    streams = body.get("stream") is None or fields.flag(body["stream"], "stream")
    model = fields.text(body.get("model"), "model")
    return Asked((turns,), streams=streams, model=model, unread=unread)


def _extra(body: Mapping[str, Any], read: frozenset[str]) -> tuple[Turn, ...]:
    """What is said besides: tools, schemas; but not where to stop, which no model reads."""
    options = fields.obj(body.get("options") or {}, "options")
    for index, one in enumerate(fields.array(options.get("stop"), "options.stop")):
        fields.text(one, f"options.stop[{index}]")
    rest = {key: value for key, value in options.items() if key != "stop"}
    return fields.extra_turns({**body, "options": rest}, read, _CONTROLS)


def _turn(value: object, index: int) -> Turn:
    place = f"messages[{index}]"
    message = fields.only(value, place, _MESSAGE_KEYS)
    role = fields.text(message.get("role"), f"{place}.role")
    if role not in _ROLES:
        raise Unreadable(f"{place}.role is none of {', '.join(_ROLES)}")
    parts = _texts(message, _MESSAGE_TEXTS, f"{place}.")
    parts += fields.images(message.get("images"), f"{place}.images")
    more: dict[str, Any] = {}
    call_id = fields.identifier(message.get("tool_call_id"), f"{place}.tool_call_id")
    if role == "tool":
        more["tool_call_id"] = call_id
    if calls := fields.array(message.get("tool_calls"), f"{place}.tool_calls"):
        more["tool_calls"] = [_call(call, f"{place}.tool_calls[]") for call in calls]
    return _turn_of(role, parts, index, **more)


def _turn_of(role: str, parts: list[dict[str, Any]], place: int | None = None, **more: Any) -> Turn:
    content = parts if parts or "tool_calls" in more else [{"type": "text", "text": ""}]
    return Turn({"role": role, "content": content, **more}, place)


def _texts(value: Mapping[str, Any], keys: Sequence[str], place: str) -> list[dict[str, Any]]:
    found = (fields.text(value.get(key), f"{place}{key}") for key in keys)
    return [{"type": "text", "text": text} for text in found if text]


def _call(value: object, place: str) -> dict[str, Any]:
    call = fields.only(value, place, {"id", "type", "function"})
    at = f"{place}.function"
    function = fields.only(call.get("function"), at, {"index", "name", "arguments"})
    arguments = fields.obj(function.get("arguments") or {}, f"{at}.arguments")
    fields.identifier(call.get("type"), f"{place}.type")
    fields.count(function.get("index"), f"{at}.index", 0, 1023)
    return {
        "id": fields.identifier(call.get("id"), f"{place}.id"),
        "function": {
            "name": fields.text(function.get("name"), f"{at}.name"),
            "arguments": dump(arguments).decode(),
        },
    }


def _line_pieces(line: Mapping[str, Any], chosen: object) -> Iterator[Piece]:
    """`chosen`: the text that the chosen tokens of its log-probabilities make, if they do."""
    _refuse_images(line)
    rest = {key: value for key, value in line.items() if key != "logprobs"}
    yield from fields.other_pieces(rest, _REPLY_KEYS, 0, "")
    if line.get("logprobs") is not None:
        logprobs = {"content": line["logprobs"]}
        yield from openai.logprob_pieces(logprobs, {"content": chosen}, 0)


def _call_pieces(call: Mapping[str, Any]) -> Iterator[Piece]:
    """Names, arguments and their keys: a channel each for all calls, which come whole."""
    function = fields.obj(call.get("function") or {}, "message.tool_calls[].function")
    if name := fields.text(function.get("name"), "message.tool_calls[].function.name"):
        yield Piece(Channel(0, "tool_calls.name"), f"{name}\n")
    for piece in fields.tree_pieces(function.get("arguments"), 0, ""):
        kind = "keys" if piece.channel.name.endswith("{}") else "arguments"
        yield Piece(Channel(0, f"tool_calls.{kind}"), f"{piece.text}\n")
    rest = {key: value for key, value in function.items() if key not in ("name", "arguments")}
    yield from fields.other_pieces(rest, _FUNCTION_STRUCTURE, 0, "tool_calls.function")
    rest = {key: value for key, value in call.items() if key != "function"}
    yield from fields.other_pieces(rest, _CALL_STRUCTURE, 0, "tool_calls")


def _refuse_images(said: Mapping[str, Any]) -> None:
    if said.get("image") or said.get("images"):
        raise Unreadable("a reply holds an image, which cannot be judged")
