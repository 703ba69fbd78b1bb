"""What screening costs one reply: time to its first text, time to its end."""

from __future__ import annotations

import time
from collections.abc import Callable

from guard_middleware.metrics import Metrics
from guard_middleware.tracing import exemplar


class Delays:
    """Stands between what the application says and what the client is given, with a watch.

    Made when the request has been read. `clock` is monotonic, in seconds.
    """

    def __init__(self, metrics: Metrics, clock: Callable[[], float] = time.perf_counter) -> None:
        self._metrics = metrics
        self._clock = clock
        self._read_at = clock()
        self._waited_s = 0.0
        self._first_at: float | None = None
        self._end_at: float | None = None
        self._given = False

    def called(self) -> None:
        """The application is called, now only, or again."""
        self._waited_s = self._clock() - self._read_at
        self._first_at = self._end_at = None

    def said(self, text: bool) -> None:
        """The application said something, with or without text."""
        if text and self._first_at is None:
            self._first_at = self._clock()

    def said_all(self) -> None:
        """The application has said all."""
        self._end_at = self._clock()

    def gave(self, text: bool) -> None:
        """The client was given something."""
        if text and not self._given and self._first_at is not None:
            self._given = True
            held_s = self._clock() - self._first_at
            self._metrics.first_text_seconds.observe(self._waited_s + held_s, exemplar())

    def gave_all(self) -> None:
        """The client was given all of it."""
        if self._end_at is not None:
            held_s = self._clock() - self._end_at
            self._metrics.end_seconds.observe(self._waited_s + held_s, exemplar())
