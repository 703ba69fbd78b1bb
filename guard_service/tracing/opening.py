"""Traces as the settings want them; OpenTelemetry is imported only then."""

from __future__ import annotations

from functools import partial

from guard_service import __version__
from guard_service.config import Settings
from guard_service.metrics import Metrics
from guard_service.tracing import Traces


def traces_of(settings: Settings, metrics: Metrics) -> Traces | None:
    """None where none are asked for; raises OSError when they cannot be had."""
    if not settings.tracing:
        return None
    try:
        from guard_service.tracing import exporting
        from guard_service.tracing.spans import Spans
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
