"""Every metric of middleware and sidecar."""

from __future__ import annotations

from functools import cache

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """Counters and times; names begin with guard_middleware_. No label holds content."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        def name(rest: str) -> str:
            return f"guard_middleware_{rest}"

        self.exchanges = Counter(
            name("exchanges"),
            "Screened requests by format and what became of them: passed, blocked_prompt, "
            "blocked_response, invalid, aborted, gone; in shadow mode what would have, or skipped",
            ("format", "result", "mode"),
            registry=registry,
        )
        self.refused = Counter(
            name("refused"), "Requests on guarded paths that no format knows", registry=registry
        )
        self.unjudged = Counter(
            name("unjudged"),
            "Outcomes without a verdict, by the reason why there is none and what became of what "
            "was to be judged: refused, or passed where on_unavailable_* is allow",
            ("direction", "reason", "became"),
            registry=registry,
        )
        self.prompt_seconds = Histogram(
            name("prompt_seconds"),
            "Time to the verdict on a request",
            registry=registry,
            buckets=_SECONDS,
        )
        self.first_text_seconds = Histogram(
            name("first_text_delay_seconds"),
            "What screening added to the time to a reply's first text: the wait for the request's "
            "verdict before the backend was called, and the wait of the text itself",
            registry=registry,
            buckets=_SECONDS,
        )
        self.end_seconds = Histogram(
            name("end_delay_seconds"),
            "What screening added to the time of a whole reply: the wait for the request's verdict "
            "before the backend was called, and from the backend's end to the end of the client's",
            registry=registry,
            buckets=_SECONDS,
        )
        self.trace_spans = Counter(
            name("trace_spans"),
            "Spans that a sidecar's exporter of traces was given, by result: sent, failed",
            ("result",),
            registry=registry,
        )
        self.in_progress = Gauge(
            name("in_progress"), "Screened requests under way", registry=registry
        )


@cache
def shared() -> Metrics:
    """The metrics of this process, in the default registry."""
    return Metrics()
