"""What a process of ours tells beside its work: health, readiness, metrics."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import uvicorn
from prometheus_client import REGISTRY
from prometheus_client.exposition import choose_encoder

from guard_middleware.bodies import header
from guard_middleware.formats.contract import Answer
from guard_middleware.messages import Receive, Scope, Send, answer


class Unsignalled(uvicorn.Server):
    """Leaves signals alone: uvicorn ends the process by them, before we have ended."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Admin:
    """Serves /livez, /readyz, /metrics. `readiness` gives what /readyz answers."""

    def __init__(self, place: str, readiness: Callable[[], Awaitable[Answer]]) -> None:
        """Raises ValueError for a place that is none."""
        self._readiness = readiness
        self.server = Unsignalled(
            uvicorn.Config(
                self._serve,
                **address(place),
                interface="asgi3",  # uvicorn takes a bound method for an application of ASGI 2
                lifespan="off",
                ws="none",
                log_config=None,
                access_log=False,
            )
        )

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        match scope["path"]:
            case "/livez":
                await answer(send, Answer(200, "text/plain", b"ok\n"))
            case "/readyz":
                await answer(send, await self._readiness())
            case "/metrics":
                encode, kind = choose_encoder(header(scope["headers"], b"accept"))
                await answer(send, Answer(200, kind, encode(REGISTRY)))
            case _:
                await answer(send, Answer(404, "text/plain", b"/livez, /readyz, /metrics\n"))


def readiness(drains: bool, **parts: bool) -> Answer:
    """The answer of a process that is ready when all its parts are well, and it does not drain."""
    lines = "".join(f"{name} {'ok' if well else 'down'}\n" for name, well in parts.items())
    status = 200 if all(parts.values()) and not drains else 503
    return Answer(status, "text/plain", (lines + "draining\n" * drains).encode())


def address(place: str) -> dict[str, Any]:
    """uvicorn's words for "host:port" or "unix:/path". Raises ValueError."""
    if place.startswith("unix:"):
        return {"uds": place.removeprefix("unix:")}
    host, _, port = place.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"{place}: must be host:port or unix:/path")
    return {"host": host.strip("[]"), "port": int(port)}
