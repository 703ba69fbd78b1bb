"""The middleware around a proxy, in an application of its own: `uvicorn tests.marker.app:app`."""

from __future__ import annotations

import logging
import os

from prometheus_client import generate_latest

from guard_middleware import GuardMiddleware
from guard_middleware.formats.contract import Answer
from guard_middleware.messages import Receive, Scope, Send, answer
from guard_middleware.proxy import Proxy
from guard_service.tracing.exporting import end, provider
from tests.marker.upstream import ADDRESS

logging.basicConfig(level="DEBUG", format="%(message)s")
_spans = provider("app", "0", lambda result, count: None)
_guarded = GuardMiddleware(Proxy(os.environ[ADDRESS]), guarded=("/",), tracer_provider=_spans)


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """ASGI."""
    if scope["type"] == "http" and scope["path"] == "/metrics":
        await answer(send, Answer(200, "text/plain", generate_latest()))
    elif scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        end(_spans)
        await send({"type": "lifespan.shutdown.complete"})
    else:
        await _guarded(scope, receive, send)
