"""Circuit breaker: a guard that does not answer is not waited for again and again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from guard_middleware.errors import DeadlineExceeded, GuardError, Unavailable


class CircuitOpen(Unavailable):
    """The guard has not answered lately and was not asked."""


@dataclass(frozen=True, slots=True)
class Breaking:
    """After `failures` calls in a row without an answer no call is made for `open_s` seconds, then
    one is tried. 0 failures: never."""

    failures: int = 0
    open_s: float = 2.0

    def __post_init__(self) -> None:
        if self.failures < 0 or self.open_s < 0:
            raise ValueError("Breaking needs a number of failures and a time, neither negative")


class Breaker:
    """The state of one channel. Thread-safe; `clock` is monotonic in seconds.

    Only a guard that cannot be reached or does not answer in time counts as failing. Errors that
    it answers with may depend on what it was asked: nobody's content closes the way for others.
    """

    def __init__(self, breaking: Breaking, clock: Callable[[], float] = time.monotonic) -> None:
        self._breaking = breaking
        self._clock = clock
        self._lock = threading.Lock()
        self._failed = 0
        self._shut_until = 0.0

    def enter(self) -> None:
        """Before a call; raises CircuitOpen. Every entered call is to be settled or left."""
        with self._lock:
            if not self._open:
                return
            now = self._clock()
            if now < self._shut_until:
                raise CircuitOpen(
                    "the guard has not answered lately",
                    code=grpc.StatusCode.UNAVAILABLE,
                    reason="CIRCUIT_OPEN",
                )
            self._shut_until = now + self._breaking.open_s  # this call tries, the others wait

    def settle(self, error: GuardError | None) -> None:
        """After a call, with its error if it had one."""
        with self._lock:
            if type(error) not in (Unavailable, DeadlineExceeded):
                self._failed = 0
                return
            self._failed += 1
            if self._open:
                self._shut_until = self._clock() + self._breaking.open_s

    @property
    def _open(self) -> bool:
        return 0 < self._breaking.failures <= self._failed
