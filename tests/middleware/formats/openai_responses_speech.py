"""OpenAI's Responses, spoken and heard."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from guard_middleware.formats.openai_responses import OpenAIResponses
from tests.middleware.asgi_calls import EVENTS
from tests.middleware.formats.openai_responses_replies import HEAD, PATH, asking, numbered, response
from tests.middleware.formats.speech import Said

# Channel: the number of its item, the list that its part is in, the part's number, key and type.
_PARTS = {
    "reasoning": (0, "content", 0, "text", "reasoning_text"),
    "summary": (0, "summary", 0, "text", "summary_text"),
    "content": (1, "content", 0, "text", "output_text"),
    "refusal": (1, "content", 1, "refusal", "refusal"),
}
_STEMS = {
    "reasoning": "response.reasoning_text",
    "summary": "response.reasoning_summary_text",
    "content": "response.output_text",
    "refusal": "response.refusal",
}
_ITEMS: list[dict[str, Any]] = [
    {"id": "rs_1", "type": "reasoning", "status": "in_progress", "summary": [], "content": []},
    {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "status": "in_progress",
        "content": [{"type": "output_text", "text": "", "annotations": []}]
        + [{"type": "refusal", "refusal": ""}],
    },
    {"id": "fc_1", "type": "function_call", "call_id": "call_1", "status": "in_progress"},
]
_OWN = {item["id"] for item in _ITEMS}


class OpenAIResponsesSpeech:
    """Responses."""

    format = OpenAIResponses()
    path = stream_path = PATH
    stream_type = EVENTS
    channels = (*_PARTS, "name", "arguments", "alternatives", "unknown")
    most_choices = 1

    def request(self, said: str, stream: bool, choices: int = 1) -> object:
        return asking(said, stream=stream)

    def whole(self, said: Mapping[Said, str]) -> bytes:
        texts = {one.channel: text for one, text in said.items()}
        more = {"note": texts["unknown"]} if "unknown" in texts else {}
        return json.dumps(response(*_items(texts), **more)).encode()

    def events(self, pieces: Sequence[tuple[Said, str]]) -> list[bytes]:
        whole: dict[str, str] = defaultdict(str)
        for said, text in pieces:
            whole[said.channel] += text
        begun = {**HEAD, "status": "in_progress", "output": []}
        events: list[dict[str, Any]] = [{"type": "response.created", "response": begun}]
        items = _items(whole)
        for index, item in enumerate(_ITEMS):
            empty = {**item, "name": whole["name"], "arguments": ""} if index == 2 else item
            added = {"type": "response.output_item.added", "output_index": index, "item": empty}
            events.append(added)
        events += [_grown(said.channel, text) for said, text in pieces if said.channel != "name"]
        events += [_finished(channel, whole[channel]) for channel in _PARTS]
        for index, item in enumerate(items):
            done = {"type": "response.output_item.done", "output_index": index, "item": item}
            events.append(done)
        events.append({"type": "response.completed", "response": response(*items)})
        return numbered(events)

    def heard(self, body: bytes, streamed: bool) -> Mapping[Said, str]:
        if streamed:
            found = _heard(_events(body))
        else:
            whole = json.loads(body)
            found = {**_texts(whole["output"]), "unknown": whole.get("note", "")}
        return {Said(0, channel): text for channel, text in found.items()}

    def refused(self, body: bytes, streamed: bool) -> bool:
        end = _events(body)[-1]["response"] if streamed else json.loads(body)
        details = end["incomplete_details"]
        return bool(end["status"] == "incomplete" and details == {"reason": "content_filter"})


def _items(texts: Mapping[str, str]) -> list[dict[str, Any]]:
    items = [{**item, "status": "completed"} for item in _ITEMS]
    for group, channels in {"content": ("reasoning",), "summary": ("summary",)}.items():
        items[0][group] = [_part(channel, texts.get(channel, "")) for channel in channels]
    items[1]["content"] = [_part(name, texts.get(name, "")) for name in ("content", "refusal")]
    if "alternatives" in texts:
        entry = _logprob(texts["alternatives"], texts.get("content", ""))
        items[1]["content"][0]["logprobs"] = [entry]
    items[2] |= {name: texts.get(name, "") for name in ("name", "arguments")}
    return items


def _part(channel: str, text: str) -> dict[str, Any]:
    *_, key, kind = _PARTS[channel]
    return {"type": kind, key: text, **({"annotations": []} if channel == "content" else {})}


def _logprob(text: str, token: str = "") -> dict[str, Any]:
    return {"token": token, "logprob": -0.1, "top_logprobs": [{"token": text, "logprob": -1.0}]}


def _place(channel: str) -> dict[str, Any]:
    index, group, part, *_ = _PARTS[channel]
    place = {"item_id": _ITEMS[index]["id"], "output_index": index, f"{group}_index": part}
    return place


def _grown(channel: str, text: str) -> dict[str, Any]:
    if channel == "unknown":
        return {"type": "response.note.delta", "note": text}
    if channel == "arguments":
        place = {"item_id": "fc_1", "output_index": 2}
        return {"type": "response.function_call_arguments.delta", **place, "delta": text}
    if channel == "alternatives":
        more = {"delta": "", "logprobs": [_logprob(text)]}
        return {"type": "response.output_text.delta", **_place("content"), **more}
    return {"type": f"{_STEMS[channel]}.delta", **_place(channel), "delta": text}


def _finished(channel: str, text: str) -> dict[str, Any]:
    key = _PARTS[channel][3]
    return {"type": f"{_STEMS[channel]}.done", **_place(channel), key: text}


def _events(body: bytes) -> list[dict[str, Any]]:
    assert body.endswith(b"\n\n")
    events = []
    for block in body.split(b"\n\n"):
        if block not in (b"", b":"):
            name, _, data = block.partition(b"\n")
            events.append(json.loads(data.removeprefix(b"data: ")))
            assert name == b"event: " + events[-1]["type"].encode()
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[0]["type"] == "response.created"
    return events


def _heard(events: Sequence[dict[str, Any]]) -> dict[str, str]:
    """What grows; whatever repeats it must say the same."""
    found: dict[str, str] = defaultdict(str)
    for event in events:
        stem, _, stage = event["type"].rpartition(".")
        for channel, text in _told(event):
            if stage == "delta" or channel == "name":
                found[channel] = text if channel == "name" else found[channel] + text
            else:
                assert text == found[channel], (event, found)
    assert stage in ("completed", "incomplete")
    for channel, text in _texts(events[-1]["response"]["output"]).items():
        assert text in ("", found[channel])
    return found


def _told(event: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    stem, _, stage = event["type"].rpartition(".")
    for entry in event.get("logprobs", ()):
        yield "alternatives", entry["top_logprobs"][0]["token"]
    if stem == "response.note":
        yield "unknown", event["note"]
    elif stem == "response.function_call_arguments":
        yield "arguments", event["delta"]
    elif stem == "response.output_item" and event["item"]["type"] == "function_call":
        yield "name", event["item"]["name"]
    for channel, (index, group, part, key, _) in _PARTS.items():
        if stem == _STEMS[channel]:
            place = (event["output_index"], event[f"{group}_index"])
            # A refusal in place of everything has a message of its own.
            assert place == (index, part) or event["item_id"] not in _OWN
            yield channel, event["delta" if stage == "delta" else key]


def _texts(output: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    found: dict[str, str] = defaultdict(str)
    for item in output:
        for part in (*item.get("content", ()), *item.get("summary", ())):
            for channel, (*_, key, kind) in _PARTS.items():
                if part["type"] == kind:
                    found[channel] += part[key]
            for entry in part.get("logprobs", ()):
                found["alternatives"] += entry["top_logprobs"][0]["token"]
        for name in ("name", "arguments"):
            found[name] += item.get(name, "")
    return found
