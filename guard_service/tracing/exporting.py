"""Where spans go: OpenTelemetry's SDK as its own variables (OTEL_*) set it; what it sends, counted.

For service and sidecar: the processes that own their `main`. Needs the extra `tracing`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points

from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

EXPORTERS = "opentelemetry_traces_exporter"  # the group of entry points
PROTOCOLS = {"grpc": "otlp_proto_grpc", "http/protobuf": "otlp_proto_http"}
CLOSE_S = 3.0
OnSent = Callable[[str, int], None]  # "sent" or "failed", and how many spans


class TracingUnavailable(OSError):
    """Traces cannot be sent as set; the text says what to do."""


def provider(
    service: str, version: str, on_sent: OnSent, environment: Mapping[str, str] = os.environ
) -> TracerProvider:
    """Spans in batches from a thread of its own, to be shut down in the end. Its sampler is that of
    OTEL_TRACES_SAMPLER: without, what the caller's is, and all that begins here.

    Raises TracingUnavailable.
    """
    resource = Resource.create({"service.version": version})
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: service}))
    made = TracerProvider(resource=resource, shutdown_on_exit=False)
    for name in environment.get("OTEL_TRACES_EXPORTER", "otlp").split(","):
        if name.strip() not in ("none", ""):
            made.add_span_processor(
                BatchSpanProcessor(Counted(_exporter(name.strip(), environment), on_sent))
            )
    return made


def end(made: TracerProvider) -> None:
    """Send what waits, for CLOSE_S at most, and stop. Blocks."""
    thread = threading.Thread(target=made.shutdown, name="guard-spans-end", daemon=True)
    thread.start()
    thread.join(CLOSE_S)  # a collector that is away keeps nobody from ending


class Counted(SpanExporter):
    """An exporter whose successes and failures are told; a failure hurts nobody else."""

    def __init__(self, inner: SpanExporter, on_sent: OnSent) -> None:
        self._inner = inner
        self._on_sent = on_sent

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Hand a batch on."""
        try:
            result = self._inner.export(spans)
        except Exception:
            self._on_sent("failed", len(spans))
            raise
        self._on_sent("sent" if result is SpanExportResult.SUCCESS else "failed", len(spans))
        return result

    def shutdown(self) -> None:
        """Nothing is sent any more."""
        self._inner.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Send what waits."""
        return self._inner.force_flush(timeout_millis)


def _exporter(name: str, environment: Mapping[str, str]) -> SpanExporter:
    """The exporter of a name that OTEL_TRACES_EXPORTER may have."""
    if name == "otlp":
        protocol = environment.get(
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL",
            environment.get("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
        )
        name = PROTOCOLS.get(protocol, protocol)
    found = entry_points(group=EXPORTERS, name=name)
    if not found:
        raise TracingUnavailable(
            f"tracing: no exporter {name} is installed; pip install "
            f"opentelemetry-exporter-{name.replace('_', '-')}, or change OTEL_TRACES_EXPORTER or "
            "OTEL_EXPORTER_OTLP_PROTOCOL"
        )
    try:
        exporter: SpanExporter = next(iter(found)).load()()
    except Exception as error:  # whatever its settings make it raise
        raise TracingUnavailable(f"tracing: the exporter {name} cannot be used: {error}") from error
    return exporter
