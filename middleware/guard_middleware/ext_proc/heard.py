"""What passed, told again: the client and the application of a middleware in shadow mode."""

from __future__ import annotations

import asyncio
import logging

from guard_api.ext_proc.v3 import processing_pb2 as pb
from guard_middleware.ext_proc.modes import BUFFERED, Modes
from guard_middleware.ext_proc.sides import MOST_CHUNKS
from guard_middleware.ext_proc.wire import headers_of
from guard_middleware.failures import log_failure
from guard_middleware.messages import Message, Receive, Scope, Send

LOG = logging.getLogger(__name__)

_REQUEST, _REPLY = "http.request", "http.response.body"  # ASGI's names


class Heard:
    """What passed, for a middleware in shadow mode: it never waits for its verdicts, so what is
    kept here is little."""

    def __init__(self, modes: Modes) -> None:
        self._modes = modes
        self._request: asyncio.Queue[Message] = asyncio.Queue(MOST_CHUNKS)
        self._reply: asyncio.Queue[Message] = asyncio.Queue(MOST_CHUNKS)
        self._listens = False
        self._asked = False  # the request is complete
        self._replied = False

    def begin(self, bodiless: bool) -> None:
        """Somebody listens from here on."""
        self._listens = True
        if bodiless:
            self._ask(b"", True)

    def unheard(self, listener: asyncio.Task[None]) -> None:
        """Nobody does any more."""
        self._listens = False
        for queue in (self._request, self._reply):
            while not queue.empty():
                queue.get_nowait()
        if not listener.cancelled() and (failure := listener.exception()):
            log_failure(LOG, "a copy could not be screened", failure)

    async def take(self, message: pb.ProcessingRequest) -> None:
        """Hear a message that passed."""
        match message.WhichOneof("request"):
            case "request_body" if not self._asked:
                one = message.request_body
                self._asked = one.end_of_stream or self._modes.request == BUFFERED
                await self._put(self._request, _body(_REQUEST, one.body, self._asked))
            case "request_trailers" if not self._asked:
                await self._put(self._request, _body(_REQUEST, b"", True))
                self._asked = True
            case "response_headers":
                headers = headers_of(message.response_headers.headers)
                await self._complete()
                await self._put(self._reply, _start(headers))
                if message.response_headers.end_of_stream:
                    await self._put(self._reply, _body(_REPLY, b"", True))
                    self._replied = True
            case "response_body" if not self._replied:
                one = message.response_body
                self._replied = one.end_of_stream or self._modes.response == BUFFERED
                await self._put(self._reply, _body(_REPLY, one.body, self._replied))
            case "response_trailers" if not self._replied:
                await self._put(self._reply, _body(_REPLY, b"", True))
                self._replied = True

    async def end(self) -> None:
        """Nothing passes any more."""
        if not self._asked:
            self._asked = True
            await self._put(self._request, {"type": "http.disconnect"})
        if not self._replied:
            self._replied = True
            await self._put(self._reply, {"type": "http.disconnect"})

    async def receive(self) -> Message:
        """ASGI, for the middleware."""
        return await self._request.get()

    async def backend(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application: it says again what was said."""
        while (message := await receive())["type"] == "http.request":
            if not message.get("more_body", False):
                break
        while (message := await self._reply.get())["type"] != "http.disconnect":
            await send(message)
            if message["type"] == _REPLY and not message["more_body"]:
                return

    async def _complete(self) -> None:
        """A reply has begun: what is not known of the request by now is not waited for."""
        if not self._asked:
            self._asked = True
            await self._put(self._request, {"type": "http.disconnect"})

    def _ask(self, data: bytes, last: bool) -> None:
        self._request.put_nowait(_body(_REQUEST, data, last))
        self._asked = last

    async def _put(self, queue: asyncio.Queue[Message], message: Message) -> None:
        if self._listens:
            await queue.put(message)


def _start(headers: list[tuple[bytes, bytes]]) -> Message:
    told = [one for one in headers if not one[0].startswith(b":")]
    status = next((value for key, value in headers if key == b":status"), b"0")
    return {"type": "http.response.start", "status": int(status), "headers": told}


def _body(kind: str, data: bytes, last: bool) -> Message:
    return {"type": kind, "body": data, "more_body": not last}
