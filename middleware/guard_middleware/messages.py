"""ASGI's types, and whole responses of ours."""

from __future__ import annotations

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
