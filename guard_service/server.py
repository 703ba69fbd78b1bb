"""The server: start, health, drain, stop."""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry

from guard_api.v1 import guard_pb2_grpc
from guard_policies.schema import Policy
from guard_service import __version__
from guard_service.audit.opening import open_audit
from guard_service.audit.recording import Audit, Audited
from guard_service.batcher import Batcher
from guard_service.config import Settings
from guard_service.engines import Engine, open_engine
from guard_service.health import Health
from guard_service.interceptors import SERVICE, Door, State
from guard_service.live.candidates import key_of
from guard_service.live.models import ModelFiles, Open
from guard_service.live.policies import PolicyFiles, check_policies, loaded_policies
from guard_service.live.reloads import Reloads
from guard_service.live.serving import Live, Makers
from guard_service.live.watching import Watcher
from guard_service.metrics import (
    AuditMetrics,
    HttpServer,
    Metrics,
    Probes,
    ReloadMetrics,
    SecurityMetrics,
)
from guard_service.security.authenticator import Authenticator
from guard_service.security.certificates import CertificateError, ServerTls, TlsFiles
from guard_service.security.signatures import check_signed
from guard_service.servicer import Servicer
from guard_service.tracing import Traces

LOG = logging.getLogger(__name__)
FLUSH_S = 1.0  # after the last verdict: for its bytes to leave
LAME_DUCK_S = 3.0  # after the drain: for telling latecomers to go elsewhere
JOIN_S = 5.0
PENDING_CALLS = 65_536
METADATA_BYTES = 16 * 1024


class GuardServer:
    """One guard, or a cascade of two, behind gRPC. All methods belong to one event loop."""

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        policies: Mapping[str, Policy],
        second: Engine | None = None,
        traces: Traces | None = None,
        open_model: Open | None = None,
    ) -> None:
        """`second` is the engine of a second guard in this process, for policies with a cascade.
        `open_model` opens those that take the engines' place while the server runs.

        Raises UnknownPolicy or PolicyNotSupported when the default policy cannot be served, OSError
        for a CA of the second guard that cannot be read, or traces that cannot be had, PolicyError
        for a wrong auth file.
        """
        # Images may be for the second guard, of which nothing is known where it is elsewhere.
        images = engine.card.judges_images or bool(
            second.card.judges_images if second else settings.second_guard
        )
        settings = replace(settings, max_message_bytes=settings.message_bytes(images))
        self.settings = settings
        self.address = ""
        self.metrics_port = 0
        self._metrics = Metrics()
        self._traces = traces or _traces(settings, self._metrics)
        registry = self._metrics.registry
        self._security = SecurityMetrics(registry)
        self.watcher = Watcher(settings.reload_s)
        self._auth = self._authenticator()
        self._door = Door(
            self._metrics,
            settings.max_calls,
            settings.max_call_bytes,
            self._traces.tracer if self._traces else None,
            self._auth,
        )
        self._health = Health(("", SERVICE))
        self._makers = Makers(settings, self._metrics, self._worker_answers)
        hosted = self._makers.second(second) if second is not None else None
        guards = self._makers.guards(self._makers.first(engine), hosted)
        key = key_of(settings.candidate_key)
        self._live = Live(guards, policies, settings.default_policy, self._metrics, key)
        check_policies(self._live.judge)
        self._audit_metrics = AuditMetrics(registry)
        self._audit: Audit | None = None
        self._policy_reloads = Reloads(ReloadMetrics("guard_policy", registry))
        self._model_reloads = Reloads(ReloadMetrics("guard_model", registry))
        self._follow(open_model or partial(opened, settings))
        self._server: grpc.aio.Server | None = None
        self._http: HttpServer | None = None
        self._up = True

    @property
    def batcher(self) -> Batcher:
        """The queue before the first guard's model."""
        return self._live.guards.first.batcher

    @property
    def registry(self) -> CollectorRegistry:
        """Of its metrics."""
        return self._metrics.registry

    async def start(self) -> None:
        """Bind, check the model against its golden prompts, then take calls.

        Raises OSError when an address is taken or the audit log cannot be begun, and EngineFailed
        when the model scores otherwise than recorded.
        """
        for risk in exposed(self.settings):
            LOG.warning("%s", risk)
        started_at = Timestamp()
        started_at.FromNanoseconds(time.time_ns())
        self._describe(started_at)
        try:
            if self.settings.metrics:
                self._http = self._serve_http()
            self._audit = open_audit(self.settings, self._audit_metrics)
            self._door.recorder = self._audit
            servicer = Servicer(
                self._live if self._audit is None else Audited(self._live, self._audit),
                self.settings,
                started_at,
                self._policy_reloads,
                self._model_reloads,
                recorder=self._audit,
            )
            self._server = await self._bound(servicer)
            await self._server.start()
            self.watcher.start()
            await self._live.guards.start(self._live.judge)
        except BaseException:
            await self.stop(0.0)
            raise
        self._open(State.OPEN)

    async def stop(self, grace_s: float) -> bool:
        """Drain: refuse new calls, finish the accepted ones, at most for `grace_s`, then close.

        False when calls had to be ended. May be called again; the later call waits for nothing.
        """
        self._open(State.DRAINING)
        drained = await self._door.drained(grace_s)
        if grace_s:
            await self._door.quiet(LAME_DUCK_S)
        await self.watcher.close()
        if self._server is not None:
            await self._server.stop(FLUSH_S if grace_s else 0.0)
            self._server = None
        await self._live.close()
        if self._makers.remote is not None:
            await self._makers.remote.close()
        if self._http is not None:
            await asyncio.to_thread(self._http.close)
            self._http = None
        if self._audit is not None:
            await asyncio.to_thread(self._audit.writer.close)
            self._audit = None
        if self._traces is not None:
            await asyncio.to_thread(self._traces.close)
        self._up = False
        return drained

    async def wait(self) -> None:
        """Until the server has stopped."""
        if self._server is not None:
            await self._server.wait_for_termination()

    async def _bound(self, servicer: Servicer) -> grpc.aio.Server:
        settings = self.settings
        server = grpc.aio.server(interceptors=(self._door,), options=_options(settings))
        guard_pb2_grpc.add_GuardServiceServicer_to_server(servicer, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if settings.reflection:
            names = (SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name)
            reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), server)
        _check_free(settings)
        credentials = self._credentials()
        try:
            if credentials is None:
                port = server.add_insecure_port(settings.address)
            else:
                port = server.add_secure_port(settings.address, credentials)
        except RuntimeError:  # gRPC logs the reason and does not tell it
            raise OSError(f"cannot listen on {settings.address}: it cannot be bound") from None
        unix = settings.host.startswith("unix:")
        self.address = settings.host if unix else replace(settings, port=port).address
        return server

    def _authenticator(self) -> Authenticator | None:
        """Of the auth file, which is followed from now on; None without."""
        settings = self.settings
        if settings.auth is None:
            return None
        auth = Authenticator(settings.auth, settings.default_policy, self._security)
        self.watcher.add(auth.watched)
        return auth

    def _credentials(self) -> grpc.ServerCredentials | None:
        """Of the TLS files, which are followed from now on; None without."""
        settings = self.settings
        if settings.tls_cert is None or settings.tls_key is None:
            return None
        try:
            files = TlsFiles(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
            tls = ServerTls(files, self._security)
        except CertificateError as error:
            raise OSError(
                f"cannot listen on {settings.address}: the TLS files cannot be used: {error}"
            ) from None
        self.watcher.add(tls.watched)
        return tls.credentials()

    def _open(self, state: State) -> None:
        if self._door.state is State.DRAINING:
            return
        self._door.state = state
        self._health.set(state is State.OPEN)
        self._metrics.ready.set(state is State.OPEN)

    def worker_answers(self, healthy: bool) -> None:
        """Take calls, or none: the model that new ones get judges, or hangs."""
        self._open(State.OPEN if healthy else State.STUCK)

    def _worker_answers(self) -> None:
        self.worker_answers(self.batcher.healthy)

    def _follow(self, open_model: Open) -> None:
        """Policies and models, where they come from files."""
        settings, live = self.settings, self._live
        policies = PolicyFiles(settings, live, self._metrics, self._policy_reloads)
        if settings.policies:
            self.watcher.add(policies.watched())
        models = ModelFiles(settings, live, self._makers, open_model, self._model_reloads)
        if models.paths:
            self.watcher.add(models.watched())

    def _serve_http(self) -> HttpServer:
        settings = self.settings
        probes = Probes(live=self._answers, ready=lambda: self._door.state is State.OPEN)
        if self._auth is not None:
            probes = replace(probes, may_read=self._auth.may_read_metrics)
        http = HttpServer(settings.metrics_host, settings.metrics_port, self._metrics, probes)
        self.metrics_port = http.port
        return http

    def _answers(self) -> bool:
        """Liveness: a worker that died does not come back, so the process must be replaced."""
        return self._up and self._door.state is not State.STUCK

    def _describe(self, started_at: Timestamp) -> None:
        metrics = self._metrics
        metrics.started.set(started_at.ToNanoseconds() / 1e9)
        metrics.ready.set(0)


def _traces(settings: Settings, metrics: Metrics) -> Traces | None:
    """Raises OSError when traces are asked for and cannot be had."""
    if not settings.tracing:
        return None
    try:
        from guard_service import exporting
        from guard_service.spans import Spans
    except ModuleNotFoundError as error:
        raise OSError(
            f"tracing needs {error.name}: pip install 'llama-guard-service[tracing]'"
        ) from error
    for result in ("sent", "failed"):
        metrics.trace_spans.labels(result)
    provider = exporting.provider(
        "guard-service",
        __version__,
        lambda result, spans: metrics.trace_spans.labels(result).inc(spans),
    )
    return Traces(Spans(provider, settings.address), partial(exporting.end, provider))


def exposed(settings: Settings) -> Iterator[str]:
    """What others on the network could do to a service that listens beyond this machine."""
    host = settings.host
    if host.startswith(("unix:", "127.")) or host in ("::1", "localhost"):
        return
    if settings.tls_cert is None:
        yield f"{settings.address}: texts and tokens travel unencrypted; set tls_cert and tls_key"
    if settings.auth is None and settings.tls_client_ca is None:
        yield f"{settings.address}: anyone who reaches it may call; set auth, or tls_client_ca"


def _check_free(settings: Settings) -> None:
    """Raise OSError that says why an address cannot be had; gRPC's own error does not."""
    if settings.host.startswith("unix:"):
        return
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        socket.create_server((settings.host, settings.port), family=family).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(f"cannot listen on {settings.address}: {reason}") from None


def _options(settings: Settings) -> list[tuple[str, Any]]:
    return [
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.so_reuseport", 0),  # a second server on the port must fail, not share it
        # Of one connection. What is over it clients hold back, or, where they do not know it yet,
        # gRPC refuses; neither tells them at once and with a reason that there is no room.
        ("grpc.max_concurrent_streams", max(PENDING_CALLS, 4 * settings.max_calls)),
        # Calls that have arrived and that Python has not looked at yet. Past these bounds (1,000,
        # 3,000 and 30 s by default) gRPC cancels calls, and their callers do not learn why.
        ("grpc.server.max_pending_requests", PENDING_CALLS),
        ("grpc.server.max_pending_requests_hard_limit", PENDING_CALLS),
        ("grpc.server_max_unrequested_time_in_server", math.ceil(settings.max_deadline_s)),
        # The soft and the hard limit: between them gRPC would refuse by chance.
        ("grpc.max_metadata_size", METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", METADATA_BYTES),
        ("grpc.max_allowed_incoming_connections", settings.max_connections),
        ("grpc.server_handshake_timeout_ms", 10_000),  # who connects and says nothing
        ("grpc.keepalive_time_ms", 60_000),  # finds dead peers
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),  # more pings are abuse
        ("grpc.http2.max_ping_strikes", 5),
        ("grpc.max_connection_idle_ms", 30 * 60_000),
        ("grpc.max_connection_age_ms", 30 * 60_000),  # lets load balancers spread anew
        ("grpc.max_connection_age_grace_ms", 5 * 60_000),
    ]


@contextmanager
def engines_of(settings: Settings) -> Iterator[tuple[Engine, Engine | None]]:
    """The models as set, the second only where one is to be in this process; closed on leaving.

    Raises ArtifactError, EngineFailed or OSError.
    """
    with ExitStack() as stack:
        first = stack.enter_context(closing(opened(settings, settings.model)))
        second = None
        if settings.second_model:
            second = stack.enter_context(closing(opened(settings, settings.second_model)))
        yield first, second


def opened(settings: Settings, model: str, plan: str = "") -> Engine:
    """A model by the other settings, and by another kernel plan than theirs where one is given.
    Raises ArtifactError, EngineFailed or OSError."""
    if settings.model_key is not None:
        check_signed(model, settings.model_key)
    return open_engine(
        model,
        settings.engine_threads,
        session_bytes=settings.session_bytes,
        plan=plan or settings.kernel_plan,
        lanes=settings.engine_lanes,
        prepared=settings.prepared_folder,
        device=settings.device,
        dtype=settings.dtype,
        weights=settings.weights,
        image_cache_bytes=settings.image_cache_bytes,
    )


@contextmanager
def local_server(settings: Settings, traces: Traces | None = None) -> Iterator[str]:
    """A server on a private unix socket, in a thread of this process; yields the gRPC target."""
    with tempfile.TemporaryDirectory(prefix="guard-") as folder:  # readable by this user only
        private = replace(
            settings,
            host=f"unix:{Path(folder) / 'socket'}",
            metrics=False,
            tls_cert=None,
            tls_key=None,
            tls_client_ca=None,
            auth=None,
        )
        with engines_of(private) as (engine, second):
            server = GuardServer(private, engine, loaded_policies(private), second, traces)
            with _in_thread(server):
                yield server.address


@contextmanager
def _in_thread(server: GuardServer) -> Iterator[None]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="guard-server", daemon=True)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(server.start(), loop).result()
        try:
            yield
        finally:
            asyncio.run_coroutine_threadsafe(server.stop(JOIN_S), loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(JOIN_S)
        loop.close()
