"""Requests and replies of /v1/responses, as OpenAI's and vLLM's servers write them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

PATH = "/v1/responses"
HEAD = {
    "id": "resp_7",
    "object": "response",
    "created_at": 1_700_000_000,
    "model": "llama",
    "error": None,
    "incomplete_details": None,
    "instructions": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "temperature": 1.0,
    "tool_choice": "auto",
    "tools": [],
    "top_p": 1.0,
}


def asking(said: object = "Hi", **more: Any) -> dict[str, Any]:
    """A request; `said` is its input."""
    return {"model": "llama", "input": said, **more}


def message(*parts: dict[str, Any], status: str = "completed") -> dict[str, Any]:
    """An item that is a message of these parts."""
    shape = {"id": "msg_1", "type": "message", "role": "assistant", "status": status}
    return {**shape, "content": list(parts)}


def output_text(text: str, **more: Any) -> dict[str, Any]:
    """A part of a message."""
    return {"type": "output_text", "text": text, "annotations": [], **more}


def response(*output: dict[str, Any], status: str = "completed", **more: Any) -> dict[str, Any]:
    """A whole response."""
    return {**HEAD, "status": status, "output": list(output), **more}


def call(arguments: str, name: str = "get_weather") -> dict[str, Any]:
    """An item that calls a function."""
    shape = {"id": "fc_1", "type": "function_call", "call_id": "call_1", "status": "completed"}
    return {**shape, "name": name, "arguments": arguments}


def numbered(events: Iterable[dict[str, Any]]) -> list[bytes]:
    """Server-sent events, numbered, a chunk for each."""
    chunks = []
    for number, event in enumerate(events):
        data = json.dumps({**event, "sequence_number": number}, ensure_ascii=False)
        chunks.append(f"event: {event['type']}\ndata: {data}\n\n".encode())
    return chunks


def at(kind: str, **more: Any) -> dict[str, Any]:
    """An event about the first part of the first item."""
    place = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    return {"type": f"response.{kind}", **place, **more}


def opening() -> list[dict[str, Any]]:
    """The events before the first text."""
    begun = response(status="in_progress")
    item = message(status="in_progress")
    return [
        {"type": "response.created", "response": begun},
        {"type": "response.in_progress", "response": begun},
        {"type": "response.output_item.added", "output_index": 0, "item": item},
        at("content_part.added", part=output_text("")),
    ]


def stream(text: str, size: int = 4) -> list[dict[str, Any]]:
    """The events of a response that says `text`, unnumbered."""
    deltas = [text[start : start + size] for start in range(0, len(text), size)]
    item = message(output_text(text))
    return [
        *opening(),
        *(at("output_text.delta", delta=delta, logprobs=[]) for delta in deltas),
        at("output_text.done", text=text, logprobs=[]),
        at("content_part.done", part=output_text(text)),
        {"type": "response.output_item.done", "output_index": 0, "item": item},
        {"type": "response.completed", "response": response(item)},
    ]
