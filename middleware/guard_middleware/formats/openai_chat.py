"""OpenAI's /v1/chat/completions, as vLLM, SGLang, TGI, llama.cpp, Ollama and others speak it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from guard_middleware.formats import fields, openai, sse
from guard_middleware.formats.contract import (
    Answer,
    Asked,
    Event,
    Piece,
    Refusal,
    ReplyStream,
    Turn,
    Unreadable,
)
from guard_middleware.strict_json import Json, dump, parse

_MESSAGE_KEYS = frozenset(
    {"role", "content", "name", "refusal", "reasoning", "reasoning_content", "audio"}
    | {"tool_calls", "tool_call_id", "function_call"}
)
_PART_KEYS = frozenset({"type", "text", "image_url", "refusal", "thinking", "detail"})
_READ = openai.LABELS | {"messages", "chat_template_kwargs"}
_ROLES = {"user", "assistant", "system", "developer", "tool", "function"}
_MOST_CHOICES = 128

_REPLY_KEYS = openai.REPLY_KEYS | {"choices"}
_CHOICE_KEYS = frozenset({"index", "finish_reason", "stop_reason", "token_ids", "matched_stop"})
_MESSAGE_STRUCTURE = frozenset({"role"})
_CALL_STRUCTURE = frozenset({"index", "id", "type"})
_CALLS = ("tool_calls", "function_call")


class OpenAIChat:
    """Chat completions."""

    name = "openai-chat"
    paths = ("/**/chat/completions", "/**/invocations")
    stream_types = ("text/event-stream",)

    def read_request(self, path: str, body: Json) -> Asked:
        """What is asked."""
        asked = fields.obj(body, "the body", openai.CONTROLS | _READ)
        fields.refuse_keys(asked, openai.UNJUDGEABLE)
        switches = fields.obj(asked.get("chat_template_kwargs") or {}, "chat_template_kwargs")
        if not all(isinstance(one, int | float) for one in switches.values()):
            raise Unreadable("chat_template_kwargs holds more than numbers and truth values")
        messages = fields.array(asked.get("messages"), "messages")
        if not messages:
            raise Unreadable("messages is empty")
        unread: list[str] = []
        turns = [_turn(message, index, unread) for index, message in enumerate(messages)]
        extra = fields.extra_turns(asked, _READ, openai.CONTROLS)
        return Asked(
            prompts=((*extra, *turns),),
            streams=fields.flag(asked.get("stream"), "stream"),
            choices=max(1, fields.count(asked.get("n"), "n", 1, _MOST_CHOICES)),
            model=fields.text(asked.get("model"), "model"),
            unread=tuple(unread),
        )

    def without(self, body: Json, places: frozenset[int]) -> Json:
        """The body without these messages."""
        return fields.without(body, "messages", places)

    def read_reply(self, asked: Asked, body: Json) -> Sequence[Piece]:
        """Every text of a whole reply."""
        reply = fields.obj(body, "the reply")
        return openai.with_ids(reply, tuple(_pieces(reply, "message")))

    def open_stream(self, asked: Asked, content_type: str) -> ReplyStream:
        """A reader for one streamed reply."""
        return ChatStream(asked)

    def refuse(self, asked: Asked, refusal: Refusal) -> Answer:
        """A reply with the finish reason of a content filter."""
        choices = range(asked.choices)
        head = openai.head(asked, refusal, "chat.completion")
        if asked.streams:
            return Answer(
                200, "text/event-stream; charset=utf-8", _refusal_events(head, choices, refusal)
            )
        message = {"role": "assistant", "content": refusal.text, "refusal": None}
        filtered = {"message": message, "logprobs": None, "finish_reason": "content_filter"}
        body = {
            **head,
            "choices": [{"index": index, **filtered} for index in choices],
            "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
        }
        return Answer(200, "application/json", dump(body))

    def error(self, status: int, code: str, message: str) -> Answer:
        """OpenAI's error object."""
        return openai.error(status, code, message)


class ChatStream(sse.SseStream):
    """A streamed chat completion."""

    def __init__(self, asked: Asked) -> None:
        super().__init__()
        self._asked = asked
        self._head: dict[str, Any] = {}
        self._spoken: set[int] = set()
        self._closed: set[int] = set()
        self._done = False

    def read(self, frame: sse.Frame) -> Event:
        """The event of a frame."""
        if not frame.data or frame.data.strip() == b"[DONE]":
            return Event(frame.raw, value="[DONE]" if frame.data else None)
        chunk = fields.obj(parse(frame.data), "an event")
        pieces = tuple(self.pieces(chunk))
        choices = fields.array(chunk.get("choices"), "choices")
        ended = tuple(map(openai.choice_index, filter(_has_ended, choices)))
        if bare := openai.bare_ids(choices, pieces):
            kept = [{**one, "token_ids": None} if one in bare else one for one in choices]
            return Event(sse.event(dump({**chunk, "choices": kept})), pieces, ended, chunk)
        return Event(frame.raw, pieces, ended, chunk)

    def pieces(self, chunk: Mapping[str, Any]) -> Iterator[Piece]:
        """Every text of a chunk."""
        return _pieces(chunk, "delta")

    def released(self, event: Event) -> None:
        """Keep what a closing event has to repeat."""
        if event.value is None:
            return
        if event.value == "[DONE]":
            self._done = True
            return
        if not self._head:
            self._head = {key: event.value.get(key) for key in ("id", "created", "model")}
        self._spoken |= {piece.channel.choice for piece in event.pieces}
        self._closed |= set(event.ended)

    def refuse(self, refusal: Refusal) -> bytes:
        """Every choice that was open ends with content_filter."""
        if self._done:
            return b""
        head = {**openai.head(self._asked, refusal, "chat.completion"), **self._head}
        left = (self._spoken | set(range(self._asked.choices))) - self._closed
        return _refusal_events(head, sorted(left), refusal, self._spoken)

    def abort(self) -> bytes:
        """An error event, as OpenAI's and vLLM's servers send it in a stream."""
        return b"" if self._done else openai.broken_stream()


def _turn(value: object, index: int, unread: list[str]) -> Turn:
    place = f"messages[{index}]"
    message = fields.only(value, place, _MESSAGE_KEYS)
    role = fields.role(message.get("role"), f"{place}.role", _ROLES)
    if message.get("audio") is not None:
        unread.append(f"{place}.audio")
    parts = _content(message.get("content"), f"{place}.content", unread)
    for key in ("name", "refusal", "reasoning", "reasoning_content"):
        if said := fields.text(message.get(key), f"{place}.{key}"):
            parts.append({"type": "text", "text": said})
    turn: dict[str, Any] = {"role": "tool" if role == "function" else role, "content": parts}
    fields.identifier(message.get("tool_call_id"), f"{place}.tool_call_id")
    if role == "tool":
        turn["tool_call_id"] = message.get("tool_call_id")
    calls = fields.array(message.get("tool_calls"), f"{place}.tool_calls")
    if message.get("function_call") is not None:
        calls = [*calls, {"function": message["function_call"]}]
    if calls:
        turn["tool_calls"] = [_call(call, f"{place}.tool_calls[]") for call in calls]
    elif not parts:
        parts.append({"type": "text", "text": ""})
    return Turn(turn, index)


def _call(value: object, place: str) -> dict[str, Any]:
    call = fields.only(value, place, {"id", "type", "index", "function"})
    function = fields.only(call.get("function"), f"{place}.function", {"name", "arguments"})
    return {
        "id": fields.identifier(call.get("id"), f"{place}.id"),
        "function": {
            "name": fields.text(function.get("name"), f"{place}.function.name"),
            "arguments": fields.text(function.get("arguments"), f"{place}.function.arguments"),
        },
    }


def _content(value: object, place: str, unread: list[str]) -> list[dict[str, Any]]:
    if value is None:
        return []
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    parts = []
    for index, one in enumerate(fields.array(value, place)):
        part = fields.obj(one, f"{place}[{index}]", _PART_KEYS)
        kind = part.get("type")
        if kind in ("text", "refusal", "thinking"):
            said = fields.only(part, f"{place}[{index}]", {"type", kind}).get(kind)
            parts.append({"type": "text", "text": fields.text(said, f"{place}[{index}].{kind}")})
        elif kind == "image_url" and (url := _data_url(part, f"{place}[{index}]")):
            parts.append({"type": "image_url", "image_url": url})
        else:
            unread.append(f"{place}[{index}]")
    return parts


def _data_url(value: object, place: str) -> str | None:
    """The image's data: URI; None for an address, behind which another image may lie next time."""
    part = fields.only(value, place, {"type", "image_url", "detail"})
    image = part.get("image_url")
    if isinstance(image, dict):
        image = fields.only(image, f"{place}.image_url", {"url", "detail"}).get("url")
    url = fields.text(image, f"{place}.image_url")
    return url if url[:5].lower() == "data:" else None


def _has_ended(choice: Mapping[str, Any]) -> bool:
    return choice.get("finish_reason") is not None


def _pieces(body: Mapping[str, Any], key: str) -> Iterator[Piece]:
    yield from fields.other_pieces(
        {name: value for name, value in body.items() if name != "choices"}, _REPLY_KEYS, 0, ""
    )
    for place, one in enumerate(fields.array(body.get("choices"), "choices")):
        choice = fields.obj(one, f"choices[{place}]")
        index = openai.choice_index(choice)
        said = choice.get(key)
        message = fields.obj({} if said is None else said, f"choices[{place}].{key}")
        yield from _message_pieces(message, index)
        yield from openai.logprob_pieces(choice.get("logprobs"), message, index)
        rest = {name: value for name, value in choice.items() if name not in (key, "logprobs")}
        yield from fields.other_pieces(rest, _CHOICE_KEYS, index, "choice")


def _message_pieces(message: Mapping[str, Any], index: int) -> Iterator[Piece]:
    if message.get("audio") is not None:
        raise Unreadable("audio in a reply cannot be judged")
    rest = {name: value for name, value in message.items() if name not in _CALLS}
    yield from fields.other_pieces(rest, _MESSAGE_STRUCTURE, index, "message")
    for place, one in enumerate(fields.array(message.get("tool_calls"), "tool_calls")):
        call = fields.obj(one, "tool_calls[]")
        at = fields.count(call.get("index"), "tool_calls[].index", place, 1023)
        yield from _call_pieces(call, index, f"tool_calls[{at}]")
    if message.get("function_call") is not None:
        yield from _call_pieces({"function": message["function_call"]}, index, "function_call")


def _call_pieces(call: Mapping[str, Any], index: int, path: str) -> Iterator[Piece]:
    function = fields.obj(call.get("function") or {}, f"{path}.function")
    yield from fields.other_pieces(function, (), index, path)
    rest = {name: value for name, value in call.items() if name != "function"}
    yield from fields.other_pieces(rest, _CALL_STRUCTURE, index, path)


def _refusal_events(
    head: Mapping[str, Any],
    choices: Sequence[int],
    refusal: Refusal,
    spoken: frozenset[int] | set[int] = frozenset(),
) -> bytes:
    events = []
    for index in choices:
        deltas: list[tuple[dict[str, Any], str | None]] = [({}, "content_filter")]
        if index not in spoken:
            deltas.insert(0, ({"role": "assistant", "content": refusal.text}, None))
        for delta, reason in deltas:
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
            chunk = {**head, "object": "chat.completion.chunk", "choices": [choice]}
            events.append(sse.event(dump(chunk)))
    return b"".join(events) + openai.DONE
