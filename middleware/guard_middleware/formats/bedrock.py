"""AWS Bedrock's Converse and ConverseStream, whatever the model behind them.

A request is forwarded as it was judged: read, and written again, to another host. A SigV4
signature of the client's covers body and host, so it does not hold behind the guard. Clients
present a Bedrock API key (a bearer token, passed on as it is), or the sidecar's upstream is a
proxy that signs with credentials of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

from guard_middleware.formats import bedrock_blocks, eventstream, fields
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
    """
    inferenceConfig guardrailConfig additionalModelResponseFieldPaths performanceConfig serviceTier
    projectIdentifier
    """
)
# Of requests: what is read here, and labels that no model reads.
_READ = fields.names("messages system promptVariables requestMetadata")
_ROLES = ("user", "assistant", "system")
# Of replies: what the backend, not the model, writes. `p` pads events to hide their size.
_STRUCTURE = fields.names(
    "contentBlockIndex role stopReason usage metrics performanceConfig serviceTier p"
)
_DOCUMENTS = ("trace", "additionalModelResponseFields")
_MOST_BLOCKS = 4096
_FILTERED = "guardrail_intervened"
_ERRORS = {
    403: "AccessDeniedException",
    404: "ResourceNotFoundException",
    429: "ThrottlingException",
    503: "ServiceUnavailableException",
}


class Bedrock:
    """Converse and ConverseStream."""

    name = "bedrock"
    paths = ("/**/model/**/converse", "/**/model/**/converse-stream")
    stream_types = (eventstream.MEDIA_TYPE,)

    def read_request(self, path: str, body: Json) -> Asked:
        """What is asked."""
        asked = fields.obj(body, "the body", _CONTROLS | _READ)
        fields.refuse_keys(asked, ("promptVariables",))
        path = _unescaped(path)
        if ":prompt/" in path.casefold():
            raise Unreadable("names a stored prompt, which cannot be judged, as its model")
        messages = fields.array(asked.get("messages"), "messages")
        if not messages:
            raise Unreadable("messages is empty")
        unread: list[str] = []
        turns = [*_system(asked.get("system"), unread)]
        turns += fields.extra_turns(asked, _READ, _CONTROLS)
        for index, message in enumerate(messages):
            turns += _turns(message, index, unread)
        model = path.rpartition("/")[0].partition("/model/")[2]
        streams = path.casefold().endswith("-stream")
        return Asked((tuple(turns),), streams, model=model, unread=tuple(unread))

    def without(self, body: Json, places: frozenset[int]) -> Json:
        """The body without these messages."""
        return fields.without(body, "messages", places)

    def read_reply(self, asked: Asked, body: Json) -> Sequence[Piece]:
        """Every text of a whole reply."""
        return tuple(_pieces(fields.obj(body, "the reply")))

    def open_stream(self, asked: Asked, content_type: str) -> ReplyStream:
        """A reader for one streamed reply."""
        return ConverseStream()

    def refuse(self, asked: Asked, refusal: Refusal) -> Answer:
        """A reply with the stop reason of a guardrail."""
        if asked.streams:
            return Answer(200, eventstream.MEDIA_TYPE, ConverseStream().refuse(refusal))
        message = {"role": "assistant", "content": [{"text": refusal.text}]}
        body = {"output": {"message": message}, "stopReason": _FILTERED, **_measures()}
        return Answer(200, "application/json", dump(body))

    def error(self, status: int, code: str, message: str) -> Answer:
        """An AWS error: clients raise what the header names."""
        other = "ValidationException" if status < 500 else "InternalServerException"
        kind = _ERRORS.get(status, other)
        body = dump({"message": message, "code": code})
        return Answer(
            status, "application/json", body, headers=((b"x-amzn-errortype", kind.encode()),)
        )


class ConverseStream:
    """A streamed reply.

    Clients put texts together by block or by arrival. Both are the same text here: a block that
    goes on after a later one has begun is unreadable.
    """

    def __init__(self) -> None:
        self._framer = eventstream.Framer()
        self._newest = 0  # block that was read
        self._begun = self._spoken = self._done = False  # what the client has seen
        self._open: int | None = None
        self._next = 0

    def feed(self, data: bytes) -> Sequence[Event]:
        """The events that are complete now."""
        return [self._read(frame) for frame in self._framer.feed(data)]

    def finish(self) -> Sequence[Event]:
        """Nothing, if the stream ended between two frames."""
        self._framer.finish()
        return ()

    def _read(self, frame: eventstream.Frame) -> Event:
        headers = frame.headers
        value = fields.obj(parse(frame.payload or b"{}"), "an event")
        match headers.get(":message-type"):
            case "event":
                name = headers.get(":event-type", "")
                pieces = [*self._event_pieces(name, value)]
            case "exception" | "error":
                name = "error"
                pieces = [*fields.tree_pieces(value, 0, name)]
            case _:
                raise Unreadable("has a frame of no known type")
        if prose := headers.get(eventstream.PROSE):
            pieces.append(Piece(Channel(0, eventstream.PROSE), prose))
        ended = (0,) if name in ("messageStop", "error") else ()
        return Event(frame.raw, tuple(pieces), ended, (name, self._newest))

    def _event_pieces(self, name: str, value: Mapping[str, Any]) -> Iterator[Piece]:
        index = fields.count(
            value.get("contentBlockIndex"), "contentBlockIndex", self._newest, _MOST_BLOCKS
        )
        if index < self._newest:
            raise Unreadable("goes back to an earlier block")
        self._newest = index
        for key in ("start", "delta"):
            block = fields.obj(value.get(key) or {}, f"{name}.{key}")
            yield from bedrock_blocks.pieces(block, index)
        rest = {key: inner for key, inner in value.items() if key not in ("start", "delta")}
        yield from _rest(rest, name)

    def released(self, event: Event) -> None:
        """Keep what a closing event has to repeat."""
        name, index = event.value
        self._spoken = self._spoken or bool(event.pieces)
        match name:
            case "messageStart":
                self._begun = True
            case "contentBlockStart" | "contentBlockDelta":
                self._open, self._next = index, index + 1
            case "contentBlockStop":
                self._open = None
            case "messageStop" | "error":
                self._done = True

    def refuse(self, refusal: Refusal) -> bytes:
        """The block that was open ends, and the message with the stop reason of a guardrail."""
        if self._done:
            return b""
        events: list[tuple[str, Json]] = []
        if not self._begun:
            events.append(("messageStart", {"role": "assistant"}))
        if self._open is not None:
            events.append(("contentBlockStop", {"contentBlockIndex": self._open}))
        if not self._spoken:
            at = {"contentBlockIndex": self._next}
            events.append(("contentBlockDelta", {"delta": {"text": refusal.text}, **at}))
            events.append(("contentBlockStop", at))
        events += [("messageStop", {"stopReason": _FILTERED}), ("metadata", _measures())]
        return b"".join(eventstream.event(name, value) for name, value in events)

    def abort(self) -> bytes:
        """An exception, which clients raise."""
        message = {"message": "The model's stream broke off.", "originalStatusCode": 502}
        return b"" if self._done else eventstream.exception("modelStreamErrorException", message)

    def keep_alive(self) -> bytes:
        """There is nothing that every client ignores."""
        return b""


def _unescaped(path: str) -> str:
    """Ids of models may be ARNs, with colons and slashes, and escaped, more than once."""
    for _ in range(3):
        path = unquote(path)
    return path.rstrip("/")


def _measures() -> dict[str, Any]:
    usage = {"inputTokens": 0, "outputTokens": 0, "totalTokens": 0}
    return {"usage": usage, "metrics": {"latencyMs": 0}}


def _system(value: object, unread: list[str]) -> Iterator[Turn]:
    parts = []
    for index, one in enumerate(fields.array(value, "system")):
        place = f"system[{index}]"
        parts += bedrock_blocks.parts(*bedrock_blocks.block(one, place), place, unread)
    if parts:
        yield Turn({"role": "system", "content": parts})


def _turns(value: object, index: int, unread: list[str]) -> Iterator[Turn]:
    """A message's turns: results of tools, which stand among what the user says, are their own."""
    place = f"messages[{index}]"
    message = fields.only(value, place, {"role", "content"})
    role = fields.role(message.get("role"), f"{place}.role", _ROLES)
    turn: dict[str, Any] = {"role": role, "content": [], "tool_calls": []}
    empty = True
    for at, one in enumerate(fields.array(message.get("content"), f"{place}.content")):
        where = f"{place}.content[{at}]"
        kind, inner = bedrock_blocks.block(one, where)
        if kind == "toolResult":
            if turn["content"] or turn["tool_calls"]:
                yield _turn(turn, index)
                turn = {"role": role, "content": [], "tool_calls": []}
            yield _turn(bedrock_blocks.tool_result(inner, where, unread), index)
            empty = False
        elif kind == "toolUse":
            turn["tool_calls"].append(bedrock_blocks.tool_use(inner, where))
        else:
            turn["content"] += bedrock_blocks.parts(kind, inner, where, unread)
    if turn["content"] or turn["tool_calls"] or empty:
        yield _turn(turn, index)


def _turn(turn: Mapping[str, Any], index: int) -> Turn:
    kept = {key: value for key, value in turn.items() if value}
    if "tool_calls" not in kept:
        kept.setdefault("content", [{"type": "text", "text": ""}])
    return Turn(kept, index)


def _pieces(reply: Mapping[str, Any]) -> Iterator[Piece]:
    output = fields.obj(reply.get("output") or {}, "output")
    message = fields.obj(output.get("message") or {}, "output.message")
    for index, one in enumerate(fields.array(message.get("content"), "output.message.content")):
        block = fields.obj(one, f"output.message.content[{index}]")
        yield from bedrock_blocks.pieces(block, index)
    for path, value, known in (
        ("message", message, "content"),
        ("output", output, "message"),
        ("reply", reply, "output"),
    ):
        yield from _rest({key: inner for key, inner in value.items() if key != known}, path)


def _rest(value: Mapping[str, Any], path: str) -> Iterator[Piece]:
    """What is no block. Free-form documents are one text each: they have any number of parts."""
    for key in _DOCUMENTS:
        if value.get(key):
            yield Piece(Channel(0, key), dump(value[key]).decode())
    rest = {key: inner for key, inner in value.items() if key not in _DOCUMENTS}
    bedrock_blocks.refuse_opaque(rest)
    yield from fields.other_pieces(rest, _STRUCTURE, 0, path)
