"""When to try a call again: exponential backoff with full jitter, inside one deadline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from guard_middleware.errors import DeadlineExceeded, GuardError, Overloaded, Unavailable


@dataclass(frozen=True, slots=True)
class Retries:
    """How often and how patiently to retry. `attempts` counts the first try; 1 never retries.

    With `try_timeout_s` a try without an answer is given up after so long and made again, on
    another server where the target names several; the last one may take what is left of the
    deadline. 0: every try may.
    """

    attempts: int = 5
    first_backoff_s: float = 0.1
    longest_backoff_s: float = 5.0
    try_timeout_s: float = 0.0

    def __post_init__(self) -> None:
        times = (self.first_backoff_s, self.longest_backoff_s, self.try_timeout_s)
        if self.attempts < 1 or min(times) < 0:
            raise ValueError("Retries needs at least one attempt and no negative time")


def passing(error: GuardError) -> bool:
    """Whether the same request may be answered in a moment."""
    return isinstance(error, Unavailable | Overloaded)


class Attempts:
    """The tries of one call. `clock` is monotonic in seconds, `draw` uniform in [0, 1)."""

    def __init__(
        self,
        retries: Retries,
        timeout_s: float,
        clock: Callable[[], float],
        draw: Callable[[], float],
    ) -> None:
        if not timeout_s > 0:
            raise ValueError("timeout_s must be above zero")
        self._retries = retries
        self._clock = clock
        self._draw = draw
        self._deadline = clock() + timeout_s
        self._failed = 0
        self._cut_short = False

    def next_s(self) -> float:
        """How long the next try may take; never quite zero, so that gRPC reports its passing."""
        left_s, try_s = self._deadline - self._clock(), self._retries.try_timeout_s
        last = self._failed + 1 >= self._retries.attempts
        self._cut_short = not last and 0 < try_s < left_s
        return max(0.001, try_s if self._cut_short else left_s)

    def pause_after(self, error: GuardError) -> float | None:
        """Seconds to wait before the next try, or None when there is no point in another.

        A server's own retry delay is kept, and the jitter comes on top of it: callers that were
        turned away together do not come back together.
        """
        self._failed += 1
        late = self._cut_short and isinstance(error, DeadlineExceeded)
        if not (late or passing(error)) or self._failed >= self._retries.attempts:
            return None
        ceiling = self._retries.first_backoff_s * 2.0 ** min(self._failed - 1, 30)
        pause = self._draw() * min(ceiling, self._retries.longest_backoff_s)
        pause += error.retry_after_s or 0.0
        return pause if self._clock() + pause < self._deadline else None
