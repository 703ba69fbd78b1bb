"""How exchanging something while the service runs has gone: for metrics, status and log."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from guard_service.metrics import ReloadMetrics


class Reloads:
    """The generation in use, and the last failure until there is a success. For one event loop."""

    def __init__(self, metrics: ReloadMetrics, clock: Callable[[], int] = time.time_ns) -> None:
        self._metrics = metrics
        self._clock = clock
        self.generation = 1
        self.loaded_ns = clock()  # since the epoch
        self.failed_ns: int | None = None
        self.places: tuple[str, ...] = ()  # where it failed, without content
        self._show()

    def succeeded(self) -> None:
        """Something new is in use."""
        self.generation += 1
        self.loaded_ns = self._clock()
        self._metrics.reloads.labels("ok").inc()
        self.nothing_new()

    def nothing_new(self) -> None:
        """What is in use is what the files say, also where that was not so a moment ago."""
        self.failed_ns, self.places = None, ()
        self._show()

    def failed(self, places: Sequence[str]) -> None:
        """What was in use stays in use."""
        self.failed_ns, self.places = self._clock(), tuple(places)
        self._metrics.reloads.labels("failed").inc()
        self._show()

    def _show(self) -> None:
        self._metrics.loaded.set(self.loaded_ns / 1e9)
        self._metrics.reload_failed.set(self.failed_ns is not None)
