"""Traces of screened requests: hooks that cost one look into a context variable while they are off.

Nothing here needs OpenTelemetry to be installed: `guard_middleware.spans` does.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol

from guard_middleware.messages import Scope
from guard_middleware.settings import Settings, SettingsError

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

Metadata = tuple[tuple[str, str], ...]


class Told(Protocol):
    """The span of a screened request."""

    def tell(self, id_: str, result: str, verdicts: int) -> None:
        """What became of it, and on how many verdicts."""
        ...


class Tracing(Protocol):
    """Begins spans; each is current inside the `with`."""

    @property
    def provider(self) -> TracerProvider:
        """Of all spans of this middleware, and of a guard in its process."""
        ...

    def exchange(self, scope: Scope, format_: str) -> AbstractContextManager[Told]:
        """A screened request, under the span that is current, or the one that its headers name."""
        ...

    def guard(self, rpc: str, target: str) -> AbstractContextManager[object]:
        """A call to the guard."""
        ...

    def upstream(self, scope: Scope, format_: str) -> AbstractContextManager[Scope]:
        """The application's work; gives the scope with a `traceparent` of this span."""
        ...

    def exemplar(self) -> dict[str, str] | None:
        """What leads from a histogram to the trace, if it is going to be there."""
        ...

    def metadata(self) -> Metadata:
        """W3C context of the current span, for a call to a guard."""
        ...


TRACING: ContextVar[Tracing | None] = ContextVar("guard_middleware_tracing", default=None)


def tracing_of(settings: Settings, provider: TracerProvider | None) -> Tracing | None:
    """As the settings have it; with the application's own provider where none is given.

    Raises SettingsError where OpenTelemetry is not installed.
    """
    if settings.tracing == "off":
        return None
    try:
        from guard_middleware.spans import Spans
    except ModuleNotFoundError as missing:
        raise without_opentelemetry(missing) from missing
    return Spans(provider)


def without_opentelemetry(missing: ModuleNotFoundError) -> SettingsError:
    """What to do about what is not installed."""
    return SettingsError(
        f"tracing: needs {missing.name}: pip install 'llama-guard-service[tracing]'"
    )


def exchange(
    tracing: Tracing | None, scope: Scope, format_: str
) -> AbstractContextManager[Told | None]:
    """A span for a screened request."""
    return nullcontext() if tracing is None else tracing.exchange(scope, format_)


def guard_call(rpc: str, target: str) -> AbstractContextManager[object]:
    """A span for a call to the guard."""
    tracing = TRACING.get()
    return nullcontext() if tracing is None else tracing.guard(rpc, target)


def upstream(scope: Scope, format_: str) -> AbstractContextManager[Scope]:
    """A span for the application's work, which gets its context in the scope's headers."""
    tracing = TRACING.get()
    return nullcontext(scope) if tracing is None else tracing.upstream(scope, format_)


def exemplar() -> dict[str, str] | None:
    """What leads from a histogram to the trace, if it is going to be there."""
    tracing = TRACING.get()
    return None if tracing is None else tracing.exemplar()


def metadata() -> Metadata:
    """What a call to a guard carries, so that its spans join the trace."""
    tracing = TRACING.get()
    return () if tracing is None else tracing.metadata()
