"""A quota: so much in a time, with a burst; what is over it waits or is told when to come back."""

from __future__ import annotations

import math
import time
from collections.abc import Callable


class Quota:
    """A token bucket that refills at `rate` a second up to `burst`. For one event loop.

    More than a burst at once is taken when the bucket is full, and paid back before anything else:
    a single large request is not impossible, and the rate holds in the long run.
    """

    def __init__(
        self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`rate` is above zero; infinite means no bound."""
        self._clock = clock
        self._rate, self._burst = rate, burst
        self._level, self._at = burst, clock()

    def bound(self, rate: float, burst: float) -> None:
        """Other bounds from now on; what was taken stays taken."""
        self._refill()
        bounded = not (math.isinf(self._burst) or math.isinf(burst))
        self._level = burst - (self._burst - self._level) if bounded else burst
        self._rate, self._burst = rate, burst

    def wait_s(self, amount: float) -> float:
        """Seconds until so much may be taken; 0 when it may be now."""
        if math.isinf(self._rate):
            return 0.0
        self._refill()
        return max(min(amount, self._burst) - self._level, 0.0) / self._rate

    def take(self, amount: float) -> None:
        """Take it, though there be less."""
        if not math.isinf(self._rate):
            self._refill()
            self._level -= amount

    def _refill(self) -> None:
        now = self._clock()
        if not math.isinf(self._rate):
            self._level = min(self._level + (now - self._at) * self._rate, self._burst)
        self._at = now
