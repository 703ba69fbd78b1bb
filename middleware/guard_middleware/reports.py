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
            became = "refused" if one.blocked else "passed"
            metrics.unjudged.labels(way.value, type(one.error).__name__, became).inc()
    verdicts = [one.verdict_id if one.judged else type(one.error).__name__ for _, one in outcomes]
    LOG.info(
        "exchange %s (%s): %s %s, verdicts %s",
        id_,
        settings.mode,
        name,
        result,
        " ".join(verdicts),
        extra={
            "fields": {
                "exchange": id_,
                "mode": settings.mode,
                "format": name,
                "result": result,
                "verdicts": verdicts,
            }
        },
    )
