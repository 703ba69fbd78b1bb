"""The server: start, health, drain, stop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry

from guard_api.v1 import guard_pb2_grpc
from guard_policies.schema import Policy
from guard_service.audit.opening import open_audit
from guard_service.audit.recording import Audit, Audited
from guard_service.batcher import Batcher
from guard_service.config import Settings
from guard_service.engines import Engine
from guard_service.health import Health
from guard_service.hosted import opened
from guard_service.interceptors import SERVICE, Door, State
from guard_service.listening import bound, exposed, options
from guard_service.live.candidates import key_of
from guard_service.live.models import ModelFiles, Open
from guard_service.live.policies import PolicyFiles, check_policies
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
from guard_service.servicer import Servicer
from guard_service.tracing import Traces
from guard_service.tracing.opening import traces_of

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
        settings = settings.for_models(images)
        self.settings = settings
        self.address = ""
        self.metrics_port = 0
        self._metrics = Metrics()
        self._traces = traces or traces_of(settings, self._metrics)
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
        server = grpc.aio.server(interceptors=(self._door,), options=options(settings))
        guard_pb2_grpc.add_GuardServiceServicer_to_server(servicer, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if settings.reflection:
            names = (SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name)
            reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), server)
        self.address = bound(server, settings, self._credentials())
        return server

    def _authenticator(self) -> Authenticator | None:
        """Of the auth file, which is followed from now on; None without."""
        settings = self.settings
        if settings.auth is None:
            return None
        auth = Authenticator(
            settings.auth, settings.default_policy, self._security, settings.max_calls
        )
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
