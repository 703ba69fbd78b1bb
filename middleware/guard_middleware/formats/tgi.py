"""Text Generation Inference's own protocol: /generate, /generate_stream, and / which is either.

Its finish reasons know no filter: refusals say `content_filter`, as OpenAI's protocols do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from guard_middleware.formats import fields, sse
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

_BODY = fields.names("inputs parameters stream options model")
_CONTROLS = fields.names(
    """
    best_of decoder_input_details details do_sample frequency_penalty ignore_eos_token
    max_new_tokens max_time min_new_tokens num_return_sequences presence_penalty repetition_penalty
    return_full_text seed temperature top_k top_n_tokens top_p typical_p use_cache wait_for_model
    watermark
    """
)
_LABELS = fields.names("stop stop_sequences truncate")
_UNJUDGEABLE = fields.names("adapter_id adapter_source adapter_parameters prefix chat_template")

_TOKEN_STRUCTURE = fields.names("id logprob special")
_REPLY_STRUCTURE = fields.names("index")
_DETAIL_STRUCTURE = fields.names("finish_reason generated_tokens input_length seed")
_MOST_RANKS = 32
# Names from the tokenizer's vocabulary: the end of a turn, not prose.
_SPECIAL = re.compile(r"</?\|?\w{1,40}\|?>", re.ASCII)
# Models that see take images out of the prompt's text.
_IMAGE = re.compile(r"!\[\]\(([^)]*)\)")


@dataclass(frozen=True, slots=True)
class TgiAsked(Asked):
    """With the prompt, which replies may repeat; at / whole replies come in a list."""

    inputs: str = ""
    listed: bool = False


class Tgi:
    """Completions of one prompt."""

    name = "tgi"
    paths = ("/", "/generate", "/**/generate_stream")
    stream_types = ("text/event-stream",)

    def read_request(self, path: str, body: Json) -> Asked:
        """What is asked. `truncate` makes the model read another prompt than the guard does."""
        asked = fields.only(body, "the body", _BODY)
        inputs = fields.text(asked.get("inputs"), "inputs")
        if not inputs:
            raise Unreadable("inputs is empty")
        known = _CONTROLS | _LABELS | _UNJUDGEABLE
        parameters = fields.obj(asked.get("parameters") or {}, "parameters", known)
        fields.refuse_keys(parameters, _UNJUDGEABLE)
        options = fields.obj(asked.get("options") or {}, "options", _CONTROLS)
        unread = [] if parameters.get("truncate") is None else ["parameters.truncate"]
        turn = Turn({"role": "user", "content": _parts(inputs, unread)})
        extra = [
            *fields.extra_turns(options, (), _CONTROLS),
            *fields.extra_turns(parameters, _LABELS, _CONTROLS),
        ]
        last = path.casefold().rstrip("/").rpartition("/")[2]
        streams = fields.flag(asked.get("stream"), "stream")
        return TgiAsked(
            prompts=((*extra, turn),),
            streams=last == "generate_stream" or not last and streams,
            model=fields.identifier(asked.get("model"), "model"),
            unread=tuple(unread),
            inputs=inputs,
            listed=not last,
        )

    def without(self, body: Json, places: frozenset[int]) -> Json:
        """The body: its only turn is the newest."""
        return body

    def read_reply(self, asked: Asked, body: Json) -> Sequence[Piece]:
        """Every text of a whole reply."""
        replies = body if isinstance(body, list) else [body]
        return tuple(
            piece
            for index, reply in enumerate(replies)
            for piece in _whole_pieces(fields.obj(reply, "the reply"), index, "", _inputs(asked))
        )

    def open_stream(self, asked: Asked, content_type: str) -> ReplyStream:
        """A reader for one streamed reply."""
        return TgiStream(_inputs(asked))

    def refuse(self, asked: Asked, refusal: Refusal) -> Answer:
        """A reply with the finish reason of a content filter."""
        if asked.streams:
            events = TgiStream("").refuse(refusal)
            return Answer(200, "text/event-stream; charset=utf-8", events)
        details = {**_details(0), "prefill": [], "tokens": []}
        reply = {"generated_text": refusal.text, "details": details}
        listed = isinstance(asked, TgiAsked) and asked.listed
        return Answer(200, "application/json", dump([reply] if listed else reply))

    def error(self, status: int, code: str, message: str) -> Answer:
        """TGI's error object, with a code."""
        return Answer(status, "application/json", dump(_error(status, code, message)))


class TgiStream(sse.SseStream):
    """A streamed completion; the last event repeats all of it, perhaps behind the prompt."""

    def __init__(self, inputs: str) -> None:
        super().__init__()
        self._inputs = inputs
        self._said: list[str] = []
        self._chars = 0
        self._seen_chars = 0
        self._seen_tokens = 0
        self._over = False

    def read(self, frame: sse.Frame) -> Event:
        """The event of a frame."""
        if not frame.data or frame.data.strip() == b"[DONE]":
            return Event(frame.raw)
        event = fields.obj(parse(frame.data), "an event")
        text, rest = _token(event.get("token"), "token")
        if text:
            self._keep(text)
            rest = [Piece(Channel(0, "content"), text), *rest]
        rest += _ranked([event.get("top_tokens")], 0, "")
        whole = fields.text(event.get("generated_text"), "generated_text")
        said = "".join(self._said) if whole else ""
        if whole not in (said, self._inputs + said):
            rest.append(Piece(Channel(0, "generated_text"), whole))
        details = fields.obj(event.get("details") or {}, "details")
        rest += fields.other_pieces(details, _DETAIL_STRUCTURE, 0, "details")
        read = ("token", "top_tokens", "generated_text", "details")
        others = {key: value for key, value in event.items() if key not in read}
        rest += fields.other_pieces(others, _REPLY_STRUCTURE, 0, "")
        over = bool(details) or "error" in event
        return Event(frame.raw, tuple(rest), (0,) if over else (), (len(text), over))

    def released(self, event: Event) -> None:
        """Keep what the closing event has to repeat."""
        if event.value is not None:
            chars, over = event.value
            self._seen_chars += chars
            self._seen_tokens += 1
            self._over |= over

    def refuse(self, refusal: Refusal) -> bytes:
        """A last event: a token that says the refusal if nothing was said, else an empty one."""
        if self._over:
            return b""
        seen = "".join(self._said)[: self._seen_chars]
        token = {"id": 0, "text": "" if seen else refusal.text, "logprob": 0.0}
        event = {
            "index": self._seen_tokens + 1,
            "token": {**token, "special": bool(seen)},
            "generated_text": seen or refusal.text,
            "details": _details(self._seen_tokens),
        }
        return sse.event(dump(event))

    def abort(self) -> bytes:
        """An error event, which clients raise."""
        if self._over:
            return b""
        return sse.event(dump(_error(502, "upstream_failed", "The model's stream broke off.")))

    def _keep(self, text: str) -> None:
        self._chars += len(text)
        if self._chars > sse.MAX_EVENT_BYTES:  # the last event could not repeat it
            raise Unreadable(f"the stream says more than {sse.MAX_EVENT_BYTES} characters")
        self._said.append(text)


def _inputs(asked: Asked) -> str:
    return asked.inputs if isinstance(asked, TgiAsked) else ""


def _parts(inputs: str, unread: list[str]) -> list[dict[str, Any]]:
    """The prompt's texts and images; its text is one part again where it holds no image."""
    parts: list[dict[str, Any]] = []
    start = 0
    for found in _IMAGE.finditer(inputs):
        if found[1][:5].lower() == "data:":
            text = inputs[start : found.start()]
            parts += [{"type": "text", "text": text}] if text else []
            parts.append({"type": "image_url", "image_url": found[1]})
            start = found.end()
        else:
            unread.append("inputs")
    text = inputs[start:]
    return [*parts, {"type": "text", "text": text}] if text else parts


def _whole_pieces(reply: Mapping[str, Any], choice: int, path: str, inputs: str) -> Iterator[Piece]:
    text = fields.text(reply.get("generated_text"), "generated_text")
    if text:
        yield Piece(Channel(choice, f"{path}content"), text)
    details = fields.obj(reply.get("details") or {}, "details")
    yield from _listed(details.get("tokens"), choice, f"{path}tokens", text)
    yield from _listed(details.get("prefill"), choice, f"{path}prefill", inputs)
    yield from _ranked(fields.array(details.get("top_tokens"), "top_tokens"), choice, path)
    others = fields.array(details.get("best_of_sequences"), "best_of_sequences")
    for index, one in enumerate(others):
        other = fields.obj(one, "best_of_sequences[]")
        text = fields.text(other.get("generated_text"), "generated_text")
        inner = {key: value for key, value in other.items() if key != "generated_text"}
        sequence = {"generated_text": text, "details": inner}
        yield from _whole_pieces(sequence, choice, f"{path}best_of[{index}].", inputs)
    read = ("tokens", "prefill", "top_tokens", "best_of_sequences")
    rest = {key: value for key, value in details.items() if key not in read}
    yield from fields.other_pieces(rest, _DETAIL_STRUCTURE, choice, f"{path}details")
    rest = {key: value for key, value in reply.items() if key not in ("generated_text", "details")}
    yield from fields.other_pieces(rest, _REPLY_STRUCTURE, choice, path)


def _listed(value: object, choice: int, name: str, known: str) -> Iterator[Piece]:
    """The texts of tokens, unless they are the end of what is judged as a whole elsewhere."""
    said = ""
    for one in fields.array(value, name):
        text, rest = _token(one, name, choice)
        said += text
        yield from rest
    begun = _SPECIAL.match(said)  # the beginning of a prompt, which none repeats
    if said and not known.endswith(said[begun.end() :] if begun else said):
        yield Piece(Channel(choice, name), said)


def _ranked(groups: Sequence[object], choice: int, path: str) -> list[Piece]:
    """Alternatives to each token: a channel for each rank, for that is how they are read."""
    pieces: list[Piece] = []
    for group in groups:
        ranks = fields.array(group, "top_tokens")
        if len(ranks) > _MOST_RANKS:
            raise Unreadable("top_tokens has too many entries")
        for rank, one in enumerate(ranks):
            text, rest = _token(one, f"{path}top[{rank}]", choice)
            if text:
                pieces.append(Piece(Channel(choice, f"{path}top[{rank}]"), text))
            pieces += rest
    return pieces


def _token(value: object, name: str, choice: int = 0) -> tuple[str, list[Piece]]:
    """A token's text, empty for a special one, and what else it says."""
    token = fields.obj({} if value is None else value, name)
    text = fields.text(token.get("text"), f"{name}.text")
    if token.get("special") is True and _SPECIAL.fullmatch(text):
        text = ""
    rest = {key: inner for key, inner in token.items() if key != "text"}
    return text, list(fields.other_pieces(rest, _TOKEN_STRUCTURE, choice, name))


def _details(tokens: int) -> dict[str, Any]:
    return {"finish_reason": "content_filter", "generated_tokens": tokens, "seed": None}


def _error(status: int, code: str, message: str) -> dict[str, str]:
    kind = "validation" if status < 500 else "generation"
    return {"error": message, "error_type": kind, "code": code}
