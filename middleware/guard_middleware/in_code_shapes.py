"""What callers of models in process give and get, read through the formats as turns and pieces."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from numbers import Integral, Real
from typing import Any, Protocol

from guard_middleware.formats import fields, sse
from guard_middleware.formats.contract import (
    Asked,
    Channel,
    Event,
    Format,
    Piece,
    Refusal,
    ReplyStream,
    Turn,
    Unreadable,
)
from guard_middleware.formats.openai_chat import OpenAIChat
from guard_middleware.strict_json import Json, dump, parse

Given = dict[str, Any]
_CHAT = OpenAIChat()


class Growing(Protocol):
    """A streamed reply, chunk by chunk; the `value` of its events is its own."""

    def feed(self, chunk: Any) -> Event:
        """The event that a chunk is. Raises Unreadable, Malformed; TypeError for what is none."""
        ...

    def released(self, event: Event) -> Any:
        """The chunk of an event that the caller is given now."""
        ...

    def refuse(self, refusal: Refusal) -> Sequence[Any]:
        """The chunks that end the caller's stream behind those that were released."""
        ...


class Shape(Protocol):
    """How one kind of callable is asked and how it answers. Stateless, shared."""

    @property
    def name(self) -> str:
        """For metrics and logs."""
        ...

    def read(self, given: Given) -> Asked:
        """What is asked, from the arguments by name. Raises Unreadable; TypeError."""
        ...

    def without(self, given: Given, places: frozenset[int]) -> Given:
        """The arguments without the messages of these places."""
        ...

    def pieces(self, asked: Asked, given: Given, reply: Any) -> Sequence[Piece]:
        """Every text of a whole reply. Raises Unreadable; TypeError for what is no reply."""
        ...

    def refuse(self, asked: Asked, given: Given, refusal: Refusal) -> Any:
        """A whole reply that says no."""
        ...

    def grow(self, asked: Asked) -> Growing:
        """A reader for one streamed reply."""
        ...


class Method:
    """A method that takes and gives what a wire format does, as objects: llama.cpp's, OpenAI's.

    `whole` and `chunk` make the objects that it gives out of the wire's.
    """

    def __init__(
        self,
        format_: Format,
        whole: Callable[[Any], Any] = lambda value: value,
        chunk: Callable[[Any], Any] = lambda value: value,
    ) -> None:
        self.name = format_.name
        self._format = format_
        self._whole = whole
        self._chunk = chunk

    def read(self, given: Given) -> Asked:
        """What is asked."""
        return self._format.read_request("", given)

    def without(self, given: Given, places: frozenset[int]) -> Given:
        """The arguments without these messages."""
        return fields.obj(self._format.without(given, places), "the arguments")

    def pieces(self, asked: Asked, given: Given, reply: Any) -> Sequence[Piece]:
        """Every text of a whole reply."""
        return self._format.read_reply(asked, read_json(reply, "the reply"))

    def refuse(self, asked: Asked, given: Given, refusal: Refusal) -> Any:
        """The format's refusal."""
        return self._whole(parse(self._format.refuse(asked, refusal).body))

    def grow(self, asked: Asked) -> Growing:
        """A reader for one streamed reply."""
        return _Chunks(self._format.open_stream(asked, self._format.stream_types[0]), self._chunk)


class _Chunks:
    def __init__(self, stream: ReplyStream, make: Callable[[Any], Any]) -> None:
        self._stream = stream
        self._make = make

    def feed(self, chunk: Any) -> Event:
        [event] = self._stream.feed(sse.event(dump(read_json(chunk, "a chunk of the reply"))))
        return Event(b"", event.pieces, event.ended, (event, chunk))

    def released(self, event: Event) -> Any:
        wire, chunk = event.value
        self._stream.released(wire)
        return chunk

    def refuse(self, refusal: Refusal) -> Sequence[Any]:
        frames = sse.Framer().feed(self._stream.refuse(refusal))
        said = [frame.data for frame in frames if frame.data not in (None, b"[DONE]")]
        return [self._make(parse(data)) for data in said if data is not None]


class Function:
    """A function of a text or of messages that gives a text, or a generator of texts.

    `first` names the argument that is the text or the messages; what else it is given is judged
    with these.
    """

    name = "function"

    def __init__(self, first: str, streams: bool) -> None:
        self._first = first
        self._streams = streams

    def read(self, given: Given) -> Asked:
        """What is asked."""
        turns = _turns(given.get(self._first), self._first)
        return Asked((_others(given, self._first) + turns,), streams=self._streams)

    def without(self, given: Given, places: frozenset[int]) -> Given:
        """The arguments without these messages."""
        return fields.without(given, self._first, places)

    def pieces(self, asked: Asked, given: Given, reply: Any) -> Sequence[Piece]:
        """The text."""
        return _said(0, _text(reply, "the reply"))

    def refuse(self, asked: Asked, given: Given, refusal: Refusal) -> Any:
        """The refusal's text."""
        return refusal.text

    def grow(self, asked: Asked) -> Growing:
        """A reader for one generator."""
        return _Texts()


class _Texts:
    def __init__(self) -> None:
        self._spoken = False

    def feed(self, chunk: Any) -> Event:
        return Event(b"", tuple(_said(0, _text(chunk, "a piece of the reply"))), value=chunk)

    def released(self, event: Event) -> Any:
        self._spoken = self._spoken or bool(event.pieces)
        return event.value

    def refuse(self, refusal: Refusal) -> Sequence[Any]:
        return [f"\n\n{refusal.text}" if self._spoken else refusal.text]


class Pipeline:
    """A transformers pipeline for text generation: texts or chats in, lists of dicts out."""

    name = "pipeline"
    _FIRST = "text_inputs"
    _CUTS = ("truncation", "handle_long_generation")  # the model reads less than was judged

    def read(self, given: Given) -> Asked:
        """What is asked: each text and each chat is a prompt of its own."""
        others = _others(given, self._FIRST)
        inputs, batch = self._inputs(given)
        prompts = tuple(others + _turns(one, self._FIRST) for one in inputs)
        if batch:  # places of several chats cannot be told apart: none of their turns is left out
            prompts = tuple(tuple(replace(turn, place=None) for turn in one) for one in prompts)
        choices = fields.count(given.get("num_return_sequences"), "num_return_sequences", 1, 128)
        unread = tuple(name for name in self._CUTS if given.get(name))
        return Asked(prompts, choices=max(1, choices), unread=unread)

    def without(self, given: Given, places: frozenset[int]) -> Given:
        """The arguments without these messages of their one chat."""
        return fields.without(given, self._FIRST, places)

    def pieces(self, asked: Asked, given: Given, reply: Any) -> Sequence[Piece]:
        """What was generated, less the prompt in front of it."""
        inputs, batch = self._inputs(given)
        replies = reply if batch else [reply]
        if not isinstance(replies, list) or len(replies) != len(inputs):
            raise TypeError("the pipeline's reply is not a list with a reply for each input")
        found: list[Piece] = []
        for place, (one, said) in enumerate(zip(inputs, replies, strict=True)):
            for index, text in enumerate(_generated(said)):
                choice = place * asked.choices + index
                found += _said(choice, _behind(one, text))
        return found

    def refuse(self, asked: Asked, given: Given, refusal: Refusal) -> Any:
        """The refusal, for every input, in the place of what would have been generated."""
        inputs, batch = self._inputs(given)
        full = given.get("return_full_text", True) is not False
        replies = [
            [{"generated_text": _refused(one, refusal.text, full)} for _ in range(asked.choices)]
            for one in inputs
        ]
        return replies if batch else replies[0]

    def grow(self, asked: Asked) -> Growing:
        """Pipelines do not stream."""
        raise TypeError("a pipeline's reply is not streamed")

    def _inputs(self, given: Given) -> tuple[list[Any], bool]:
        """The prompts, and whether they are a batch."""
        value = given.get(self._FIRST)
        if isinstance(value, list) and value and not isinstance(value[0], dict):
            return value, True
        return [value], False


def read_json(value: Any, place: str) -> Json:
    """Plain values of what is made of plain values; TypeError names what is not."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):  # numpy's too
        return float(value)
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"{place} has keys that are no texts, and cannot be screened")
        return {key: read_json(inner, f"{place}.*") for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [read_json(inner, f"{place}[]") for inner in value]
    if inspect.ismethod(as_plain := getattr(value, "model_dump", None)):  # pydantic's models
        return read_json(as_plain(mode="json"), place)
    raise TypeError(f"{place}: what is of type {type(value).__name__} cannot be screened")


def _turns(value: Json, place: str) -> tuple[Turn, ...]:
    messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
    if not isinstance(messages, list):
        raise TypeError(f"{place} is neither a text nor a list of messages")
    return _CHAT.read_request("", {"messages": messages}).prompts[0]


def _others(given: Given, first: str) -> tuple[Turn, ...]:
    """A turn of the user that holds the texts of all other arguments."""
    extra = fields.extra_turns(given, (first,), ())
    return tuple(Turn({"role": "user", "content": turn.content["content"]}) for turn in extra)


def _said(choice: int, text: str) -> Sequence[Piece]:
    return [Piece(Channel(choice, "content"), text)] if text else []


def _text(value: object, place: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{place} is of type {type(value).__name__}: only texts can be screened")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Unreadable(f"{place} holds a lone surrogate") from None
    return value


def _generated(reply: object) -> Iterator[Any]:
    if not isinstance(reply, list):
        raise TypeError("the pipeline's reply is not a list")
    for one in reply:
        if not isinstance(one, dict) or set(one) != {"generated_text"}:
            raise TypeError("the pipeline's reply holds something else than generated_text")
        yield one["generated_text"]


def _behind(prompt: Any, generated: Any) -> str:
    """The text that stands behind the prompt; all of it where the prompt is not in front."""
    if isinstance(generated, str):
        return _text(generated, "generated_text").removeprefix(
            prompt if isinstance(prompt, str) else ""
        )
    messages = read_json(generated, "generated_text")
    if not isinstance(messages, list):
        raise TypeError("generated_text is neither a text nor a list of messages")
    same = 0
    for before, after in zip(prompt, messages, strict=False):
        if before != after:
            break
        same += 1
    return "".join(piece.text for one in messages[same:] for piece in _read_message(one))


def _read_message(message: Json) -> Iterator[Piece]:
    body = {"choices": [{"message": message}]}
    yield from _CHAT.read_reply(Asked(((),)), body)


def _refused(prompt: Any, text: str, full: bool) -> Any:
    if not full:
        return text
    if isinstance(prompt, str):
        return prompt + text
    return [*prompt, {"role": "assistant", "content": text}]
