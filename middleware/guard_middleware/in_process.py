"""A guard in this process: the one module here that knows the service."""

from __future__ import annotations

from contextlib import AbstractContextManager

from guard_middleware.tracing import Tracing
from guard_service.config import MIB, Settings
from guard_service.local import local_server
from guard_service.tracing import Traces

MESSAGE_BYTES = 64 * MIB  # images; nothing crosses a network


def served(model: str, tracing: Tracing | None = None) -> AbstractContextManager[str]:
    """A guard in a thread, on a private socket; entering yields its target."""
    settings = Settings(model=model, max_message_bytes=MESSAGE_BYTES)
    return local_server(settings, _traces(tracing))


def _traces(tracing: Tracing | None) -> Traces | None:
    """Spans of the guard go where those of the middleware go, whose owner ends it."""
    if tracing is None:
        return None
    from guard_service.tracing.spans import Spans

    return Traces(Spans(tracing.provider, "unix:"), lambda: None)
