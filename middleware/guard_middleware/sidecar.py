"""The sidecar: a proxy inside the middleware, and beside it health, readiness and metrics."""

from __future__ import annotations

import asyncio
import logging
import signal
from dataclasses import dataclass

import uvicorn

from guard_middleware.admin import Admin, Unsignalled, address, readiness
from guard_middleware.asgi import GuardMiddleware
from guard_middleware.formats.contract import Answer
from guard_middleware.guards import Guard
from guard_middleware.messages import Receive, Scope, Send
from guard_middleware.proxy import Proxy
from guard_middleware.settings import Settings
from guard_middleware.traces import end, traces

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Places:
    """Where a sidecar listens and what it forwards to; "host:port" or "unix:/path"."""

    upstream: str
    listen: str = "127.0.0.1:8080"
    admin: str = "127.0.0.1:9091"
    drain_s: float = 25.0
    connections: int = 4096
    connect_timeout_s: float = 5.0
    read_timeout_s: float = 600.0


class Sidecar:
    """A screened reverse proxy. For one event loop."""

    def __init__(self, places: Places, settings: Settings, guard: Guard | None = None) -> None:
        """With the guard that the settings name, or another. Raises ValueError for places that are
        none."""
        self._proxy = Proxy(places.upstream, places.connect_timeout_s, places.read_timeout_s)
        self._traces = traces(settings, "guard-sidecar")
        self.middleware = GuardMiddleware(
            self._proxied, guard, settings=settings, tracer_provider=self._traces
        )
        self.server = Unsignalled(
            uvicorn.Config(
                self.middleware,
                **address(places.listen),
                interface="asgi3",
                lifespan="on",
                http="h11",
                ws="none",
                proxy_headers=False,
                server_header=False,
                date_header=False,
                access_log=False,
                log_config=None,
                limit_concurrency=places.connections,
                timeout_graceful_shutdown=int(places.drain_s),
            )
        )
        self.admin = Admin(places.admin, self._readiness).server

    def run(self) -> None:
        """`until_signal`, in a loop of its own."""
        asyncio.run(self.until_signal())

    async def until_signal(self) -> None:
        """Serve until SIGTERM or SIGINT; a second SIGINT does not wait. For the main thread."""
        loop = asyncio.get_running_loop()
        for one in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(one, self.server.handle_exit, one, None)
        await self.serve()

    async def serve(self) -> None:
        """Until `server.should_exit`; then what is under way is finished."""
        beside = asyncio.create_task(self.admin.serve(), name="guard-admin")
        try:
            await self.server.serve()
        finally:
            self.admin.should_exit = True
            await beside
            await end(self._traces)

    async def _proxied(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._proxy(scope, receive, send)
            return
        while True:  # lifespan: web sockets do not come here
            message = await receive()
            if message["type"] == "lifespan.startup":
                await send({"type": "lifespan.startup.complete"})
            else:
                await self._proxy.close()
                await send({"type": "lifespan.shutdown.complete"})
                return

    async def _readiness(self) -> Answer:
        guard, upstream = await asyncio.gather(
            self.middleware.guard.ready(), self._proxy.reachable()
        )
        return readiness(self.server.should_exit, guard=guard, upstream=upstream)
