"""Llama Stack's own inference API: /v1/inference/chat-completion, completion, and their batches.

(Its routes below /v1/openai speak OpenAI's protocol.) The protocol has no stop reason for what was
filtered: a refusal is the end of a turn, its text stands behind what had been said, and programs
tell it by the metric `content_filtered`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from guard_middleware.formats import fields, llama_stack_messages, sse
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

# Of requests: what steers the backend and is plain.
_CONTROLS = fields.names(
    "model_id model sampling_params logprobs stream tool_choice tool_prompt_format tool_config"
)
_MOST_RANKS = 32
# Of replies: what the backend, not the model, writes.
_STRUCTURE = fields.names("role stop_reason event_type metrics")
_MARK = {"metrics": [{"metric": "content_filtered", "value": 1}]}
_OVER = {"stop_reason": "end_of_turn", "logprobs": None}


class LlamaStack:
    """One of the four: chat or completion, of one prompt or of a batch."""

    stream_types = ("text/event-stream",)

    def __init__(self, *, chat: bool, batch: bool = False) -> None:
        self._chat = chat
        self._batch = batch
        self._key = ("messages" if chat else "content") + ("_batch" if batch else "")
        operation = ("batch-" if batch else "") + ("chat-completion" if chat else "completion")
        self.name = f"llama-stack-{operation}"
        self.paths: tuple[str, ...] = (f"/**/inference/{operation}",)

    def read_request(self, path: str, body: Json) -> Asked:
        """What is asked."""
        asked = fields.obj(body, "the body", {*_CONTROLS, self._key})
        given = asked.get(self._key)
        unread: list[str] = []
        if self._batch:
            prompts = [
                tuple(self._turns(one, f"{self._key}[{index}]", unread))
                for index, one in enumerate(fields.array(given, self._key))
            ]
        else:
            prompts = [tuple(self._turns(given, self._key, unread))]
        if not prompts or not all(prompts):
            raise Unreadable(f"{self._key} is empty")
        extra = fields.extra_turns(asked, {self._key}, _CONTROLS)
        fields.check_batch(prompts, 1, extra)
        return Asked(
            prompts=tuple((*extra, *prompt) for prompt in prompts),
            streams=not self._batch and fields.flag(asked.get("stream"), "stream"),
            model=fields.text(asked.get("model_id"), "model_id"),
            unread=tuple(unread),
        )

    def _turns(self, value: object, place: str, unread: list[str]) -> Iterator[Turn]:
        if not self._chat:
            if parts := llama_stack_messages.content(value, place, unread):
                yield Turn({"role": "user", "content": parts})
            return
        for index, message in enumerate(fields.array(value, place)):
            turn = llama_stack_messages.turn(message, f"{place}[{index}]", unread)
            yield Turn(turn, None if self._batch else index)

    def without(self, body: Json, places: frozenset[int]) -> Json:
        """The body without these messages."""
        return fields.without(body, self._key, places)

    def read_reply(self, asked: Asked, body: Json) -> Sequence[Piece]:
        """Every text of a whole reply."""
        reply = fields.obj(body, "the reply")
        if not self._batch:
            return tuple(self._pieces(reply, 0))
        pieces: list[Piece] = []
        for index, one in enumerate(fields.array(reply.get("batch"), "batch")):
            pieces += self._pieces(fields.obj(one, f"batch[{index}]"), index)
        pieces += fields.other_pieces(_less(reply, "batch"), _STRUCTURE, 0, "reply")
        return pieces

    def _pieces(self, reply: Mapping[str, Any], choice: int) -> Iterator[Piece]:
        message = fields.obj(reply.get("completion_message") or {}, "completion_message")
        said = "".join(_spoken((message if self._chat else reply).get("content")))
        if said:
            yield Piece(Channel(choice, "content"), said)
        yield from _logprobs(reply.get("logprobs"), said, choice)
        for index, call in enumerate(fields.array(message.get("tool_calls"), "tool_calls")):
            yield from _called(call, choice, f"tool_calls[{index}]")
        read = "completion_message" if self._chat else "content"
        for path, rest in (
            ("message", _less(message, "tool_calls", "content" if self._chat else "")),
            ("reply", _less(reply, "logprobs", read)),
        ):
            yield from fields.other_pieces(rest, _STRUCTURE, choice, path)

    def open_stream(self, asked: Asked, content_type: str) -> ReplyStream:
        """A reader for one streamed reply."""
        return LlamaStackStream(self._chat)

    def refuse(self, asked: Asked, refusal: Refusal) -> Answer:
        """A reply that ends the turn, with the mark."""
        if asked.streams:
            said = LlamaStackStream(self._chat).refuse(refusal)
            return Answer(200, "text/event-stream; charset=utf-8", said)
        one: dict[str, Any] = {"content": refusal.text, **_OVER, **_MARK}
        if self._chat:
            message: dict[str, Any] = {"role": "assistant", "content": refusal.text}
            message |= {"stop_reason": _OVER["stop_reason"], "tool_calls": []}
            one = {"completion_message": message, "logprobs": None, **_MARK}
        return _answer(200, {"batch": [one] * len(asked.prompts)} if self._batch else one)

    def error(self, status: int, code: str, message: str) -> Answer:
        """An error as its server gives it."""
        return _answer(status, {"error": {"detail": message, "code": code}})


LLAMA_STACK = (
    LlamaStack(chat=True),
    LlamaStack(chat=False),
    LlamaStack(chat=True, batch=True),
    LlamaStack(chat=False, batch=True),
)


class LlamaStackStream(sse.SseStream):
    """A streamed reply."""

    def __init__(self, chat: bool) -> None:
        super().__init__()
        self._chat = chat
        self._calls = 0  # that were read
        self._begun = self._spoken = self._done = False  # what the client has seen

    def read(self, frame: sse.Frame) -> Event:
        """The event of a frame."""
        if not frame.data:
            return Event(frame.raw)
        chunk = fields.obj(parse(frame.data), "an event")
        event, outside = chunk, {}
        if self._chat:
            event = fields.obj(chunk.get("event") or {}, "event")
            outside = _less(chunk, "event")
        pieces = [*self._delta(event)]
        for rest in (outside, _less(event, "delta", "logprobs")):
            pieces += fields.other_pieces(rest, _STRUCTURE, 0, "event")
        ends = event.get("event_type") == "complete" if self._chat else event.get("stop_reason")
        over = bool(ends or chunk.get("error"))
        return Event(frame.raw, tuple(pieces), (0,) if over else (), over)

    def _delta(self, event: Mapping[str, Any]) -> Iterator[Piece]:
        """Text, or a call of a tool: as raw text while it grows, at last as an object."""
        given = event.get("delta")
        delta = {"text": given} if isinstance(given, str) else fields.obj(given or {}, "delta")
        if delta.get("image"):
            raise Unreadable("holds an image, which cannot be judged")
        said = fields.text(delta.get("text"), "delta.text")
        call = delta.get("tool_call")
        if said:
            yield Piece(Channel(0, "content"), said)
        if isinstance(call, str):
            if call:
                yield Piece(Channel(0, "tool_call"), call)
            said = said or call
        elif call is not None:
            yield from _called(call, 0, f"tool_calls[{self._calls}]")
            self._calls += 1
        yield from _logprobs(event.get("logprobs"), said, 0)
        rest = _less(delta, "text", "tool_call")
        yield from fields.other_pieces(rest, {"type", "parse_status"}, 0, "delta")

    def released(self, event: Event) -> None:
        """Keep what a closing event depends on."""
        self._begun = self._begun or event.value is not None
        self._spoken = self._spoken or bool(event.pieces)
        self._done = self._done or event.value is True

    def refuse(self, refusal: Refusal) -> bytes:
        """The refusal's text, and the end."""
        if self._done:
            return b""
        said = f"\n\n{refusal.text}" if self._spoken else refusal.text
        events: list[dict[str, Any]] = [{"delta": said}, {"delta": "", **_OVER}]
        if self._chat:
            events = [_event("progress", said), _event("complete", "", **_OVER)]
            if not self._begun:
                events.insert(0, _event("start", ""))
        return b"".join(sse.event(dump({**event, **_MARK})) for event in events)

    def abort(self) -> bytes:
        """An error, as its server sends it in a stream."""
        error = {"message": "The model's stream broke off.", "code": "upstream_failed"}
        return b"" if self._done else sse.event(dump({"error": error}))


def _event(kind: str, said: str, **more: Any) -> dict[str, Any]:
    return {"event": {"event_type": kind, "delta": {"type": "text", "text": said}, **more}}


def _answer(status: int, body: Json) -> Answer:
    return Answer(status, "application/json", dump(body))


def _less(value: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: inner for key, inner in value.items() if key not in keys}


def _spoken(value: object) -> Iterator[str]:
    if isinstance(value, str) or value is None:
        yield value or ""
        return
    for one in [value] if isinstance(value, dict) else fields.array(value, "content"):
        item = fields.only(one, "content[]", {"type", "text"})  # an image cannot be judged
        yield fields.text(item.get("text"), "content[].text")


def _called(value: object, choice: int, path: str) -> Iterator[Piece]:
    call = fields.obj(value, path)
    if given := llama_stack_messages.spelled(call.get("arguments")):
        yield Piece(Channel(choice, f"{path}.arguments"), given)
    yield from fields.other_pieces(_less(call, "arguments"), {"call_id"}, choice, path)


def _logprobs(value: object, said: str, choice: int) -> Iterator[Piece]:
    """Tokens by rank: a channel for each, for that is how they are read. The first ones are no text
    of their own where they are the very text they belong to."""
    entries = [fields.obj(one, "logprobs[]") for one in fields.array(value, "logprobs")]
    positions = [fields.obj(one.get("logprobs_by_token") or {}, "logprobs[]") for one in entries]
    same = "".join(next(iter(position), "") for position in positions) == said
    for position in positions:
        if len(position) > _MOST_RANKS or not all(
            isinstance(one, int | float) for one in position.values()
        ):
            raise Unreadable("logprobs has an entry that is none")
        for rank, token in enumerate(position):
            if token and not (same and rank == 0):
                yield Piece(Channel(choice, f"logprobs[{rank}]"), token)
    for entry in entries:
        yield from fields.other_pieces(_less(entry, "logprobs_by_token"), (), choice, "logprobs")
