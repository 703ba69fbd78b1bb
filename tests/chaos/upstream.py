"""The model's server behind the guard: says what each request's script wants, OpenAI's chat.

Served by `uvicorn tests.chaos.upstream:alone --factory` behind a sidecar, and by `:guarded` inside
the middleware. CHAOS_ARRIVED is the file that tells what reached it.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path

from prometheus_client import generate_latest

from guard_middleware import GuardMiddleware
from guard_middleware.messages import App, Message, Receive, Scope, Send
from tests.chaos.journal import Arrived, Writer, now
from tests.chaos.script import HEADER, Script

ARRIVED = "CHAOS_ARRIVED"
_HEAD = {"id": "chatcmpl-1", "created": 1_700_000_000, "model": "chaos"}


class Upstream:
    """Answers chat completions by script; everything else with 200 and nothing much."""

    def __init__(self, journal: Writer) -> None:
        self._journal = journal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "lifespan":
            await _live(receive, send)
            return
        asked = await _body(receive)
        header = dict(scope["headers"]).get(HEADER.encode())
        if header is None:
            await _whole(send, generate_latest() if scope["path"] == "/metrics" else b"ok")
            return
        script = Script.of(header.decode())
        self._journal.write(Arrived(now(), script.case))
        if json.loads(asked).get("stream"):
            await self._stream(script, send)
            return
        if script.dies_at >= 0:
            raise ConnectionResetError("as the script wants")
        await asyncio.sleep(script.pause_s)
        await _whole(send, whole(script))

    async def _stream(self, script: Script, send: Send) -> None:
        await _start(send, b"text/event-stream")
        for at, event in enumerate(events(script)):
            if at == script.dies_at:
                raise ConnectionResetError("as the script wants")
            if script.pause_s:
                await asyncio.sleep(script.pause_s)
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


def whole(script: Script) -> bytes:
    """The reply that is not streamed."""
    message = {"role": "assistant", "content": script.text}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    usage = {"prompt_tokens": 9, "completion_tokens": 9, "total_tokens": 18}
    return json.dumps(
        {**_HEAD, "object": "chat.completion", "choices": [choice], "usage": usage}
    ).encode()


def events(script: Script) -> Iterator[bytes]:
    """The events of a stream, one for each piece, and one that ends it."""
    for piece in script.said():
        yield _event({"content": piece}, None)
    yield _event({}, "stop")


def _event(delta: dict[str, str], finish: str | None) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    event = {**_HEAD, "object": "chat.completion.chunk", "choices": [choice]}
    return b"data: " + json.dumps(event).encode() + b"\n\n"


def alone() -> App:
    """Nothing but the upstream."""
    return Upstream(Writer(Path(os.environ[ARRIVED])))


def guarded() -> App:
    """Inside the middleware, whose settings come from the environment."""
    return GuardMiddleware(alone())


async def _start(send: Send, kind: bytes, *headers: tuple[bytes, bytes]) -> None:
    start = {"type": "http.response.start", "status": 200}
    await send({**start, "headers": [(b"content-type", kind), *headers]})


async def _whole(send: Send, body: bytes) -> None:
    await _start(send, b"application/json", (b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.body", "body": body})


async def _body(receive: Receive) -> bytes:
    parts = []
    while True:
        message: Message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


async def _live(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
