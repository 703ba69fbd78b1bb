"""One screened exchange: the middleware between Envoy's client and Envoy's backend."""

from __future__ import annotations

import asyncio
import uuid
from typing import NoReturn

from guard_api.ext_proc.v3 import processing_pb2 as pb
from guard_middleware.asgi import GuardMiddleware
from guard_middleware.exchange import VERDICT_ID, forwarded
from guard_middleware.ext_proc.modes import Modes
from guard_middleware.ext_proc.sides import Read, Write, side
from guard_middleware.ext_proc.wire import Misled, headers_of, immediate, status_of, wordless
from guard_middleware.messages import Header, Message, Receive, Scope, Send
from guard_middleware.relay import delivered

EXCHANGE = "guard_middleware.ext_proc"  # in a scope: the exchange that its application is part of
LEAVE_S = 5.0  # for the middleware to end what it began, when Envoy has ended the exchange


async def backend(scope: Scope, receive: Receive, send: Send) -> None:
    """The application that the middleware wraps: what is behind Envoy."""
    await scope[EXCHANGE].backend(scope, receive, send)


class Screened:
    """`run` serves an exchange to its end. No byte of a body goes on that the middleware has not
    sent on; where Envoy asks for one, it waits or gets none."""

    def __init__(self, middleware: GuardMiddleware, modes: Modes, read: Read, write: Write) -> None:
        self._middleware = middleware
        self._read = read
        self._write = write
        id_ = uuid.uuid4().hex
        self._scope: Scope = {VERDICT_ID: id_, EXCHANGE: self}
        self._request = side(modes.request, "request", write, early=forwarded)
        self._response = side(
            modes.response, "response", write, early=lambda headers: delivered(headers, id_)
        )
        self._forwarded = False  # the backend has the whole request
        self._request_read = False
        self._gone = asyncio.Event()  # Envoy has ended the stream
        self._answered = False  # the client has got, or will get, its whole reply
        self._start: Message | None = None
        self._instead: bytearray | None = None  # the body of a reply that is not the backend's

    async def run(self, scope: Scope, bodiless: bool) -> None:
        """Raises Misled when Envoy does what cannot be answered; nothing has leaked then."""
        self._scope = scope = {**scope, **self._scope}
        self._request.take_headers(scope["headers"], bodiless)
        pump = asyncio.create_task(self._pump(), name="guard-ext-proc-pump")
        work = asyncio.create_task(self._work(scope), name="guard-ext-proc")
        try:
            await asyncio.wait((pump, work), return_when=asyncio.FIRST_COMPLETED)
            if pump.done():
                await pump
                await work
            else:
                await work
                await pump  # Envoy ends the stream when it has all
        finally:
            pump.cancel()  # to the middleware the client leaves, and it ends what it began
            await asyncio.gather(pump, return_exceptions=True)
            await asyncio.wait((work,), timeout=LEAVE_S)
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    async def _work(self, scope: Scope) -> None:
        await self._middleware(scope, self._receive, self._send)
        if not self._answered and not self._gone.is_set():
            raise Misled("the exchange ended without a reply")

    # Envoy's side.

    async def _pump(self) -> None:
        try:
            while (message := await self._read()) is not None:
                await self._take(message)
        finally:
            self._gone.set()
            self._request.cut()
            self._response.cut()
            self._response.arrived.set()

    async def _take(self, message: pb.ProcessingRequest) -> None:
        match message.WhichOneof("request"):
            case "request_body":
                await self._request.take_body(message.request_body)
            case "request_trailers":
                await self._request.take_trailers(message.request_trailers)
            case "response_headers":
                await self._take_reply(message.response_headers)
            case "response_body":
                await self._response.take_body(message.response_body)
            case "response_trailers":
                await self._response.take_trailers(message.response_trailers)
            case "request_headers":
                raise Misled("there are two requests in one stream")
            case _:
                raise Misled("a message without a part came")

    async def _take_reply(self, given: pb.HttpHeaders) -> None:
        if self._response.arrived.is_set():
            raise Misled("there are two replies to one request")
        headers = headers_of(given.headers)
        if self._answered:
            return
        if not self._forwarded:
            await self._early(headers)
            return
        self._response.take_headers(headers, given.end_of_stream)

    async def _early(self, headers: list[Header]) -> None:
        """A reply to a request that the backend has not got."""
        self._answered = True
        self._abandon()
        await self._write(wordless(status_of(headers)))
        self._gone.set()
        self._request.cut()

    def _abandon(self) -> None:
        self._request.abandon()
        self._response.abandon()

    # The middleware's client.

    async def _receive(self) -> Message:
        if self._scope["type"] == "websocket":
            return {"type": "websocket.connect"}
        if not self._request_read:
            try:
                data, last = await self._request.next()
            except EOFError:
                return {"type": "http.disconnect"}
            self._request_read = last
            return {"type": "http.request", "body": data, "more_body": not last}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if message["type"] == "websocket.close":
            await self._reply_instead(403, [], b"")
        elif message["type"] == "http.response.start":
            self._start = message  # with its first bytes, which tell what it will be
        elif message["type"] == "http.response.body":
            await self._deliver(message.get("body", b""), not message.get("more_body", False))

    async def _deliver(self, data: bytes, last: bool) -> None:
        if self._start is not None:
            start, self._start = self._start, None
            await self._begin(start, data)
        if self._instead is not None:
            self._instead += data
            if last:
                await self._reply_instead(*self._head, bytes(self._instead))
            return
        if last:
            self._answered = True
            await self._response.finish(data)
        else:
            await self._response.write(data)

    async def _begin(self, start: Message, data: bytes) -> None:
        response = self._response
        came = bool(response.headers)
        kept = came and start["status"] == status_of(response.headers)
        if kept and not (data and response.bodiless):
            await response.begin(_with_status(response.headers, start["headers"]))
            return
        if came and response.settled:
            raise Misled(
                "a reply was to be replaced whose headers had gone on, as they do in STREAMED "
                "mode: set response_body_mode FULL_DUPLEX_STREAMED or BUFFERED"
            )
        self._head = (int(start["status"]), list(start["headers"]))
        self._instead = bytearray()

    async def _reply_instead(self, status: int, headers: list[Header], body: bytes) -> None:
        self._answered = True
        self._abandon()
        await self._write(immediate(status, headers, body))

    # The middleware's application.

    async def backend(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand the request on, and the reply back."""
        request, response = self._request, self._response
        await request.begin(scope["headers"])
        message = await receive()  # the middleware gives what it judged in one
        self._forwarded = True
        await request.finish(message["body"])
        await response.arrived.wait()
        if not response.headers:
            await _cancelled()
        headers = [one for one in response.headers if not one[0].startswith(b":")]
        status = status_of(response.headers)
        await send({"type": "http.response.start", "status": status, "headers": headers})
        last = False
        while not last:
            try:
                data, last = await response.next()
            except EOFError:
                await _cancelled()
            await send({"type": "http.response.body", "body": data, "more_body": not last})


async def _cancelled() -> NoReturn:
    """Until the middleware cancels its application, since the client has left."""
    while True:
        await asyncio.Event().wait()


def _with_status(old: list[Header], new: list[Header]) -> list[Header]:
    return [*(one for one in old if one[0].startswith(b":")), *new]
