"""OpenAI's text completions, spoken and heard."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from guard_middleware.formats.openai_text import OpenAIText
from tests.middleware.asgi_calls import EVENTS, sse
from tests.middleware.formats.speech import Said

PATH = "/v1/completions"
HEAD = {"id": "cmpl-7", "object": "text_completion", "created": 1_700_000_000, "model": "llama"}


def reply(*texts: str, **choice: Any) -> dict[str, Any]:
    """A whole reply; one choice for each text."""
    choices = [
        {"index": index, "text": text, "logprobs": None, "finish_reason": "stop", **choice}
        for index, text in enumerate(texts)
    ]
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    return {**HEAD, "choices": choices, "usage": usage}


def chunk(text: str, choice: int = 0, finish: str | None = None, **more: Any) -> dict[str, Any]:
    """One event of a stream."""
    one = {"index": choice, "text": text, "logprobs": None, "finish_reason": finish, **more}
    return {**HEAD, "choices": [one]}


def chunks(text: str, size: int = 4, choice: int = 0) -> list[dict[str, Any]]:
    """The events of one choice that says `text`."""
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    return [*(chunk(piece, choice) for piece in pieces), chunk("", choice, "stop")]


class OpenAITextSpeech:
    """Text completions."""

    format = OpenAIText()
    path = stream_path = PATH
    stream_type = EVENTS
    channels = ("text", "tokens", "alternatives", "unknown")
    most_choices = 3

    def request(self, said: str, stream: bool, choices: int = 1) -> object:
        return {"model": "llama", "prompt": said, "stream": stream, "n": choices}

    def whole(self, said: Mapping[Said, str]) -> bytes:
        choices = []
        for index in sorted({one.choice for one in said}):
            texts = {one.channel: text for one, text in said.items() if one.choice == index}
            choices.append(_choice(index, texts, "stop"))
        return json.dumps({**HEAD, "choices": choices}).encode()

    def events(self, pieces: Sequence[tuple[Said, str]]) -> list[bytes]:
        said = [_choice(one.choice, {one.channel: text}, None) for one, text in pieces]
        ends = [_choice(index, {}, "stop") for index in sorted({one.choice for one, _ in pieces})]
        events = [{**HEAD, "choices": [choice]} for choice in [*said, *ends]]
        return [*(sse(event, done=False) for event in events), sse()]

    def heard(self, body: bytes, streamed: bool) -> Mapping[Said, str]:
        if streamed:
            assert body.endswith(b"data: [DONE]\n\n")
        found: dict[Said, str] = defaultdict(str)
        for choice in _choices(body, streamed):
            logprobs = choice["logprobs"] or {"tokens": [], "top_logprobs": []}
            texts = {
                "text": choice["text"],
                "tokens": "".join(logprobs["tokens"]),
                "alternatives": "".join(key for one in logprobs["top_logprobs"] for key in one),
                "unknown": choice.get("note", ""),
            }
            for channel, text in texts.items():
                found[Said(choice["index"], channel)] += text
        return found

    def refused(self, body: bytes, streamed: bool) -> bool:
        return any(
            choice["finish_reason"] == "content_filter" for choice in _choices(body, streamed)
        )


def _choice(index: int, texts: Mapping[str, str], finish: str | None) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": index, "text": texts.get("text", ""), "logprobs": None}
    if "tokens" in texts or "alternatives" in texts:
        choice["logprobs"] = {
            "tokens": [texts["tokens"]] if "tokens" in texts else [],
            "token_logprobs": [-0.1],
            "top_logprobs": [{texts["alternatives"]: -1.5}] if "alternatives" in texts else [],
            "text_offset": [0],
        }
    if "unknown" in texts:
        choice["note"] = texts["unknown"]
    return {**choice, "finish_reason": finish}


def _choices(body: bytes, streamed: bool) -> Iterator[dict[str, Any]]:
    values = [body]
    if streamed:
        lines = [line for line in body.split(b"\n\n") if line not in (b"", b":")]
        assert all(line.startswith(b"data: ") for line in lines)
        values = [line[6:] for line in lines if line != b"data: [DONE]"]
    for value in values:
        yield from json.loads(value)["choices"]
