"""Exchanges that pass: nothing of them is changed, and somebody may listen.

What is not guarded passes; so does everything in shadow mode, and what Envoy only shows
(observability mode), which is not answered at all.
"""

from __future__ import annotations

import asyncio

from guard_api.ext_proc.v3 import processing_pb2 as pb
from guard_middleware.asgi import GuardMiddleware
from guard_middleware.ext_proc.heard import Heard
from guard_middleware.ext_proc.modes import DUPLEX, NOTHING_MORE, Modes
from guard_middleware.ext_proc.screened import EXCHANGE, LEAVE_S
from guard_middleware.ext_proc.sides import Read, Write
from guard_middleware.ext_proc.wire import Misled, Words
from guard_middleware.messages import Message, Scope


class Passing:
    """Answers that all may go on. `bare`: but a request's body, which goes nowhere. With
    `listener` that middleware hears what passes; it must be in shadow mode."""

    def __init__(
        self,
        modes: Modes,
        read: Read,
        write: Write | None,
        bare: bool = False,
        listener: GuardMiddleware | None = None,
    ) -> None:
        """Without `write` nothing is answered."""
        self._modes = modes
        self._read = read
        self._write = write
        self._bare = bare
        self._listener = listener
        self._heard = Heard(modes)

    async def run(self, scope: Scope, bodiless: bool) -> None:
        """To the end of the stream. Raises Misled for a message without a part."""
        task = None
        if self._listener is not None:
            self._heard.begin(bodiless)
            hears = self._listener({**scope, EXCHANGE: self._heard}, self._heard.receive, _nobody)
            task = asyncio.create_task(hears, name="guard-ext-proc-listener")
            task.add_done_callback(self._heard.unheard)
        try:
            await self._answer(Words("request").headers(), ends=bodiless or not self._bare)
            while (message := await self._read()) is not None:
                if self._listener is not None:  # first: Envoy may be gone once it has its answer
                    await self._heard.take(message)
                await self._pass(message)
        finally:
            await self._heard.end()
            if task is not None:
                await asyncio.wait((task,), timeout=LEAVE_S)
                task.cancel()

    async def resume(self, message: pb.ProcessingRequest | None) -> None:
        """From a message in the middle on, to the end of the stream."""
        while message is not None:
            await self._pass(message)
            message = await self._read()

    async def _pass(self, message: pb.ProcessingRequest) -> None:
        match message.WhichOneof("request"):
            case "response_headers":
                await self._answer(Words("response").headers())
            case "request_body":
                await self._answer(self._body("request", message.request_body))
            case "response_body":
                await self._answer(self._body("response", message.response_body))
            case "request_trailers":
                await self._answer(Words("request").trailers())
            case "response_trailers":
                await self._answer(Words("response").trailers())
            case _:
                raise Misled("a message came that has no place in a stream")

    def _body(self, direction: str, chunk: pb.HttpBody) -> pb.ProcessingResponse:
        mode = self._modes.request if direction == "request" else self._modes.response
        dropped = self._bare and direction == "request"
        if mode == DUPLEX:
            return Words(direction).chunk(b"" if dropped else chunk.body, chunk.end_of_stream)
        return Words(direction).body(b"") if dropped else Words(direction).unchanged()

    async def _answer(self, answer: pb.ProcessingResponse, ends: bool = False) -> None:
        if ends and self._listener is None:
            answer.mode_override.CopyFrom(NOTHING_MORE)
        if self._write is not None:
            await self._write(answer)


async def _nobody(message: Message) -> None:
    """The client of what is only listened to."""
