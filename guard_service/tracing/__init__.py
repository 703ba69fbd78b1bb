"""Traces: the span that a task works for, its steps, and what is told of verdicts; no content.

Nothing here needs OpenTelemetry to be installed: `tracing.spans` does. While no call is
traced, each hook costs one look into a context variable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

Value = str | bool | int | float | Sequence[str]
Metadata = tuple[tuple[str, str], ...]


class Spot(Protocol):
    """A span, and what can be begun under it. Any thread."""

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits."""
        ...

    @property
    def sampled(self) -> bool:
        """Whether it is going to be sent."""
        ...

    def step(self, name: str) -> AbstractContextManager[Spot]:
        """A child that is current inside the `with`; one that an exception leaves has failed."""
        ...

    def note(self, **values: Value) -> None:
        """Attributes under `guard.`; two underscores stand for a dot."""
        ...

    def ran(self, waited_s: float, seconds: float, items: int, head: Spot | None) -> Spot:
        """Tell of an engine run that has just ended: two children, the wait and the run, which is
        linked to that of the batch's `head`."""
        ...

    def metadata(self) -> Metadata:
        """W3C trace context for a call to another server."""
        ...

    def end(self, code: str, reason: str, **values: Value) -> None:
        """The end of a call, by the name of its status and the reason of its error."""
        ...


class Tracer(Protocol):
    """Begins the span of a call, under the caller's where its metadata names one."""

    def call(self, rpc: str, metadata: Mapping[str, str | bytes]) -> Spot:
        """To be ended by `Spot.end`."""
        ...


@dataclass(frozen=True, slots=True)
class Traces:
    """What a server traces with; `close` sends what waits and may take a while."""

    tracer: Tracer
    close: Callable[[], None]


SPOT: ContextVar[Spot | None] = ContextVar("guard_spot", default=None)
_UNTRACED: AbstractContextManager[None] = nullcontext()


def step(name: str) -> AbstractContextManager[Spot | None]:
    """A span for what happens inside the `with`, where the call is traced."""
    spot = SPOT.get()
    return _UNTRACED if spot is None else spot.step(name)


def metadata() -> Metadata:
    """What a call to another server carries, so that its spans join the trace."""
    spot = SPOT.get()
    return () if spot is None else spot.metadata()


def exemplar() -> dict[str, str] | None:
    """What leads from a histogram to a trace: only to one that is going to be there."""
    spot = SPOT.get()
    return {"trace_id": spot.trace_id} if spot is not None and spot.sampled else None


def engine_run(waits: Sequence[tuple[Spot | None, float]], seconds: float) -> None:
    """Tell the traces of a run's prompts of it: for each its spot and how long it waited, in s."""
    head: Spot | None = None
    for spot, waited_s in waits:
        if spot is not None:
            run = spot.ran(waited_s, seconds, len(waits), head)
            head = head or run
