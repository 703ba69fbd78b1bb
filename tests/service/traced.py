"""Spans kept in memory, and a receiver of OpenTelemetry's protocol, for tests."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased, Sampler

from guard_service.tracing import Traces
from guard_service.tracing.spans import Spans

PATIENCE_S = 30.0
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
UNSAMPLED = PARENT.removesuffix("01") + "00"


class Kept:
    """What ends up in memory of what is traced with `traces`."""

    def __init__(self, sampler: Sampler | None = None) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider(
            sampler=sampler or ParentBased(ALWAYS_ON), shutdown_on_exit=False
        )
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.traces = Traces(Spans(self.provider, "guard.test:50051"), self.provider.shutdown)

    @property
    def spans(self) -> tuple[ReadableSpan, ...]:
        """In the order in which they ended."""
        return self.exporter.get_finished_spans()

    def named(self, name: str) -> list[ReadableSpan]:
        """The spans of a name."""
        return [span for span in self.spans if span.name == name]

    def one(self, name: str) -> ReadableSpan:
        """The only span of a name."""
        (found,) = self.named(name)
        return found

    def told(self) -> str:
        """All that is said in them."""
        return "\n".join(span.to_json() for span in self.spans)


def ids(span: ReadableSpan) -> tuple[str, str]:
    """Of its trace and its own, in hexadecimal."""
    context = span.get_span_context()
    assert context is not None
    return f"{context.trace_id:032x}", f"{context.span_id:016x}"


def parent(span: ReadableSpan) -> str:
    """The id of its parent; empty for the first of a trace."""
    return f"{span.parent.span_id:016x}" if span.parent else ""


class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    """A collector: keeps what it is sent. `refuses` is the status that it answers with."""

    def __init__(self, refuses: grpc.StatusCode | None = None) -> None:
        self.spans: list[Any] = []
        self.services: set[str] = set()
        self._refuses = refuses
        self._came = threading.Condition()

    def Export(self, request: Any, context: Any) -> Any:
        """The protocol's one call."""
        if self._refuses is not None:
            context.abort(self._refuses, "no")
        with self._came:
            for resource in request.resource_spans:
                for one in resource.resource.attributes:
                    if one.key == "service.name":
                        self.services.add(one.value.string_value)
                self.spans += (span for scope in resource.scope_spans for span in scope.spans)
            self._came.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()

    def wait_for(self, *names: str) -> None:
        """Until spans of all these names have come."""
        with self._came:
            assert self._came.wait_for(
                lambda: set(names) <= {span.name for span in self.spans}, PATIENCE_S
            ), sorted(span.name for span in self.spans)


@contextmanager
def receiving(refuses: grpc.StatusCode | None = None) -> Iterator[tuple[Receiver, str]]:
    """A receiver on a free port, and its address."""
    receiver = Receiver(refuses)
    server = grpc.server(ThreadPoolExecutor(2))
    add: Any = trace_service_pb2_grpc.add_TraceServiceServicer_to_server
    add(receiver, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield receiver, f"http://127.0.0.1:{port}"
    finally:
        server.stop(None).wait()
