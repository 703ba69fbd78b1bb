"""Where spans of our commands go, by OpenTelemetry's own variables."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from guard_middleware.metrics import shared
from guard_middleware.settings import Settings
from guard_middleware.tracing import without_opentelemetry

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider


def traces(settings: Settings, command: str) -> TracerProvider | None:
    """A provider of the command's own, where spans are wanted. Raises SettingsError, and OSError
    where the variables name what is not there."""
    if settings.tracing == "off":
        return None
    try:
        from guard_service import __version__
        from guard_service.tracing import exporting
    except ModuleNotFoundError as missing:
        raise without_opentelemetry(missing) from missing
    for result in ("sent", "failed"):
        shared().trace_spans.labels(result)
    return exporting.provider(
        command,
        __version__,
        lambda result, spans: shared().trace_spans.labels(result).inc(spans),
    )


async def end(provider: TracerProvider | None) -> None:
    """Send what is left."""
    if provider is not None:
        from guard_service.tracing import exporting

        await asyncio.to_thread(exporting.end, provider)
