"""Llama Stack's inference API, spoken and heard."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from guard_middleware.formats.llama_stack import LlamaStack
from tests.middleware.asgi_calls import EVENTS, sse
from tests.middleware.formats.speech import Said

PATH = "/v1/inference/chat-completion"
MODEL = "meta-llama/Llama-3.2-3B-Instruct"


def event(kind: str, delta: object, **more: object) -> dict[str, Any]:
    """A chunk of a streamed chat completion."""
    return {"event": {"event_type": kind, "delta": delta, **more}}


def text(said: str, kind: str = "progress", **more: object) -> dict[str, Any]:
    """A chunk that says something."""
    return event(kind, {"type": "text", "text": said}, **more)


def call(arguments: object, name: str = "look", **more: object) -> dict[str, Any]:
    """A call of a tool."""
    return {"call_id": "call-1", "tool_name": name, "arguments": arguments, **more}


class LlamaStackChatSpeech:
    """Chat completions."""

    format = LlamaStack(chat=True)
    path = stream_path = PATH
    stream_type = EVENTS
    channels: Sequence[str] = ("content", "call", "arguments", "alternatives", "unknown")
    most_choices = 1

    def request(self, said: str, stream: bool, choices: int = 1) -> object:
        message = {"role": "user", "content": said}
        return {"model_id": MODEL, "messages": [message], "stream": stream}

    def whole(self, said: Mapping[Said, str]) -> bytes:
        texts = {one.channel: text for one, text in said.items()}
        called = call(texts.get("arguments", "{}"), texts.get("call", "look"))
        message = {
            "role": "assistant",
            "content": texts.get("content", ""),
            "stop_reason": "end_of_turn",
            "tool_calls": [called] if {"call", "arguments"} & set(texts) else [],
            "note": texts.get("unknown"),
        }
        reply: dict[str, Any] = {"completion_message": message, "logprobs": None}
        if "alternatives" in texts:
            reply["logprobs"] = [alternatives(texts["alternatives"])]
        return json.dumps(reply).encode()

    def events(self, pieces: Sequence[tuple[Said, str]]) -> list[bytes]:
        events = [text("", "start")]
        arguments = "".join(said for one, said in pieces if one.channel == "arguments")
        for one, said in pieces:
            match one.channel:
                case "content":
                    events.append(text(said))
                case "call":
                    events.append(called(said, "in_progress"))
                case "arguments":  # which come in one piece
                    events += [called(call(arguments), "succeeded")] if arguments else []
                    arguments = ""
                case "alternatives":
                    events.append(text("", logprobs=[alternatives(said)]))
                case _:
                    events.append(event("progress", {"type": "text", "text": "", "note": said}))
        events.append(text("", "complete", stop_reason="end_of_turn"))
        return [sse(one, done=False) for one in events]

    def heard(self, body: bytes, streamed: bool) -> Mapping[Said, str]:
        found: dict[Said, str] = defaultdict(str)
        for channel, said in self._streamed(body) if streamed else self._whole(json.loads(body)):
            found[Said(0, channel)] += said
        return found

    def refused(self, body: bytes, streamed: bool) -> bool:
        return b"content_filtered" in body

    def _whole(self, reply: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        message = reply["completion_message"]
        assert message["stop_reason"] == "end_of_turn"
        yield "content", message["content"]
        for one in message["tool_calls"]:
            yield "call", one["tool_name"]
            yield "arguments", one["arguments"]
        yield "unknown", message.get("note") or ""
        yield from read_alternatives(reply)

    def _streamed(self, body: bytes) -> Iterator[tuple[str, str]]:
        chunks = read_chunks(body)
        kinds = [one["event"]["event_type"] for one in chunks]
        assert kinds == ["start", *["progress"] * (len(kinds) - 2), "complete"]
        assert chunks[-1]["event"]["stop_reason"] == "end_of_turn"
        for one in chunks:
            delta = one["event"]["delta"]
            if delta["type"] == "text":
                yield "content", spoken(delta["text"], one)
            elif delta["parse_status"] == "succeeded":
                yield "arguments", delta["tool_call"]["arguments"]
            else:
                yield "call", delta["tool_call"]
            yield "unknown", delta.get("note", "")
            yield from read_alternatives(one["event"])


class LlamaStackCompletionSpeech:
    """Completions."""

    format = LlamaStack(chat=False)
    path = stream_path = "/v1/inference/completion"
    stream_type = EVENTS
    channels: Sequence[str] = ("content", "alternatives", "unknown")
    most_choices = 1

    def request(self, said: str, stream: bool, choices: int = 1) -> object:
        return {"model_id": MODEL, "content": said, "stream": stream}

    def whole(self, said: Mapping[Said, str]) -> bytes:
        texts = {one.channel: text for one, text in said.items()}
        reply: dict[str, Any] = {"content": texts.get("content", ""), "stop_reason": "end_of_turn"}
        reply["note"] = texts.get("unknown")
        if "alternatives" in texts:
            reply["logprobs"] = [alternatives(texts["alternatives"])]
        return json.dumps(reply).encode()

    def events(self, pieces: Sequence[tuple[Said, str]]) -> list[bytes]:
        events: list[dict[str, Any]] = []
        for one, said in pieces:
            match one.channel:
                case "content":
                    events.append({"delta": said})
                case "alternatives":
                    events.append({"delta": "", "logprobs": [alternatives(said)]})
                case _:
                    events.append({"delta": "", "note": said})
        events.append({"delta": "", "stop_reason": "end_of_turn"})
        return [sse(one, done=False) for one in events]

    def heard(self, body: bytes, streamed: bool) -> Mapping[Said, str]:
        found: dict[Said, str] = defaultdict(str)
        chunks = read_chunks(body) if streamed else [json.loads(body)]
        assert [bool(one.get("stop_reason")) for one in chunks].index(True) == len(chunks) - 1
        for one in chunks:
            found[Said(0, "content")] += spoken(one["delta" if streamed else "content"], one)
            found[Said(0, "unknown")] += one.get("note") or ""
            for channel, said in read_alternatives(one):
                found[Said(0, channel)] += said
        return found

    def refused(self, body: bytes, streamed: bool) -> bool:
        return b"content_filtered" in body


def called(value: object, status: str) -> dict[str, Any]:
    """A chunk that calls a tool."""
    return event("progress", {"type": "tool_call", "tool_call": value, "parse_status": status})


def alternatives(said: str) -> dict[str, Any]:
    """A token that is nothing, and what else might have been said."""
    return {"logprobs_by_token": {"": -0.1, said: -1.0}}


def read_alternatives(value: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for position in value.get("logprobs") or ():
        yield "alternatives", list(position["logprobs_by_token"])[1]


def read_chunks(body: bytes) -> list[Any]:
    assert body.endswith(b"\n\n")
    lines = [line for line in body.split(b"\n\n") if line not in (b"", b":")]
    assert all(line.startswith(b"data: ") for line in lines)
    return [json.loads(line[6:]) for line in lines]


def spoken(said: str, chunk: Mapping[str, Any]) -> str:
    """A refusal stands in a paragraph of its own."""
    return said.removeprefix("\n\n") if chunk.get("metrics") else said
