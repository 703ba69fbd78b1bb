"""Spans of OpenTelemetry behind the hooks of `guard_service.tracing`; needs the extra `tracing`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.trace import Link, Span, SpanKind, StatusCode, TracerProvider
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from guard_service import __version__
from guard_service.tracing import SPOT, Metadata, Spot, Value

SERVICE = "guard_api.v1.GuardService"
_W3C = TraceContextTextMapPropagator()  # no baggage: callers could put anything into it
# Statuses that are a server's failure, by OpenTelemetry's conventions for gRPC servers.
_FAILED = frozenset(
    {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
)


class SpanSpot(Spot):
    """A Spot that is a span."""

    def __init__(self, tracer: trace.Tracer, span: Span) -> None:
        self._tracer = tracer
        self._span = span
        self._context = trace.set_span_in_context(span)

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits."""
        return trace.format_trace_id(self._span.get_span_context().trace_id)

    @property
    def sampled(self) -> bool:
        """Whether it is going to be sent."""
        return self._span.get_span_context().trace_flags.sampled

    @contextmanager
    def step(self, name: str) -> Iterator[Spot]:
        """A child that is current inside the `with`; one that an exception leaves has failed."""
        span = self._tracer.start_span(name, context=self._context)
        before, spot = SPOT.get(), SpanSpot(self._tracer, span)
        SPOT.set(spot)
        try:
            yield spot
        except BaseException as error:
            # Not its text, nor where it happened: who knows what they hold.
            span.set_attribute("error.type", getattr(error, "reason", type(error).__name__))
            span.set_status(StatusCode.ERROR)
            raise
        finally:
            SPOT.set(before)
            span.end()

    def note(self, **values: Value) -> None:
        """Attributes under `guard.`; two underscores stand for a dot."""
        self._span.set_attributes(_named(values))

    def ran(self, waited_s: float, seconds: float, items: int, head: Spot | None) -> Spot:
        """Tell of an engine run that has just ended: the wait for it, and the run."""
        ended = time.time_ns()
        began = ended - int(seconds * 1e9)
        queued = began - int(waited_s * 1e9)
        wait = self._tracer.start_span("guard.queue", context=self._context, start_time=queued)
        wait.end(began)
        first = head._span if isinstance(head, SpanSpot) else None
        run = self._tracer.start_span(
            "guard.engine",
            context=self._context,
            start_time=began,
            attributes={"guard.batch.prompts": items},
            links=[Link(first.get_span_context())] if first else None,
        )
        run.end(ended)
        return SpanSpot(self._tracer, run)

    def metadata(self) -> Metadata:
        """W3C trace context for a call to another server."""
        carrier: dict[str, str] = {}
        _W3C.inject(carrier, self._context)
        return tuple(carrier.items())

    def end(self, code: str, reason: str, **values: Value) -> None:
        """The end of a call, by the name of its status and the reason of its error."""
        self._span.set_attribute("rpc.response.status_code", code)
        self.note(**values)
        if code != "OK":
            self._span.set_attribute("error.type", reason or code)
        if code in _FAILED:
            self._span.set_status(StatusCode.ERROR)
        self._span.end()


class Spans:
    """Begins the spans of calls. `server` is the address that callers use."""

    def __init__(self, provider: TracerProvider, server: str) -> None:
        self._tracer = provider.get_tracer("guard_service", __version__)
        self._server = _place(server)

    def call(self, rpc: str, metadata: Mapping[str, str | bytes]) -> Spot:
        """To be ended by `Spot.end`. A trace context that is none begins a trace of its own."""
        carrier = {key: value for key, value in metadata.items() if isinstance(value, str)}
        span = self._tracer.start_span(
            f"{SERVICE}/{rpc}",
            context=_W3C.extract(carrier, trace.set_span_in_context(trace.INVALID_SPAN)),
            kind=SpanKind.SERVER,
            attributes={
                "rpc.system.name": "grpc",
                "rpc.method": f"{SERVICE}/{rpc}",
                **self._server,
            },
        )
        return SpanSpot(self._tracer, span)


def _place(server: str) -> Mapping[str, str | int]:
    if server.startswith("unix:"):
        path = server.removeprefix("unix:")
        return {"server.address": path} if path else {}
    host, _, port = server.rpartition(":")
    return {"server.address": host.strip("[]"), "server.port": int(port)}


def _named(values: Mapping[str, Value]) -> dict[str, Value]:
    return {
        name if name.startswith("gen_ai") else f"guard.{name}": value
        for name, value in ((name.replace("__", "."), value) for name, value in values.items())
    }
