"""Every metric's name and help, and the small HTTP server that shows them beside the probes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import ThreadingWSGIServer, make_wsgi_app

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
ITEMS = (1, 2, 4, 8, 16, 32, 64)


def show_only(info: Gauge, shown: Collection[tuple[str, ...]]) -> None:
    """Have an info metric tell of these label values and no others, at no moment of fewer."""
    for values in shown:
        info.labels(*values).set(1)
    for sample in next(iter(info.collect())).samples:
        values = tuple(sample.labels[name] for name in info._labelnames)
        if values not in shown:
            info.remove(*values)


class _Named:
    """Makes metrics whose names begin with a prefix."""

    def __init__(self, prefix: str, registry: CollectorRegistry) -> None:
        self._prefix = prefix
        self.registry = registry

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"{self._prefix}_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"{self._prefix}_{name}", text, labels, registry=self.registry)

    def _histogram(
        self, name: str, text: str, *labels: str, buckets: tuple[float, ...] = SECONDS
    ) -> Histogram:
        name = f"{self._prefix}_{name}"
        return Histogram(name, text, labels, registry=self.registry, buckets=buckets)


class EngineMetrics(_Named):
    """What one engine, its queue and its caches do. A second guard's have a prefix of their own."""

    def __init__(self, prefix: str, registry: CollectorRegistry) -> None:
        super().__init__(prefix, registry)
        counter, gauge, histogram = self._counter, self._gauge, self._histogram
        self.tokenize_seconds = histogram("tokenize_seconds", "Assembling a prompt.")
        self.queue_seconds = histogram("queue_seconds", "Waiting for the engine.")
        self.inference_seconds = histogram("inference_seconds", "One run of the engine.")
        self.batch_items = histogram("batch_items", "Prompts in one run.", buckets=ITEMS)
        self.tokens = counter(
            "tokens", "Tokens of prompts: computed, or taken from a cache.", "how"
        )
        self.prefix_hits = counter("prefix_cache", "Prompts by use of the prefix cache.", "result")
        self.cache_hits = counter("verdict_cache", "Questions to the verdict cache.", "result")
        self.cache_entries = gauge("verdict_cache_entries", "Verdicts remembered.")
        self.queue_items = gauge("queue_items", "Prompts that wait for the engine.")
        self.queue_tokens = gauge("queue_tokens", "Tokens that wait for the engine.")
        self.images = counter("images", "Images, by what became of them.", "result")
        self.image_bytes = gauge("image_bytes", "Memory that images in progress hold.")
        self.session_bytes = gauge("session_bytes", "Memory that growing replies hold.")
        self.sessions_crowded_out = counter(
            "sessions_crowded_out", "States of growing replies dropped for want of session_bytes."
        )
        self.model_info = gauge(
            "model_info", "The loaded model.", "name", "digest", "engine", "template"
        )


class AuditMetrics(_Named):
    """What became of the lines of the audit log."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__("guard", registry)
        self.lines = self._counter(
            "audit_lines", "Lines of the audit log: written, or failed to be.", "result"
        )
        for result in ("written", "failed"):
            self.lines.labels(result)
        self.reached = self._gauge("audit_log_lines", "Lines of the audit log, all its segments.")


class CascadeMetrics(_Named):
    """How the two guards of a cascade share the work, and how the second does."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__("guard", registry)
        self.tiers = self._counter(
            "cascade_verdicts", "Verdicts of cascades, by who decided and why.", "tier", "reason"
        )
        self.second_seconds = self._histogram(
            "second_seconds", "Asking the second guard, with and without an answer."
        )
        self.second_unable = self._counter(
            "second_unable", "Questions that the second guard left open, by reason.", "reason"
        )
        self.second_answers = self._gauge(
            "second_answers", "0 while the second guard is not asked, since it did not answer."
        )


class SecurityMetrics(_Named):
    """What guards the service. No label comes from a caller."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__("guard", registry)
        self.tls_expires = self._gauge(
            "tls_expires_timestamp_seconds", "When the certificate in use expires; 0 without TLS."
        )
        self.reloads = self._counter(
            "security_reloads", "Certificates and auth files read anew.", "what", "result"
        )
        self.credentials_refused = self._counter(
            "credentials_refused", "Calls without a caller who is served, by reason.", "reason"
        )
        # Tenants are those of the auth file, whatever callers say.
        self.tenant_requests = self._counter(
            "tenant_requests", "Calls that ended, by tenant.", "tenant", "code"
        )
        self.tenant_verdicts = self._counter("tenant_verdicts", "Verdicts, by tenant.", "tenant")
        self.tenant_refused = self._counter(
            "tenant_refused", "What was over a tenant's quota, by quota.", "tenant", "quota"
        )
        self.tenant_in_flight = self._gauge("tenant_in_flight", "Calls in progress.", "tenant")


class ReloadMetrics(_Named):
    """How exchanging policies, or models, while the service runs has gone."""

    def __init__(self, prefix: str, registry: CollectorRegistry) -> None:
        super().__init__(prefix, registry)
        self.reloads = self._counter(
            "reloads", "Exchanges of what was loaded, tried and by result: ok, failed.", "result"
        )
        self.reload_failed = self._gauge(
            "reload_failed", "1 while what is used is not what the files say, as they are at fault."
        )
        self.loaded = self._gauge("loaded_timestamp_seconds", "When what is used began to be used.")


class Metrics(EngineMetrics):
    """The service's metrics in a registry of their own.

    Labels take few values: names of RPCs, codes and actions are fixed, policies and categories are
    those that are loaded.
    """

    def __init__(self) -> None:
        super().__init__("guard", CollectorRegistry())
        counter, gauge, histogram = self._counter, self._gauge, self._histogram
        self.requests = counter("requests", "Calls that ended.", "rpc", "code")
        self.request_seconds = histogram("request_seconds", "Time of a whole call.", "rpc")
        self.in_flight = gauge("in_flight", "Calls in progress.", "rpc")
        self.verdicts = counter(
            "verdicts", "Verdicts by what they say.", "action", "direction", "policy"
        )
        self.shadow_verdicts = counter(
            "shadow_verdicts", "What policies in shadow mode would have done.", "action", "policy"
        )
        self.candidate_verdicts = counter(
            "candidate_verdicts",
            "What a policy and a candidate for its place wish, from the same run of the model.",
            *("policy", "candidate", "action", "candidate_action"),
        )
        self.fired = counter("categories_fired", "Rules that fired.", "category", "direction")
        self.errors = counter(
            "judgement_errors", "Conversations that got no verdict, by reason.", "reason"
        )
        self.policy_info = gauge(
            "policy_info", "The loaded policies.", "name", "version", "digest", "mode"
        )
        self.trace_spans = counter(
            "trace_spans", "Spans that the exporter of traces was given, by result.", "result"
        )
        self.draining = gauge(
            "models_draining", "Sets of models that only calls from before an exchange still need."
        )
        self.started = gauge("started_timestamp_seconds", "When the service began to serve.")
        self.ready = gauge("ready", "1 while the service takes calls.")


@dataclass(frozen=True, slots=True)
class Probes:
    """What the HTTP probes ask; `may_read` is told the Authorization header of /metrics."""

    live: Callable[[], bool]
    ready: Callable[[], bool]
    may_read: Callable[[str], bool] = lambda authorization: True


class _Handler(WSGIRequestHandler):
    timeout = 10  # a client that sends nothing does not keep its thread

    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes and probes are not worth a line."""


def application(
    metrics: Metrics, probes: Probes
) -> Callable[[WSGIEnvironment, StartResponse], Iterable[bytes]]:
    """The WSGI application of /metrics, /livez and /readyz; probes need no credentials."""
    exposition = make_wsgi_app(metrics.registry)
    answers = {"/livez": (probes.live, "live"), "/readyz": (probes.ready, "ready")}

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if path == "/metrics" and not probes.may_read(environ.get("HTTP_AUTHORIZATION", "")):
            wanted = [("WWW-Authenticate", "Bearer"), ("Content-Type", "text/plain")]
            start_response("401 Unauthorized", wanted)
            return [b"send a bearer token that the auth file has under metrics\n"]
        if path == "/metrics":
            shown: Iterable[bytes] = exposition(environ, start_response)
            return shown
        if path in answers:
            ask, word = answers[path]
            status, body = ("200 OK", word) if ask() else ("503 Service Unavailable", f"not {word}")
        else:
            status, body = "404 Not Found", "there are /metrics, /livez and /readyz"
        start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
        return [f"{body}\n".encode()]

    return app


class HttpServer:
    """Serves the application from a thread."""

    def __init__(self, host: str, port: int, metrics: Metrics, probes: Probes) -> None:
        """Bind; raises OSError that names the address when that fails."""
        app = application(metrics, probes)
        try:
            self._server = make_server(host, port, app, ThreadingWSGIServer, handler_class=_Handler)
        except OSError as error:
            raise OSError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="guard-metrics", daemon=True
        )
        self._thread.start()

    @property
    def port(self) -> int:
        """The bound port."""
        return int(self._server.server_port)

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
