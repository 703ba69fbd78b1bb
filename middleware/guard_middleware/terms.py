"""How a client calls: deadlines, retries, fallback, credentials."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from guard_middleware.bearer import Metadata, TokenFile, check_private
from guard_middleware.breaker import Breaker, Breaking
from guard_middleware.channel import TLS
from guard_middleware.fallback import OnUnavailable
from guard_middleware.retry import Attempts, Retries


@dataclass(frozen=True)
class Terms:
    """How a client calls: times in seconds; clock and draw can be replaced in tests.

    `timeout_s` is for one verdict, of a stream too; `stream_timeout_s` for a whole stream. `token`
    is sent with each call, over TLS or within this machine.
    """

    timeout_s: float = 10.0
    stream_timeout_s: float = 600.0
    retries: Retries = Retries()
    breaking: Breaking = Breaking()
    on_unavailable: OnUnavailable = "raise"
    tls: TLS | None = None
    metadata: Sequence[tuple[str, str]] = ()
    token: TokenFile | None = None
    clock: Callable[[], float] = time.monotonic
    draw: Callable[[], float] = random.random

    def check(self, target: str) -> None:
        """Raises ValueError where the token would travel to the target unencrypted."""
        if self.token is not None:
            check_private(target, self.tls is not None)

    def call_metadata(self) -> Metadata:
        """What is sent with a call now."""
        return (*self.metadata, *(self.token.metadata() if self.token else ()))

    def attempts(self, timeout_s: float | None) -> Attempts:
        """The tries of one call under the given deadline or the usual one."""
        usual = self.timeout_s if timeout_s is None else timeout_s
        return Attempts(self.retries, usual, self.clock, self.draw)

    def breaker(self) -> Breaker:
        """The breaker of one client."""
        return Breaker(self.breaking, self.clock)
