"""OpenAI's chat, spoken and heard."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from guard_middleware.formats.openai_chat import OpenAIChat
from tests.middleware.asgi_calls import EVENTS, sse
from tests.middleware.formats.openai_replies import HEAD, PATH, asking, chunk
from tests.middleware.formats.speech import Said

_TEXTS = ("content", "reasoning_content", "refusal")


class OpenAIChatSpeech:
    """Chat completions."""

    format = OpenAIChat()
    path = stream_path = PATH
    stream_type = EVENTS
    channels = (*_TEXTS, "name", "arguments", "alternatives", "unknown")
    most_choices = 3

    def request(self, said: str, stream: bool, choices: int = 1) -> object:
        return asking(said, stream=stream, n=choices)

    def whole(self, said: Mapping[Said, str]) -> bytes:
        choices = []
        for index in sorted({one.choice for one in said}):
            choice: dict[str, Any] = {"index": index, "finish_reason": "stop"}
            choice["message"] = {"role": "assistant", "content": None}
            for one, text in said.items():
                if one.choice == index:
                    _add(choice, "message", one.channel, text)
            choices.append(choice)
        return json.dumps({**HEAD, "object": "chat.completion", "choices": choices}).encode()

    def events(self, pieces: Sequence[tuple[Said, str]]) -> list[bytes]:
        events = []
        for said, text in pieces:
            event = chunk({}, said.choice)
            _add(event["choices"][0], "delta", said.channel, text)
            events.append(sse(event, done=False))
        ends = (chunk({}, index, "stop") for index in sorted({said.choice for said, _ in pieces}))
        return [*events, *(sse(end, done=False) for end in ends), sse()]

    def heard(self, body: bytes, streamed: bool) -> Mapping[Said, str]:
        found: dict[Said, str] = defaultdict(str)
        if streamed:
            assert body.endswith(b"data: [DONE]\n\n")
        for choice in _choices(body, streamed):
            for channel, text in _texts(choice, "delta" if streamed else "message"):
                found[Said(choice["index"], channel)] += text
        return found

    def refused(self, body: bytes, streamed: bool) -> bool:
        return any(
            choice["finish_reason"] == "content_filter" for choice in _choices(body, streamed)
        )


def _add(choice: dict[str, Any], key: str, channel: str, text: str) -> None:
    message = choice[key]
    if channel in _TEXTS:
        message[channel] = text
    elif channel in ("name", "arguments"):
        calls = message.setdefault("tool_calls", [{"index": 0, "id": "call_1", "function": {}}])
        calls[0]["function"][channel] = text
    elif channel == "alternatives":
        other = {"token": text, "logprob": -1.0}
        entry = {"token": message.get("content") or "", "logprob": -0.1, "top_logprobs": [other]}
        choice["logprobs"] = {"content": [entry]}
    else:
        message["annotations"] = [{"note": text}]


def _choices(body: bytes, streamed: bool) -> Iterator[dict[str, Any]]:
    values = [body]
    if streamed:
        lines = [line for line in body.split(b"\n\n") if line not in (b"", b":")]
        assert all(line.startswith(b"data: ") for line in lines)
        values = [line[6:] for line in lines if line != b"data: [DONE]"]
    for value in values:
        yield from json.loads(value)["choices"]


def _texts(choice: Mapping[str, Any], key: str) -> Iterator[tuple[str, str]]:
    message = choice[key]
    for channel in _TEXTS:
        yield channel, message.get(channel) or ""
    for call in message.get("tool_calls", ()):
        for channel in ("name", "arguments"):
            yield channel, call["function"].get(channel, "")
    for entry in (choice.get("logprobs") or {}).get("content", ()):
        yield "alternatives", entry["top_logprobs"][0]["token"]
    for note in message.get("annotations", ()):
        yield "unknown", note["note"]
