"""Requests and replies of OpenAI's chat, as vLLM writes them."""

from __future__ import annotations

from typing import Any

PATH = "/v1/chat/completions"
HEAD = {"id": "chatcmpl-7", "created": 1_700_000_000, "model": "llama"}


def asking(*said: str, **more: Any) -> dict[str, Any]:
    """A request: turns of user and assistant, one after the other."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]
    return {"model": "llama", "messages": messages, **more}


def reply(*contents: str, **message: Any) -> dict[str, Any]:
    """A whole reply; one choice for each content."""
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": content, **message},
            "logprobs": None,
            "finish_reason": "stop",
        }
        for index, content in enumerate(contents)
    ]
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    return {**HEAD, "object": "chat.completion", "choices": choices, "usage": usage}


def chunk(delta: dict[str, Any], choice: int = 0, finish: str | None = None) -> dict[str, Any]:
    """One event of a stream."""
    one = {"index": choice, "delta": delta, "logprobs": None, "finish_reason": finish}
    return {**HEAD, "object": "chat.completion.chunk", "choices": [one]}


def chunks(text: str, size: int = 4, choice: int = 0) -> list[dict[str, Any]]:
    """The events of one choice that says `text`."""
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    return [
        chunk({"role": "assistant", "content": ""}, choice),
        *(chunk({"content": piece}, choice) for piece in pieces),
        chunk({}, choice, "stop"),
    ]
