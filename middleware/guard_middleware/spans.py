"""Spans of OpenTelemetry behind the hooks of `guard_middleware.tracing`; needs `tracing`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, StatusCode, TracerProvider
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from guard_middleware.calls import SERVICE
from guard_middleware.messages import Scope
from guard_middleware.tracing import TRACING, Metadata

_W3C = TraceContextTextMapPropagator()
_HEADERS = (b"traceparent", b"tracestate")
# What is asked of a backend, in the words of OpenTelemetry's conventions for generative models.
_OPERATIONS = {
    **dict.fromkeys(("openai-chat", "openai-responses", "ollama-chat", "bedrock"), "chat"),
    **dict.fromkeys(("openai-text", "ollama-generate"), "text_completion"),
}


class _Told:
    def __init__(self, span: Span) -> None:
        self._span = span

    def tell(self, id_: str, result: str, verdicts: int) -> None:
        """What became of it, and on how many verdicts."""
        self._span.set_attributes(
            {"guard.exchange_id": id_, "guard.result": result, "guard.verdicts": verdicts}
        )


class Spans:
    """Makes the spans of one middleware."""

    def __init__(self, provider: TracerProvider | None = None) -> None:
        """Without a provider, that of the application, whenever it sets one."""
        self.provider = provider or trace.get_tracer_provider()
        self._tracer = trace.get_tracer("guard_middleware", tracer_provider=provider)

    @contextmanager
    def exchange(self, scope: Scope, format_: str) -> Iterator[_Told]:
        """A screened request, under the span that is current, or the one that its headers name."""
        begun = trace.get_current_span().get_span_context().is_valid  # by the application
        kind = SpanKind.INTERNAL if begun else SpanKind.SERVER
        attributes = {"http.request.method": scope["method"], "guard.format": format_}
        if server := scope.get("server"):
            attributes |= {"server.address": str(server[0]), "server.port": server[1] or 0}
        parent = None if begun else _named(scope)
        before = TRACING.get()
        with self._span(f"guard.screen {format_}", kind, attributes, parent) as span:
            TRACING.set(self)
            try:
                yield _Told(span)
            finally:
                TRACING.set(before)

    @contextmanager
    def guard(self, rpc: str, target: str) -> Iterator[None]:
        """A call to the guard."""
        attributes = {"rpc.system.name": "grpc", "rpc.method": f"{SERVICE}/{rpc}"}
        if target:
            attributes["server.address"] = target
        with self._span(f"{SERVICE}/{rpc}", SpanKind.CLIENT, attributes):
            yield

    @contextmanager
    def upstream(self, scope: Scope, format_: str) -> Iterator[Scope]:
        """The application's work; gives the scope with a `traceparent` of this span."""
        attributes = {"guard.format": format_}
        if operation := _OPERATIONS.get(format_):
            attributes["gen_ai.operation.name"] = operation
        with self._span("guard.upstream", SpanKind.CLIENT, attributes):
            carried = [(key.encode(), value.encode("latin-1")) for key, value in self.metadata()]
            kept = [pair for pair in scope["headers"] if pair[0].lower() not in _HEADERS]
            yield {**scope, "headers": [*kept, *carried]}

    def exemplar(self) -> dict[str, str] | None:
        """What leads from a histogram to the trace, if it is going to be there."""
        context = trace.get_current_span().get_span_context()
        sampled = context.is_valid and context.trace_flags.sampled
        return {"trace_id": trace.format_trace_id(context.trace_id)} if sampled else None

    def metadata(self) -> Metadata:
        """W3C context of the current span, for a call to a guard."""
        carrier: dict[str, str] = {}
        _W3C.inject(carrier)
        return tuple(carrier.items())

    @contextmanager
    def _span(
        self,
        name: str,
        kind: SpanKind,
        attributes: Mapping[str, str | int],
        parent: Context | None = None,
    ) -> Iterator[Span]:
        """A span; one that an exception leaves has failed, by its kind alone: texts stay here."""
        with self._tracer.start_as_current_span(
            name,
            parent,
            kind=kind,
            attributes=attributes,
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                yield span
            except Exception as error:
                span.set_attribute("error.type", type(error).__name__)
                span.set_status(StatusCode.ERROR)
                raise


def _named(scope: Scope) -> Context:
    """The caller's context, by the request's headers."""
    carrier = {
        key.decode("latin-1").lower(): value.decode("latin-1")
        for key, value in scope["headers"]
        if key.lower() in _HEADERS
    }
    return _W3C.extract(carrier)
