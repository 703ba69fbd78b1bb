"""How many calls run at a time: as many as the guard takes, fewer as soon as it is full."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SHORTEST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 5.0


class Stopped(Exception):
    """The run is over; waiting callers are let go."""


class Pace:
    """A number of places that is halved when the guard turns calls away and grows back slowly.

    All methods may be called from any thread.
    """

    def __init__(
        self, places: int, patience_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._most = places
        self._patience_s = patience_s
        self._clock = clock
        self._changed = threading.Condition()
        self._places = float(places)
        self._taken = 0
        self._closed_until = 0.0
        self._pause_s = SHORTEST_PAUSE_S
        self._away_since: float | None = None
        self._stopped = False

    @property
    def places(self) -> int:
        """How many calls may run now."""
        return max(1, int(self._places))

    @contextmanager
    def place(self) -> Iterator[None]:
        """Wait for a place and hold it; raises Stopped when the run ends meanwhile."""
        with self._changed:
            while not self._stopped:
                closed_s = self._closed_until - self._clock()
                if closed_s <= 0 and self._taken < self.places:
                    break
                self._changed.wait(closed_s if closed_s > 0 else None)
            if self._stopped:
                raise Stopped
            self._taken += 1
        try:
            yield
        finally:
            with self._changed:
                self._taken -= 1
                self._changed.notify_all()

    def answered(self) -> None:
        """The guard answered a call: a little more may be asked of it."""
        with self._changed:
            self._away_since = None
            self._pause_s = SHORTEST_PAUSE_S
            self._places = min(self._most, self._places + 1 / self._places)
            self._changed.notify()

    def turned_away(self, retry_after_s: float | None) -> bool:
        """The guard was full or away: pause, then ask less. False when patience has run out."""
        with self._changed:
            now = self._clock()
            if self._away_since is None:
                self._away_since = now
            if now >= self._closed_until:  # one halving for all calls that met the same full queue
                self._places = max(1.0, self._places / 2)
                self._closed_until = now + max(retry_after_s or 0.0, self._pause_s)
                self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
            return now - self._away_since <= self._patience_s

    def stop(self) -> None:
        """Let go everybody who waits."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
