"""What a format is: pure functions between one backend protocol's bytes and turns and pieces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from guard_middleware.strict_json import Json


class Unreadable(ValueError):
    """The body is not what the protocol knows. The text names the place, never the content."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn as GuardClient takes it (`role`, `content`, `tool_calls`, `tool_call_id`).

    `place` is its index in the body's list of messages, where it has one.
    """

    content: Mapping[str, Any]
    place: int | None = None

    @property
    def role(self) -> str:
        """The author's role."""
        return str(self.content["role"])


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request asks of the backend.

    Choice number i of the reply answers `prompts[i // choices]`. `unread` names the places of what
    no guard can read (audio, token ids): the middleware's `unscannable` says what follows.
    """

    prompts: tuple[tuple[Turn, ...], ...]
    streams: bool = False
    choices: int = 1
    model: str = ""
    unread: tuple[str, ...] = ()

    def prompt_of(self, choice: int) -> tuple[Turn, ...]:
        """The turns that a choice answers."""
        return self.prompts[min(max(choice, 0) // self.choices, len(self.prompts) - 1)]


@dataclass(frozen=True, slots=True)
class Channel:
    """One growing text of a reply: a reader puts the pieces of a channel one behind the other."""

    choice: int
    name: str


@dataclass(frozen=True, slots=True)
class Piece:
    """Text added to a channel."""

    channel: Channel
    text: str


@dataclass(frozen=True, slots=True)
class Event:
    """The smallest part of a stream that is sent on or held back, whole.

    `raw` is what is sent on. Every text in it that is not the protocol's own lies in `pieces`.
    `ended` are the choices of which nothing more will come. `value` is for the stream's own use.
    """

    raw: bytes
    pieces: tuple[Piece, ...] = ()
    ended: tuple[int, ...] = ()
    value: Any = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole response of ours."""

    status: int
    content_type: str
    body: bytes
    headers: tuple[tuple[bytes, bytes], ...] = ()


@dataclass(frozen=True, slots=True)
class Refusal:
    """What stands in place of what was blocked; `created` in seconds since 1970."""

    text: str
    id: str
    created: int


class ReplyStream(Protocol):
    """One streamed reply, cut into events. No I/O; what is fed may be split at any byte."""

    def feed(self, data: bytes) -> Sequence[Event]:
        """The events that are complete now. Raises Unreadable, Malformed: nothing after counts."""
        ...

    def finish(self) -> Sequence[Event]:
        """What was left at the backend's end of the stream. Raises as `feed` does."""
        ...

    def released(self, event: Event) -> None:
        """Take note of what the client has seen: events in order, each once."""
        ...

    def refuse(self, refusal: Refusal) -> bytes:
        """What ends the client's stream well-formed, after the events that were released."""
        ...

    def abort(self) -> bytes:
        """The same when the backend broke off: the protocol's own way to say so."""
        ...

    def keep_alive(self) -> bytes:
        """Bytes that clients ignore; empty where the protocol has none."""
        ...


class Format(Protocol):
    """One backend protocol. Stateless, shared."""

    @property
    def name(self) -> str:
        """For metrics and logs: "openai-chat"."""
        ...

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of its POST requests, in lower case; `*` is one segment, `**` any number."""
        ...

    @property
    def stream_types(self) -> tuple[str, ...]:
        """Media types of streamed replies; every other reply is read whole."""
        ...

    def read_request(self, path: str, body: Json) -> Asked:
        """What is asked. Raises Unreadable; ValueError of what is no turn comes later."""
        ...

    def without(self, body: Json, places: frozenset[int]) -> Json:
        """The body without the messages of these places; not changed in place."""
        ...

    def read_reply(self, asked: Asked, body: Json) -> Sequence[Piece]:
        """Every text of a whole reply, an error's too. Raises Unreadable."""
        ...

    def open_stream(self, asked: Asked, content_type: str) -> ReplyStream:
        """A reader for one streamed reply."""
        ...

    def refuse(self, asked: Asked, refusal: Refusal) -> Answer:
        """A reply that says no as if the model had: streamed if a stream was asked for."""
        ...

    def error(self, status: int, code: str, message: str) -> Answer:
        """An error in the protocol's own shape; `code` is for programs."""
        ...
