"""llama.cpp's own protocol: /completion and /completions (without /v1), and /infill.

Its stop types know no filter: refusals say `content_filter`, as OpenAI's protocols do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from guard_middleware.formats import fields, openai, sse
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

# Of requests: what steers the backend and is plain. Numbers and truth values always are.
_CONTROLS = fields.names("model stream_options logit_bias samplers lora")
# Of requests: text that no model reads.
_LABELS = fields.names("stop dry_sequence_breakers response_fields")
_READ = _LABELS | fields.names("prompt image_data")
_READ_BY_INFILL = _READ | fields.names("input_prefix input_suffix input_extra")
# Of requests: what changes the prompt behind the guard's back.
_UNJUDGEABLE = fields.names("system_prompt chat_template")
_KNOWN = _CONTROLS | _READ_BY_INFILL | _UNJUDGEABLE | {"stream", "n", "n_cmpl"}

# Of replies: what the backend, not the model, writes.
_STRUCTURE = fields.names("index id_slot stop stop_type model tokens timings prompt_progress")
_READ_OF_REPLY = fields.names("content prompt completion_probabilities generation_settings")
_BREAKERS = ("\n", ":", '"', "*")  # where a request names none
_BEGIN_OF_TEXT = re.compile(r"<\|?\w{1,40}\|?>", re.ASCII)

Parts = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class LlamaCppAsked(Asked):
    """With the strings of its settings, which the reply repeats."""

    own: frozenset[str] = frozenset()


class LlamaCpp:
    """Completions of one prompt or of several, each with `n_cmpl` choices."""

    name = "llama-cpp"
    paths = ("/completion", "/completions", "/infill")
    stream_types = ("text/event-stream",)

    def read_request(self, path: str, body: Json) -> LlamaCppAsked:
        """What is asked."""
        asked = fields.obj(body, "the body", _KNOWN)
        fields.refuse_keys(asked, _UNJUDGEABLE)
        unread: list[str] = []
        if path.casefold().rstrip("/").endswith("infill"):
            read, contents = _READ_BY_INFILL, [_infill(asked)]
        else:
            read, contents = _READ, [*_prompts(asked.get("prompt"), unread)]
        if images := _images(asked.get("image_data")):
            if len(contents) > 1:
                raise Unreadable("image_data belongs to one prompt, and there are more")
            contents = [[*contents[0], *images]]
        extra = fields.extra_turns(asked, read, _CONTROLS)
        prompts = tuple((*extra, Turn({"role": "user", "content": one})) for one in contents)
        named = "n" if asked.get("n_cmpl") is None else "n_cmpl"
        choices = max(1, fields.count(asked.get(named), named, 1, fields.MOST_EACH))
        fields.check_batch(prompts, choices, extra)
        return LlamaCppAsked(
            prompts=prompts,
            streams=fields.flag(asked.get("stream"), "stream"),
            choices=choices,
            model=fields.text(asked.get("model"), "model"),
            unread=tuple(unread),
            own=frozenset(_strings([asked.get(key) for key in (*_LABELS, "grammar")])),
        )

    def without(self, body: Json, places: frozenset[int]) -> Json:
        """The body: its only turn is the newest."""
        return body

    def read_reply(self, asked: Asked, body: Json) -> Sequence[Piece]:
        """Every text of a whole reply: an object, or a list of them."""
        pieces: list[Piece] = []
        for place, one in enumerate(body if isinstance(body, list) else [body]):
            reply = fields.obj(one, "the reply")
            if _has_bare_tokens(reply):
                raise Unreadable("a reply has token ids without the text that they stand for")
            pieces += _pieces(asked, reply, place)
        return pieces

    def open_stream(self, asked: Asked, content_type: str) -> ReplyStream:
        """A reader for one streamed reply."""
        return LlamaCppStream(asked)

    def refuse(self, asked: Asked, refusal: Refusal) -> Answer:
        """A reply with the stop type of a content filter."""
        if asked.streams:
            events = LlamaCppStream(asked).refuse(refusal)
            return Answer(200, "text/event-stream; charset=utf-8", events)
        replies = [_said(asked, index, refusal.text, over=True) for index in _choices(asked)]
        body = dump(replies if len(replies) > 1 else replies[0])
        return Answer(200, "application/json; charset=utf-8", body)

    def error(self, status: int, code: str, message: str) -> Answer:
        """llama.cpp's error object, whose own code is a number."""
        return Answer(status, "application/json; charset=utf-8", _error(status, code, message))


class LlamaCppStream(sse.SseStream):
    """A streamed completion. Each choice ends with an event of its own; nothing follows the last.

    Ids of tokens run ahead of their text where the backend holds a part of it back: such ids are
    left out.
    """

    def __init__(self, asked: Asked) -> None:
        super().__init__()
        self._asked = asked
        self._spoken: set[int] = set()
        self._closed: set[int] = set()

    def read(self, frame: sse.Frame) -> Event:
        """The event of a frame."""
        if not frame.data or frame.data.strip() == b"[DONE]":
            return Event(frame.raw)
        chunk = fields.obj(parse(frame.data), "an event")
        pieces = tuple(_pieces(self._asked, chunk, 0))
        raw = sse.event(dump({**chunk, "tokens": []})) if _has_bare_tokens(chunk) else frame.raw
        ended: tuple[int, ...] = (_index(chunk, 0),) if chunk.get("stop") is True else ()
        if chunk.get("error") is not None:
            ended = tuple(_choices(self._asked))
        return Event(raw, pieces, ended)

    def released(self, event: Event) -> None:
        """Keep which choices have to be ended."""
        self._spoken |= {piece.channel.choice for piece in event.pieces}
        self._closed |= set(event.ended)

    def refuse(self, refusal: Refusal) -> bytes:
        """Every choice that was open ends, behind the refusal if it said nothing."""
        events: list[dict[str, Any]] = []
        for index in self._left():
            if index not in self._spoken:
                events.append(_said(self._asked, index, refusal.text, over=False))
            events.append(_said(self._asked, index, "", over=True))
        return b"".join(sse.event(dump(event)) for event in events)

    def abort(self) -> bytes:
        """An error, as its server sends it in a stream."""
        error = _error(502, "upstream_failed", "The model's stream broke off.")
        return sse.event(error) if self._left() else b""

    def _left(self) -> list[int]:
        return sorted((self._spoken | set(_choices(self._asked))) - self._closed)


def _choices(asked: Asked) -> range:
    return range(asked.choices * len(asked.prompts))


def _infill(asked: Mapping[str, Any]) -> Parts:
    """The texts in the order in which the model reads them, all of them one turn."""
    texts: list[object] = []
    for index, one in enumerate(fields.array(asked.get("input_extra"), "input_extra")):
        extra = fields.only(one, f"input_extra[{index}]", {"filename", "text"})
        texts += (extra.get("filename"), extra.get("text"))
    texts += (asked.get(key) for key in ("input_prefix", "input_suffix", "prompt"))
    return [_text(fields.text(one, "a text of the infill")) for one in texts if one] or [_text("")]


def _prompts(value: object, unread: list[str]) -> Iterator[Parts]:
    """The contents of each prompt. A list with ids of tokens in it is one prompt."""
    if not isinstance(value, list) or any(isinstance(one, int) for one in value):
        yield _content(value, "prompt", unread)
    elif not value:
        raise Unreadable("prompt is empty")
    else:
        for index, one in enumerate(value):
            yield _content(one, f"prompt[{index}]", unread)


def _content(value: object, place: str, unread: list[str]) -> Parts:
    """A text, texts among ids of tokens (which no guard reads), or a text with images."""
    if isinstance(value, dict):
        given = fields.only(value, place, {"prompt_string", "multimodal_data"})
        images = fields.images(given.get("multimodal_data"), f"{place}.multimodal_data")
        return [_text(fields.text(given.get("prompt_string"), f"{place}.prompt_string")), *images]
    if not isinstance(value, list):
        return [_text(fields.text(value, place))]
    texts = [one for one in value if isinstance(one, str)]
    ids = [one for one in value if isinstance(one, int) and not isinstance(one, bool)]
    if len(texts) + len(ids) < len(value):
        raise Unreadable(f"{place} is neither a text nor texts and token ids")
    if ids:
        unread.append(place)
    return [_text(one) for one in texts or [""]]


def _images(value: object) -> Parts:
    """Images as older servers take them, beside the prompt."""
    listed = fields.array(value, "image_data")
    given = [fields.only(one, "image_data[]", {"id", "data"}) for one in listed]
    return fields.images([one.get("data") for one in given], "image_data")


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _strings(value: Json) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for one in value:
            yield from _strings(one)


def _index(reply: Mapping[str, Any], place: int) -> int:
    return fields.count(reply.get("index"), "index", place, fields.MOST_CHOICES - 1)


def _has_bare_tokens(reply: Mapping[str, Any]) -> bool:
    return bool(reply.get("tokens")) and not reply.get("content")


def _pieces(asked: Asked, reply: Mapping[str, Any], place: int) -> Iterator[Piece]:
    choice = _index(reply, place)
    said = fields.text(reply.get("content"), "content")
    if said:
        yield Piece(Channel(choice, "content"), said)
    chances = reply.get("completion_probabilities")
    yield from openai.logprob_pieces({"content": chances}, {"content": said}, choice)
    echo = fields.text(reply.get("prompt"), "prompt")
    if not _repeats(asked, choice, echo):
        yield Piece(Channel(choice, "prompt"), echo)
    yield from _settings(asked, reply.get("generation_settings"), choice)
    rest = {key: value for key, value in reply.items() if key not in _READ_OF_REPLY}
    yield from fields.other_pieces(rest, _STRUCTURE, choice, "")


def _repeats(asked: Asked, choice: int, echo: str) -> bool:
    """Whether it is the end of a prompt that was judged; the model's own beginning may precede."""
    parts = asked.prompt_of(choice)[-1].content["content"]
    known = "".join(part.get("text", "") for part in parts)
    begun = _BEGIN_OF_TEXT.match(echo)
    return known.endswith(echo) or begun is not None and known.endswith(echo[begun.end() :])


def _settings(asked: Asked, value: object, choice: int) -> Iterator[Piece]:
    """What the backend's settings say that is not the request's own."""
    settings = fields.obj(value or {}, "generation_settings")
    own = asked.own.union(_BREAKERS) if isinstance(asked, LlamaCppAsked) else ()
    for key, inner in fields.others(settings, settings).items():
        listed = inner if isinstance(inner, list) else [inner]
        if not all(isinstance(one, str) and one in own for one in listed):
            yield from fields.tree_pieces(inner, choice, f"generation_settings.{key}")


def _said(asked: Asked, index: int, text: str, over: bool) -> dict[str, Any]:
    """A reply of ours, or an event of one."""
    said = {"index": index, "content": text, "tokens": [], "stop": over}
    if not over:
        return said
    end = {"stop_type": "content_filter", "stopping_word": "", "truncated": False}
    return {**said, "model": asked.model, **end, "tokens_predicted": 0, "tokens_evaluated": 0}


def _error(status: int, code: str, message: str) -> bytes:
    return dump({"error": {"code": status, "message": message, "type": code}})
