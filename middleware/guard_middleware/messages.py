"""ASGI's types, and whole responses of ours."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from guard_middleware.formats.contract import Answer

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Header = tuple[bytes, bytes]


async def answer(send: Send, given: Answer, *headers: Header) -> None:
    """Send a whole response."""
    own = (
        (b"content-type", given.content_type.encode()),
        (b"content-length", str(len(given.body)).encode()),
        *given.headers,
    )
    start = {"type": "http.response.start", "status": given.status, "headers": [*own, *headers]}
    await send(start)
    await send({"type": "http.response.body", "body": given.body, "more_body": False})


def is_last(message: Message) -> bool:
    """Whether nothing comes behind this message of a response."""
    return message["type"] == "http.response.body" and not message.get("more_body", False)


class StreamedAnswer:
    """A streamed response; it begins with its first byte."""

    def __init__(self, send: Send, start: Message) -> None:
        self.begun = False
        self._send = send
        self._start = start
        self._clock: Callable[[], float] = asyncio.get_running_loop().time
        self._last = self._clock()

    @property
    def silent_s(self) -> float:
        """Time since something was written last."""
        return self._clock() - self._last

    async def write(self, data: bytes) -> None:
        """Send some bytes on; none are none."""
        self._last = self._clock()
        if data:
            await self._begin()
            await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def finish(self, data: bytes) -> None:
        """Send the last bytes, and the end."""
        await self._begin()
        await self._send({"type": "http.response.body", "body": data, "more_body": False})

    async def _begin(self) -> None:
        if not self.begun:
            self.begun = True
            await self._send(self._start)
