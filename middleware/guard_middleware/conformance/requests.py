"""Requests as bytes: where they go, what protocols say, heads and bodies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

BENIGN = "What is the capital of Portugal?"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a deployment is: `host` for the header, `prefix` in front of all paths, more headers
    for all requests, the model to name."""

    host: str
    prefix: str = ""
    headers: tuple[str, ...] = ()
    model: str = "default"


@dataclass(frozen=True, slots=True)
class Protocol:
    """A backend protocol by its format's name: paths below the prefix, and the body of a request
    with one turn of the user, of (model, text, stream)."""

    name: str
    path: str
    stream_path: str
    body: Callable[[str, str, bool], Mapping[str, Any]]


def turn(text: str) -> list[dict[str, Any]]:
    """Messages with one turn of the user."""
    return [{"role": "user", "content": text}]


PROTOCOLS = (
    Protocol(
        "openai-chat",
        *("/v1/chat/completions",) * 2,
        lambda model, text, stream: {
            **{"model": model, "messages": turn(text), "stream": stream, "max_tokens": 16}
        },
    ),
    Protocol(
        "openai-responses",
        *("/v1/responses",) * 2,
        lambda model, text, stream: {
            **{"model": model, "input": text, "stream": stream, "max_output_tokens": 16}
        },
    ),
    Protocol(
        "openai-text",
        *("/v1/completions",) * 2,
        lambda model, text, stream: {
            **{"model": model, "prompt": text, "stream": stream, "max_tokens": 16}
        },
    ),
    Protocol(
        "ollama-chat",
        *("/api/chat",) * 2,
        lambda model, text, stream: {"model": model, "messages": turn(text), "stream": stream},
    ),
    Protocol(
        "ollama-generate",
        *("/api/generate",) * 2,
        lambda model, text, stream: {"model": model, "prompt": text, "stream": stream},
    ),
    Protocol(
        "bedrock",
        "/model/{model}/converse",
        "/model/{model}/converse-stream",
        lambda model, text, stream: {"messages": [{"role": "user", "content": [{"text": text}]}]},
    ),
    Protocol(
        "llama-stack-chat-completion",
        *("/v1/inference/chat-completion",) * 2,
        lambda model, text, stream: {"model_id": model, "messages": turn(text), "stream": stream},
    ),
    Protocol(
        "tgi",
        "/generate",
        "/generate_stream",
        lambda model, text, stream: {"inputs": text, "parameters": {"max_new_tokens": 16}},
    ),
    Protocol(
        "llama-cpp",
        *("/completion",) * 2,
        lambda model, text, stream: {"prompt": text, "stream": stream, "n_predict": 16},
    ),
)


def post(
    place: Place,
    path: str,
    body: bytes,
    *headers: str,
    method: str = "POST",
    target: Callable[[str], str] = lambda path: path,
    typed: bool = True,
) -> bytes:
    """A request with its length; `target` spells the path in another way."""
    kind = ("Content-Type: application/json",) if typed else ()
    length = f"Content-Length: {len(body)}"
    line = f"{method} {target(place.prefix + path)} HTTP/1.1"
    return head(place, line, *kind, length, *headers) + body


def head(place: Place, line: str, *headers: str) -> bytes:
    """A request's head."""
    own = (f"Host: {place.host}", "Connection: close", *place.headers)
    return "\r\n".join((line, *own, *headers)).encode() + b"\r\n\r\n"
