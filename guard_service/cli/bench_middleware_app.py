"""What `guardctl bench middleware` runs: a small backend, a guard that allows at once, and both
behind each other. Served by `python -m uvicorn`; the sidecar by `python -m` this module.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from collections.abc import AsyncGenerator, AsyncIterable, Iterator, Sequence
from typing import Any
from urllib.parse import parse_qs

from guard_middleware import GuardMiddleware
from guard_middleware.calls import Piece
from guard_middleware.guards import Conversation
from guard_middleware.messages import Message, Receive, Scope, Send
from guard_middleware.settings import Settings
from guard_middleware.testing import fake_verdict
from guard_middleware.verdict import Outcome, StreamOutcome
from guard_policies.assessment import Action, Direction
from guard_policies.schema import Stream

CHAT = "/v1/chat/completions"
PLAIN = "/plain"  # a route that no rule guards
GO_ON = "/go-on"  # lets the streams that wait go on
GAUGE = "/gauge"  # what is open
WORDS = "A moderate answer of a model, "  # of 6 pieces
_DONE = b"data: [DONE]\n\n"
_HEAD = {"id": "chatcmpl-1", "created": 1_700_000_000, "model": "bench"}


class Backend:
    """Answers chat completions at once: minimal, so that nothing hides what stands before it.

    A stream has as many pieces as `max_tokens` asks for. `pause_ms` in the query is the time
    between pieces; with `waits`, the second half of them waits for the next request to GO_ON.
    """

    def __init__(self) -> None:
        self.open_streams = 0
        self.left_streams = 0
        self.waiting_streams = 0
        self._goes_on = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "lifespan":
            await _live(receive, send)
            return
        body = await _body(receive)
        match scope["path"]:
            case "/v1/chat/completions":
                await self._chat(scope, json.loads(body), receive, send)
            case "/go-on":
                self._goes_on.set()
                self._goes_on = asyncio.Event()
                await _whole(send, b"{}")
            case "/gauge":
                await _whole(send, json.dumps(self._gauge()).encode())
            case _:
                await _whole(send, b"plain", b"text/plain")

    async def _chat(
        self, scope: Scope, asked: dict[str, Any], receive: Receive, send: Send
    ) -> None:
        if not asked.get("stream"):
            await _whole(send, whole_reply(asked["max_tokens"]))
            return
        query = parse_qs(scope["query_string"].decode())
        self.open_streams += 1
        told = asyncio.create_task(_until_left(receive))
        said = asyncio.create_task(self._say(query, asked["max_tokens"], send))
        try:
            await asyncio.wait((told, said), return_when=asyncio.FIRST_COMPLETED)
            self.left_streams += not said.done()
        except asyncio.CancelledError:
            self.left_streams += 1
            raise
        finally:
            self.open_streams -= 1
            told.cancel()
            said.cancel()
            await asyncio.gather(told, said, return_exceptions=True)

    async def _say(self, query: dict[str, list[str]], pieces: int, send: Send) -> None:
        pause_s = float(query.get("pause_ms", ["0"])[0]) / 1000
        waits_at = pieces // 2 if "waits" in query else -1
        await _start(send, b"text/event-stream")
        for at, chunk in enumerate(chunks(pieces)):
            if at == waits_at:
                await self._wait()
            if pause_s:
                await asyncio.sleep(pause_s)
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": _DONE})

    async def _wait(self) -> None:
        self.waiting_streams += 1
        try:
            await self._goes_on.wait()
        finally:
            self.waiting_streams -= 1

    def _gauge(self) -> dict[str, int]:
        return {
            "open": self.open_streams,
            "waiting": self.waiting_streams,
            "left": self.left_streams,
        }


class AllowsAtOnce:
    """A guard that costs nothing; of streams it speaks as often as a guard's default policy."""

    async def judge(self, conversations: Sequence[Conversation]) -> Sequence[Outcome]:
        """ALLOW."""
        return [_ALLOWED] * len(conversations)

    async def growing(
        self, conversation: Conversation, pieces: AsyncIterable[Piece]
    ) -> AsyncGenerator[StreamOutcome]:
        """ALLOW."""
        said = covered = 0
        async for piece in pieces:
            said += len(piece.text)
            if piece.check or said - covered >= _EVERY_CHARS:
                covered = said
                yield StreamOutcome(_ALLOWED, covered, final=False)
        yield StreamOutcome(_ALLOWED, said, final=True)

    async def policy(self) -> None:
        """It has none."""

    async def ready(self) -> bool:
        """It is."""
        return True

    async def close(self) -> None:
        """There is nothing to let go of."""


_EVERY_CHARS = Stream().check_every_chars
_ALLOWED = fake_verdict(Action.ALLOW, Direction.RESPONSE)


def bare() -> Backend:
    """The backend alone."""
    return Backend()


def guarded() -> GuardMiddleware:
    """The backend inside the middleware."""
    return GuardMiddleware(Backend(), AllowsAtOnce(), settings=Settings())


def guarded_by_starter() -> GuardMiddleware:
    """The backend inside the middleware as it comes: the starter guard in the same process."""
    return GuardMiddleware(Backend(), settings=Settings())


def question(pieces: int, streamed: bool) -> bytes:
    """A request for so many pieces; no two have the same text."""
    turns = [
        {"role": "system", "content": "You are a helpful assistant. Answer in one paragraph."},
        {"role": "user", "content": f"How does a heat pump warm a house? ({next(_NUMBERS)})"},
    ]
    return json.dumps(
        {"model": "bench", "messages": turns, "max_tokens": pieces, "stream": streamed}
    ).encode()


_NUMBERS = itertools.count(1)


def whole_reply(pieces: int) -> bytes:
    """The reply that is not streamed."""
    said = "".join(_pieces(pieces))
    choice = {"index": 0, "message": {"role": "assistant", "content": said}, "logprobs": None}
    return json.dumps(
        {
            **_HEAD,
            "object": "chat.completion",
            "choices": [{**choice, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 9, "completion_tokens": pieces, "total_tokens": pieces + 9},
        }
    ).encode()


def chunks(pieces: int) -> Iterator[bytes]:
    """The events of a stream, each written when its turn comes, as servers do; less the last."""
    for at, piece in enumerate(_pieces(pieces)):
        delta = {"content": piece} if at else {"role": "assistant", "content": piece}
        reason = "stop" if at == pieces - 1 else None
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        event = {**_HEAD, "object": "chat.completion.chunk", "choices": [choice]}
        yield b"data: " + json.dumps(event).encode() + b"\n\n"


def stream_body(pieces: int) -> bytes:
    """What the client of a stream is to get."""
    return b"".join(chunks(pieces)) + _DONE


def _pieces(number: int) -> Iterator[str]:
    words = WORDS.split()
    return (f"{words[at % len(words)]} " for at in range(number))


async def _start(send: Send, kind: bytes, *headers: tuple[bytes, bytes]) -> None:
    start = {"type": "http.response.start", "status": 200}
    await send({**start, "headers": [(b"content-type", kind), *headers]})


async def _whole(send: Send, body: bytes, kind: bytes = b"application/json") -> None:
    await _start(send, kind, (b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.body", "body": body})


async def _body(receive: Receive) -> bytes:
    parts = []
    while True:
        message: Message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


async def _until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _live(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


def main() -> None:
    """Serve the sidecar with the guard that allows at once: UPSTREAM LISTEN ADMIN."""
    from guard_middleware.sidecar import Places, Sidecar  # needs the extra

    upstream, listen, admin = sys.argv[1:]
    places = Places(upstream, listen=listen, admin=admin, drain_s=60)
    settings = Settings(guarded=("/v1",))
    Sidecar(places, settings, AllowsAtOnce()).run()


if __name__ == "__main__":
    main()
