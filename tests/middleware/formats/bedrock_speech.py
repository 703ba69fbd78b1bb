"""AWS Bedrock's Converse, spoken by our own frames, heard through botocore's."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from botocore.eventstream import EventStreamBuffer  # type: ignore[import-untyped]

from guard_middleware.formats import eventstream
from guard_middleware.formats.bedrock import Bedrock
from tests.middleware.formats.speech import Said

MODEL = "us.meta.llama3-2-90b-instruct-v1:0"
PATH = f"/model/{MODEL}/converse"
USAGE = {"inputTokens": 3, "outputTokens": 5, "totalTokens": 8}


def delta(value: object, index: int = 0, **more: object) -> bytes:
    """A frame that adds to a block."""
    body = {"delta": value, "contentBlockIndex": index, "p": "abcdefgh", **more}
    return eventstream.event("contentBlockDelta", body)


def start(value: object, index: int = 0) -> bytes:
    """A frame that begins a block."""
    body = {"start": value, "contentBlockIndex": index, "p": "abc"}
    return eventstream.event("contentBlockStart", body)


def stop(index: int = 0) -> bytes:
    """A frame that ends a block."""
    return eventstream.event("contentBlockStop", {"contentBlockIndex": index, "p": "abcde"})


def begin() -> bytes:
    """A message's first frame."""
    return eventstream.event("messageStart", {"role": "assistant", "p": "ab"})


def end(reason: str = "end_turn") -> list[bytes]:
    """A message's last frames."""
    meta = {"usage": USAGE, "metrics": {"latencyMs": 7}, "p": "a"}
    return [
        eventstream.event("messageStop", {"stopReason": reason, "p": "abcd"}),
        eventstream.event("metadata", meta),
    ]


def reply(*blocks: object, **more: object) -> dict[str, Any]:
    """A whole reply."""
    message = {"role": "assistant", "content": list(blocks)}
    head = {"output": {"message": message}, "stopReason": "end_turn", "usage": USAGE}
    return {**head, "metrics": {"latencyMs": 7}, **more}


class BedrockSpeech:
    """Converse and ConverseStream."""

    format = Bedrock()
    path = PATH
    stream_path = f"{PATH}-stream"
    stream_type = eventstream.MEDIA_TYPE
    channels: Sequence[str] = ("text", "reasoning", "name", "arguments", "unknown")
    most_choices = 1

    def request(self, said: str, stream: bool, choices: int = 1) -> object:
        return {"messages": [{"role": "user", "content": [{"text": said}]}]}

    def whole(self, said: Mapping[Said, str]) -> bytes:
        texts = {one.channel: text for one, text in said.items()}
        blocks: list[Any] = []
        if "reasoning" in texts:
            thought = {"reasoningText": {"text": texts["reasoning"]}}
            blocks.append({"reasoningContent": thought})
        if "text" in texts:
            blocks.append({"text": texts["text"]})
        if {"name", "arguments"} & set(texts):
            call = {"toolUseId": "t1", "name": texts.get("name", "")}
            blocks.append({"toolUse": {**call, "input": {"of": texts.get("arguments", "")}}})
        more = {"note": texts["unknown"]} if "unknown" in texts else {}
        return json.dumps(reply(*blocks, **more), ensure_ascii=False).encode()

    def events(self, pieces: Sequence[tuple[Said, str]]) -> list[bytes]:
        frames, index, kind = [begin()], 0, ""
        for one, said in pieces:
            if one.channel in ("name", "arguments"):
                continue
            if one.channel != kind and kind:
                frames.append(stop(index))
                index += 1
            kind = one.channel
            if kind == "unknown":
                frames.append(delta({}, index, note=said))
            else:
                frames.append(
                    delta(
                        {"reasoningContent": {"text": said}} if kind != "text" else {"text": said},
                        index,
                    )
                )
        frames += [stop(index)] if kind else []
        frames += _tool_frames(pieces, index + 1)
        return [*frames, *end()]

    def heard(self, body: bytes, streamed: bool) -> Mapping[Said, str]:
        found: dict[Said, str] = defaultdict(str)
        for channel, text in _streamed(body) if streamed else _whole(json.loads(body)):
            found[Said(0, channel)] += text
        return found

    def refused(self, body: bytes, streamed: bool) -> bool:
        return b"guardrail_intervened" in body


def frames_of(body: bytes) -> list[tuple[str, Any]]:
    """Names and values of the frames, as botocore reads them."""
    buffer = EventStreamBuffer()
    buffer.add_data(body)
    found = []
    for message in buffer:
        kind = message.headers[":message-type"]
        found.append((message.headers[f":{kind}-type"], json.loads(message.payload)))
    assert not buffer._data, "there is half a frame at the end"
    return found


def _tool_frames(pieces: Sequence[tuple[Said, str]], index: int) -> list[bytes]:
    name = "".join(said for one, said in pieces if one.channel == "name")
    inputs = [said for one, said in pieces if one.channel == "arguments"]
    if not name and not inputs:
        return []
    begun = start({"toolUse": {"toolUseId": "t1", "name": name}}, index)
    return [begun, *(delta({"toolUse": {"input": one}}, index) for one in inputs), stop(index)]


def _whole(body: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for block in body["output"]["message"]["content"]:
        if "text" in block:
            yield "text", block["text"]
        elif "reasoningContent" in block:
            yield "reasoning", block["reasoningContent"]["reasoningText"]["text"]
        else:
            yield "name", block["toolUse"]["name"]
            yield "arguments", block["toolUse"]["input"]["of"]
    yield "unknown", body.get("note", "")


def _streamed(body: bytes) -> Iterator[tuple[str, str]]:
    frames = frames_of(body)
    names = [name for name, _ in frames]
    assert names[0] == "messageStart" and names[-2:] == ["messageStop", "metadata"]
    assert len(set(names)) >= 3 and names.count("messageStop") == names.count("messageStart") == 1
    block, newest = None, -1
    for name, value in frames[1:-2]:
        index = value["contentBlockIndex"]
        if name == "contentBlockStop":
            assert index == block
            block = None
            continue
        assert index == block or block is None and index > newest
        block = newest = index
        yield "unknown", value.get("note", "")
        yield from _added(value)
    assert block is None


def _added(value: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if "start" in value:
        yield "name", value["start"]["toolUse"]["name"]
        return
    added = value["delta"]
    yield "text", added.get("text", "")
    yield "reasoning", added.get("reasoningContent", {}).get("text", "")
    yield "arguments", added.get("toolUse", {}).get("input", "")
