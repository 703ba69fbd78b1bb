"""What is told of a screened request or call once it is over: counters and one line of the log."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from guard_middleware.metrics import Metrics
from guard_middleware.settings import Settings
from guard_middleware.verdict import Outcome
from guard_policies.assessment import Direction

LOG = logging.getLogger(__name__)


def report(
    metrics: Metrics,
    settings: Settings,
    id_: str,
    name: str,
    result: str,
    outcomes: Sequence[tuple[Direction, Outcome]],
) -> None:
    """Count it and log it; `name` is a format's."""
    metrics.exchanges.labels(name, result, settings.mode).inc()
    for way, one in outcomes:
        if not one.judged:
            metrics.unjudged.labels(way.value, type(one.error).__name__).inc()
    LOG.info(
        "exchange %s (%s): %s %s, verdicts %s",
        id_,
        settings.mode,
        name,
        result,
        " ".join(one.verdict_id if one.judged else type(one.error).__name__ for _, one in outcomes),
    )
