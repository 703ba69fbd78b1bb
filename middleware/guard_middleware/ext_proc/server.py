"""The processor as a server: gRPC with health, and beside it readiness and metrics over HTTP."""

from __future__ import annotations

import asyncio
import signal
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health

from guard_middleware.admin import Admin, readiness
from guard_middleware.ext_proc.service import SERVICE, Processor
from guard_middleware.ext_proc.tls import credentials
from guard_middleware.formats.contract import Answer
from guard_middleware.guards import Guard
from guard_middleware.metrics import Metrics
from guard_middleware.settings import Settings
from guard_middleware.traces import end, traces

_ROOM = 2**20  # of a message, besides the body in it
_SERVING = health_pb2.HealthCheckResponse.SERVING


@dataclass(frozen=True, slots=True)
class Places:
    """Where a processor listens: "host:port" or "unix:/path"; PEM files where it does so by TLS."""

    listen: str = "127.0.0.1:9002"
    admin: str = "127.0.0.1:9091"
    drain_s: float = 25.0
    exchanges: int = 4096
    tls_certificate: str = ""
    tls_key: str = ""
    tls_clients: str = ""

    def __post_init__(self) -> None:
        if bool(self.tls_certificate) != bool(self.tls_key):
            raise ValueError("tls_certificate, tls_key: one needs the other")
        if self.tls_clients and not self.tls_certificate:
            raise ValueError("tls_clients: needs tls_certificate and tls_key")


class Server:
    """A processor that is served. For one event loop."""

    def __init__(
        self,
        places: Places,
        settings: Settings,
        guard: Guard | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        """With the guard that the settings name, or another. Raises SettingsError, ValueError for
        places that are none, and OSError for files that cannot be read."""
        self._traces = traces(settings, "guard-ext-proc")
        self.processor = Processor(settings, guard, metrics, self._traces)
        self.started = asyncio.Event()
        self.port = 0  # that it listens on
        self._places = places
        self._stop = asyncio.Event()
        self._credentials = (
            credentials(places.tls_certificate, places.tls_key, places.tls_clients)
            if places.tls_certificate
            else None
        )
        self.admin = Admin(places.admin, self._readiness).server

    def stop(self) -> None:
        """Take nothing new, finish what is under way."""
        self._stop.set()

    async def until_signal(self) -> None:
        """Serve until SIGTERM or SIGINT. For the main thread."""
        loop = asyncio.get_running_loop()
        for one in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(one, self.stop)
        await self.serve()

    async def serve(self) -> None:
        """Until `stop`; then what is under way is finished, for `drain_s` at most. Raises
        RuntimeError when the place is taken."""
        server = self._made()
        alive = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(alive, server)
        if self._credentials is None:
            self.port = server.add_insecure_port(self._places.listen)
        else:
            self.port = server.add_secure_port(self._places.listen, self._credentials)
        await server.start()
        for name in ("", SERVICE):
            await alive.set(name, _SERVING)
        beside = asyncio.create_task(self.admin.serve(), name="guard-admin")
        self.started.set()
        try:
            await self._stop.wait()
            await alive.enter_graceful_shutdown()
            await server.stop(self._places.drain_s)
            await self.processor.close()
        finally:
            self.admin.should_exit = True
            await beside
            await end(self._traces)

    def _made(self) -> grpc.aio.Server:
        settings = self.processor.settings
        most = max(settings.max_body_bytes, settings.max_reply_bytes) + _ROOM
        options = [
            ("grpc.max_receive_message_length", most),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),
            ("grpc.keepalive_time_ms", 60_000),  # an Envoy that is gone without a word
            ("grpc.keepalive_permit_without_calls", 1),
        ]
        handlers = [self.processor.handler()]
        exchanges = self._places.exchanges
        return grpc.aio.server(
            handlers=handlers, options=options, maximum_concurrent_rpcs=exchanges
        )

    async def _readiness(self) -> Answer:
        return readiness(self._stop.is_set(), guard=await self.processor.middleware.guard.ready())
