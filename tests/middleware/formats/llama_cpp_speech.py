"""llama.cpp's own protocol, spoken and heard."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from guard_middleware.formats.llama_cpp import LlamaCpp
from tests.middleware.asgi_calls import EVENTS, sse
from tests.middleware.formats.speech import Said

PATH, INFILL = "/completion", "/infill"
SETTINGS = {
    "seed": 7,
    "dry_sequence_breakers": ["\n", ":", '"', "*"],
    "stop": [],
    "grammar": "",
    "samplers": ["top_k", "temperature"],
    "speculative.n_max": 16,
    "chat_format": "Content-only",
    "lora": [],
}
END = {
    "id_slot": 0,
    "stop": True,
    "model": "llama-3.2",
    "tokens_predicted": 3,
    "tokens_evaluated": 2,
    "generation_settings": SETTINGS,
    "prompt": "<|begin_of_text|>Hi",
    "has_new_line": False,
    "truncated": False,
    "stop_type": "eos",
    "stopping_word": "",
    "tokens_cached": 4,
    "timings": {"prompt_n": 1, "prompt_ms": 30.9},
}


def asking(said: object = "Hi", **more: Any) -> dict[str, Any]:
    """A request."""
    return {"prompt": said, "n_predict": 5, **more}


def reply(text: str, index: int = 0, **more: Any) -> dict[str, Any]:
    """A whole reply, or the event that ends a choice."""
    return {"index": index, "content": text, "tokens": [], **END, **more}


def step(text: str, index: int = 0, **more: Any) -> dict[str, Any]:
    """One event of a stream."""
    event = {"index": index, "content": text, "tokens": [7], "stop": False, "id_slot": 0}
    return {**event, "tokens_predicted": 1, "tokens_evaluated": 2, **more}


def chance(token: str, *others: str) -> dict[str, Any]:
    """An entry of `completion_probabilities`."""
    entries = [_entry(other) for other in others]
    return {**_entry(token), "top_logprobs": entries}


def steps(said: str, size: int = 4) -> list[dict[str, Any]]:
    """The events of a stream that says this."""
    pieces = [said[at : at + size] for at in range(0, len(said), size)]
    return [*map(step, pieces), reply("")]


def chunks(events: Sequence[object]) -> list[bytes]:
    """Server-sent events, without [DONE]."""
    return [sse(event, done=False) for event in events]


class LlamaCppSpeech:
    """Completions."""

    format = LlamaCpp()
    path = stream_path = PATH
    stream_type = EVENTS
    channels: tuple[str, ...] = ("content", "alternatives", "stopping word", "unknown")
    most_choices = 3

    def request(self, said: str, stream: bool, choices: int = 1) -> object:
        return asking(said, stream=stream, n_probs=1, n_cmpl=choices)

    def whole(self, said: Mapping[Said, str]) -> bytes:
        replies = []
        for index in sorted({one.choice for one in said} or {0}):
            texts = {one.channel: text for one, text in said.items() if one.choice == index}
            replies.append(_with(reply(texts.get("content", ""), index), texts))
        return json.dumps(replies if len(replies) > 1 else replies[0]).encode()

    def events(self, pieces: Sequence[tuple[Said, str]]) -> list[bytes]:
        events, words = [], dict[int, str]()
        for said, text in pieces:
            if said.channel == "stopping word":  # is told at the end, whole
                words[said.choice] = words.get(said.choice, "") + text
                continue
            texts = {said.channel: text}
            events.append(_with(step(texts.get("content", ""), said.choice), texts))
        for index in sorted({said.choice for said, _ in pieces} or {0}):
            events.append(reply("", index, stopping_word=words.get(index, "")))
        return chunks(events)

    def heard(self, body: bytes, streamed: bool) -> Mapping[Said, str]:
        found: dict[Said, str] = defaultdict(str)
        over = set()
        for event in _replies(body, streamed):
            texts = {
                "content": event["content"],
                "alternatives": "".join(_alternatives(event)),
                "stopping word": event.get("stopping_word", ""),
                "unknown": event.get("note", ""),
            }
            for channel, text in texts.items():
                found[Said(event["index"], channel)] += text
            if event["stop"]:
                over.add(event["index"])
        assert over == {said.choice for said in found}
        return found

    def refused(self, body: bytes, streamed: bool) -> bool:
        return any(one.get("stop_type") == "content_filter" for one in _replies(body, streamed))


class LlamaCppInfillSpeech(LlamaCppSpeech):
    """The middle of a text."""

    path = stream_path = INFILL
    most_choices = 1

    def request(self, said: str, stream: bool, choices: int = 1) -> object:
        return {"input_prefix": said, "input_suffix": "", "prompt": "", "stream": stream}


def _with(event: dict[str, Any], texts: Mapping[str, str]) -> dict[str, Any]:
    if "alternatives" in texts:
        said = texts.get("content", "")
        event["completion_probabilities"] = [chance(said, texts["alternatives"])]
    if "stopping word" in texts:
        event["stopping_word"] = texts["stopping word"]
    return {**event, "note": texts["unknown"]} if "unknown" in texts else event


def _entry(token: str) -> dict[str, Any]:
    return {"id": 7, "token": token, "bytes": list(token.encode()), "logprob": -0.5}


def _alternatives(event: Mapping[str, Any]) -> Iterator[str]:
    for one in event.get("completion_probabilities", ()):
        yield from (other["token"] for other in one["top_logprobs"])


def _replies(body: bytes, streamed: bool) -> list[dict[str, Any]]:
    if not streamed:
        whole = json.loads(body)
        return whole if isinstance(whole, list) else [whole]
    assert body.endswith(b"\n\n")
    blocks = [block for block in body.split(b"\n\n") if block not in (b"", b":")]
    assert all(block.startswith(b"data: ") for block in blocks)
    return [json.loads(block.removeprefix(b"data: ")) for block in blocks]
