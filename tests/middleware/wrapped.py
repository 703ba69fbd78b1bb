"""A middleware around an application, and what it counted."""

from __future__ import annotations

from collections import Counter
from typing import Any

from prometheus_client import CollectorRegistry

from guard_middleware import GuardMiddleware
from guard_middleware.guards import Guard
from guard_middleware.messages import App
from guard_middleware.metrics import Metrics
from guard_middleware.testing import FakeGuard, forbids

BAD = "fake-bomb"
SAFE = "The weather in Lisbon is mild. " * 20


def fits(got: str, said: str, refusal: str = "") -> bool:
    """Whether a client may have got this of a stream that said that: all of it; or, where BAD is in
    it, a beginning without BAD (verdicts fall where they fall, also within BAD), or the refusal."""
    if BAD not in said:
        return got == said
    return got == refusal or said.startswith(got) and BAD not in got


class Wrapped(GuardMiddleware):
    """With metrics of its own, and a guard that forbids BAD unless it is given another."""

    def __init__(self, app: App, guard: Guard | None = None, **settings: Any) -> None:
        self.registry = CollectorRegistry()
        super().__init__(
            app, guard or FakeGuard(forbids(BAD)), metrics=Metrics(self.registry), **settings
        )

    def counted(self, name: str, **labels: str) -> float:
        """A metric's value, 0 before it is there."""
        return self.registry.get_sample_value(f"guard_middleware_{name}", labels) or 0.0

    @property
    def results(self) -> Counter[str]:
        """How often each result was counted."""
        return Counter(
            {
                sample.labels["result"]: int(sample.value)
                for metric in self.registry.collect()
                for sample in metric.samples
                if sample.name == "guard_middleware_exchanges_total"
            }
        )
