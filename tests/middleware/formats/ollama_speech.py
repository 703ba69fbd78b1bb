"""Ollama's two protocols, spoken and heard."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from guard_middleware.formats.contract import Format
from guard_middleware.formats.ollama import OllamaChat, OllamaGenerate
from tests.middleware.formats.speech import Said

CHAT = "/api/chat"
GENERATE = "/api/generate"
NDJSON = "application/x-ndjson"
HEAD = {"model": "llama3.2", "created_at": "2026-01-02T03:04:05.678901Z"}
LAST = {"done": True, "done_reason": "stop", "total_duration": 5, "eval_count": 2}
_WHOLE_CALLS = ("name", "arguments")


def ndjson(*lines: object) -> bytes:
    """Lines as Ollama writes them."""
    return b"".join(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines)


def chat_lines(text: str, size: int = 4) -> list[dict[str, Any]]:
    """The lines of a chat that says `text`."""
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    said = [{**HEAD, "message": _message(content=piece), "done": False} for piece in pieces]
    return [*said, {**HEAD, "message": _message(), **LAST}]


def generate_lines(text: str, size: int = 4) -> list[dict[str, Any]]:
    """The lines of a completion that says `text`."""
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    said = [{**HEAD, "response": piece, "done": False} for piece in pieces]
    return [*said, {**HEAD, "response": "", **LAST, "context": [1, 2, 3]}]


class _OllamaSpeech:
    """One choice; a tool call is never split over lines."""

    stream_type = NDJSON
    most_choices = 1
    channels: tuple[str, ...] = ()

    def whole(self, said: Mapping[Said, str]) -> bytes:
        return json.dumps(self._line(said.items(), LAST)).encode()

    def events(self, pieces: Sequence[tuple[Said, str]]) -> list[bytes]:
        calls: dict[Said, str] = defaultdict(str)
        for said, text in pieces:
            if said.channel in _WHOLE_CALLS:
                calls[said] += text
        lines = [
            self._line([(said, calls.pop(said, text))], {"done": False})
            for said, text in pieces
            if said.channel not in _WHOLE_CALLS or said in calls
        ]
        return [ndjson(line) for line in [*lines, self._line((), LAST)]]

    def heard(self, body: bytes, streamed: bool) -> Mapping[Said, str]:
        found: dict[Said, str] = defaultdict(str)
        for line in _lines(body, streamed):
            for channel, text in self._texts(line):
                found[Said(0, channel)] += text
        return found

    def refused(self, body: bytes, streamed: bool) -> bool:
        reason: object = _lines(body, streamed)[-1]["done_reason"]
        return reason == "content_filter"

    def _line(self, said: Iterable[tuple[Said, str]], end: Mapping[str, Any]) -> dict[str, Any]:
        line: dict[str, Any] = {**HEAD, **end}
        texts = {one.channel: text for one, text in said}
        self._say(line, texts)
        if text := texts.get("alternatives"):
            other = {"token": text, "logprob": -1.0}
            chosen = texts.get("content", "")
            line["logprobs"] = [{"token": chosen, "logprob": -0.1, "top_logprobs": [other]}]
        return line

    def _say(self, line: dict[str, Any], texts: Mapping[str, str]) -> None:
        raise NotImplementedError

    def _texts(self, line: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        for entry in line.get("logprobs", ()):
            yield "alternatives", entry["top_logprobs"][0]["token"]


class OllamaChatSpeech(_OllamaSpeech):
    """`/api/chat`."""

    format: Format = OllamaChat()
    path = stream_path = CHAT
    channels = ("content", "thinking", "name", "arguments", "alternatives", "unknown")

    def request(self, said: str, stream: bool, choices: int = 1) -> object:
        messages = [{"role": "user", "content": said}]
        return {"model": "llama3.2", "messages": messages, **({} if stream else {"stream": False})}

    def _say(self, line: dict[str, Any], texts: Mapping[str, str]) -> None:
        message = _message(texts.get("content", ""))
        if text := texts.get("thinking"):
            message["thinking"] = text
        if text := texts.get("unknown"):
            message["annotations"] = [{"note": text}]
        calls = []
        if text := texts.get("name"):
            calls.append({"function": {"name": text, "arguments": {}}})
        if text := texts.get("arguments"):
            calls.append({"function": {"name": "", "arguments": {"city": text}}})
        line["message"] = {**message, **({"tool_calls": calls} if calls else {})}

    def _texts(self, line: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        message = line["message"]
        yield "content", message["content"]
        yield "thinking", message.get("thinking", "")
        for call in message.get("tool_calls", ()):
            yield "name", call["function"]["name"]
            yield "arguments", call["function"]["arguments"].get("city", "")
        for note in message.get("annotations", ()):
            yield "unknown", note["note"]
        yield from super()._texts(line)


class OllamaGenerateSpeech(_OllamaSpeech):
    """`/api/generate`."""

    format: Format = OllamaGenerate()
    path = stream_path = GENERATE
    channels = ("content", "thinking", "alternatives", "unknown")

    def request(self, said: str, stream: bool, choices: int = 1) -> object:
        return {"model": "llama3.2", "prompt": said, **({} if stream else {"stream": False})}

    def _say(self, line: dict[str, Any], texts: Mapping[str, str]) -> None:
        line["response"] = texts.get("content", "")
        if text := texts.get("thinking"):
            line["thinking"] = text
        if text := texts.get("unknown"):
            line["remarks"] = text

    def _texts(self, line: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        yield "content", line["response"]
        yield "thinking", line.get("thinking", "")
        yield "unknown", line.get("remarks", "")
        yield from super()._texts(line)


def _message(content: str = "") -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def _lines(body: bytes, streamed: bool) -> list[dict[str, Any]]:
    if not streamed:
        return [json.loads(body)]
    assert body.endswith(b"\n")
    lines = [json.loads(line) for line in body[:-1].split(b"\n")]
    assert lines[-1]["done"] and not any(line["done"] for line in lines[:-1])
    return lines
