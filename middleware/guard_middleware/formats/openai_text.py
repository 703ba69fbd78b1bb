"""OpenAI's text completions, as vLLM, SGLang, TGI, llama.cpp and Ollama serve them too."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from guard_middleware.formats import fields, openai, sse
from guard_middleware.formats.contract import (
    Answer,
    Asked,
    Channel,
    Piece,
    Refusal,
    ReplyStream,
    Turn,
    Unreadable,
)
from guard_middleware.formats.openai_chat import ChatStream
from guard_middleware.strict_json import Json, dump

_READ = openai.LABELS | {"prompt", "suffix"}
_MEDIA = fields.names("images image_data multi_modal_data multimodal_data")
_KNOWN = openai.CONTROLS | openai.UNJUDGEABLE | _READ | _MEDIA

_REPLY_KEYS = openai.REPLY_KEYS
_CHOICE_KEYS = fields.names(
    "index finish_reason stop_reason token_ids prompt_token_ids matched_stop"
)
_LOGPROB_KEYS = fields.names("token_logprobs text_offset")
_MOST_RANKS = 32


class OpenAIText:
    """Completions of one prompt or of several, each with `n` choices."""

    name = "openai-text"
    paths = (
        *("/**/v1/completions", "/**/v1/openai/completions"),
        *("/**/openai/deployments/*/completions", "/**/engines/*/completions"),
    )
    stream_types = ("text/event-stream",)

    def read_request(self, path: str, body: Json) -> Asked:
        """What is asked: `suffix` stands behind the reply, and is judged with each prompt."""
        asked = fields.obj(body, "the body", _KNOWN)
        fields.refuse_keys(asked, openai.UNJUDGEABLE | _MEDIA)
        suffix = fields.text(asked.get("suffix"), "suffix")
        extra = fields.extra_turns(asked, _READ, openai.CONTROLS)
        unread: list[str] = []
        prompts = tuple(
            (*extra, _turn(prompt, suffix)) for prompt in _prompts(asked.get("prompt"), unread)
        )
        choices = max(1, fields.count(asked.get("n"), "n", 1, fields.MOST_EACH))
        fields.check_batch(prompts, choices, extra, len(suffix))
        return Asked(
            prompts=prompts,
            streams=fields.flag(asked.get("stream"), "stream"),
            choices=choices,
            model=fields.text(asked.get("model"), "model"),
            unread=tuple(unread),
        )

    def without(self, body: Json, places: frozenset[int]) -> Json:
        """The body: it has no messages that could be left out."""
        return body

    def read_reply(self, asked: Asked, body: Json) -> Sequence[Piece]:
        """Every text of a whole reply; with `echo` the prompt is part of it."""
        reply = fields.obj(body, "the reply")
        return openai.with_ids(reply, tuple(_pieces(reply)))

    def open_stream(self, asked: Asked, content_type: str) -> ReplyStream:
        """A reader for one streamed reply."""
        return TextStream(asked)

    def refuse(self, asked: Asked, refusal: Refusal) -> Answer:
        """A reply with the finish reason of a content filter."""
        head, choices = _head(asked, refusal), _choices(asked)
        if asked.streams:
            events = _refusal_events(head, choices, refusal, frozenset())
            return Answer(200, "text/event-stream; charset=utf-8", events)
        body = {
            **head,
            "choices": [_filtered(index, refusal.text) for index in choices],
            "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
        }
        return Answer(200, "application/json", dump(body))

    def error(self, status: int, code: str, message: str) -> Answer:
        """OpenAI's error object."""
        return openai.error(status, code, message)


class TextStream(ChatStream):
    """A streamed completion: a chat's, but for where its texts are."""

    def pieces(self, chunk: Mapping[str, Any]) -> Iterator[Piece]:
        """Every text of a chunk."""
        return _pieces(chunk)

    def refuse(self, refusal: Refusal) -> bytes:
        """Every choice that was open ends with content_filter."""
        if self._done:
            return b""
        head = {**_head(self._asked, refusal), **self._head}
        left = (self._spoken | set(_choices(self._asked))) - self._closed
        return _refusal_events(head, sorted(left), refusal, self._spoken)


def _prompts(value: object, unread: list[str]) -> Iterator[str]:
    """The texts; an empty one for token ids, which no guard reads."""
    if not isinstance(value, list):
        yield fields.text(value, "prompt")
    elif not value:
        raise Unreadable("prompt is empty")
    elif _are_tokens(value):
        unread.append("prompt")
        yield ""
    else:
        for index, one in enumerate(value):
            if isinstance(one, list) and _are_tokens(one):
                unread.append(f"prompt[{index}]")
            elif not isinstance(one, str):
                raise Unreadable(f"prompt[{index}] is neither a text nor token ids")
            yield one if isinstance(one, str) else ""


def _are_tokens(value: list[Any]) -> bool:
    return all(isinstance(one, int) and not isinstance(one, bool) for one in value)


def _turn(prompt: str, suffix: str) -> Turn:
    texts = [prompt, suffix] if suffix else [prompt]
    return Turn({"role": "user", "content": [{"type": "text", "text": text} for text in texts]})


def _choices(asked: Asked) -> range:
    return range(asked.choices * len(asked.prompts))


def _pieces(body: Mapping[str, Any]) -> Iterator[Piece]:
    rest = {key: value for key, value in body.items() if key != "choices"}
    yield from fields.other_pieces(rest, _REPLY_KEYS, 0, "")
    for place, one in enumerate(fields.array(body.get("choices"), "choices")):
        choice = fields.obj(one, f"choices[{place}]")
        index = openai.choice_index(choice)
        text = fields.text(choice.get("text"), f"choices[{place}].text")
        rest = {key: value for key, value in choice.items() if key != "logprobs"}
        yield from fields.other_pieces(rest, _CHOICE_KEYS, index, "choice")
        if choice.get("logprobs") is not None:
            yield from _logprob_pieces(fields.obj(choice["logprobs"], "logprobs"), text, index)


def _logprob_pieces(logprobs: Mapping[str, Any], text: str, index: int) -> Iterator[Piece]:
    """Chosen tokens, unless they are the very text, and alternatives by rank. Some backends write
    a chat's log-probabilities here."""
    if "content" in logprobs:
        yield from openai.logprob_pieces(logprobs, {"content": text}, index)
        return
    tokens = [
        fields.text(one, "tokens[]") for one in fields.array(logprobs.get("tokens"), "tokens")
    ]
    if "".join(tokens) != text:
        yield from _said(tokens, index, "logprobs.tokens")
    for one in fields.array(logprobs.get("top_logprobs"), "top_logprobs"):
        ranked = fields.obj(one or {}, "top_logprobs[]")
        if len(ranked) > _MOST_RANKS:
            raise Unreadable("top_logprobs has too many entries")
        for rank, (token, chance) in enumerate(ranked.items()):
            name = f"logprobs.top[{rank}]"
            yield from _said([token], index, name)
            yield from fields.tree_pieces(chance, index, f"{name}.chance")
    rest = {key: value for key, value in logprobs.items() if key not in ("tokens", "top_logprobs")}
    yield from fields.other_pieces(rest, _LOGPROB_KEYS, index, "logprobs")


def _said(texts: Iterable[str], index: int, name: str) -> Iterator[Piece]:
    for text in texts:
        if text:
            yield Piece(Channel(index, name), text)


def _head(asked: Asked, refusal: Refusal) -> dict[str, Any]:
    return {**openai.head(asked, refusal, "text_completion"), "id": f"cmpl-{refusal.id}"}


def _filtered(index: int, text: str) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": "content_filter"}


def _refusal_events(
    head: Mapping[str, Any],
    choices: Iterable[int],
    refusal: Refusal,
    spoken: frozenset[int] | set[int],
) -> bytes:
    texts = ((index, "" if index in spoken else refusal.text) for index in choices)
    chunks = ({**head, "choices": [_filtered(index, text)]} for index, text in texts)
    return b"".join(sse.event(dump(chunk)) for chunk in chunks) + openai.DONE
