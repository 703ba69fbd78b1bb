"""What screening adds to the time of a reply, to its first text and in all, as it is measured."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from guard_middleware.delays import Delays
from guard_middleware.metrics import Metrics


class Watched:
    """Delays by a clock that a test turns; all began at 100 s."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self._registry = CollectorRegistry()
        self.delays = Delays(Metrics(self._registry), lambda: self.now_s)

    def told(self, name: str) -> list[float]:
        """How often the delay was observed, and the sum, in seconds."""
        full = f"guard_middleware_{name}_delay_seconds"
        return [self._registry.get_sample_value(f"{full}_{of}") or 0.0 for of in ("count", "sum")]


def test_first_text_waits_for_the_requests_verdict_and_for_its_own() -> None:
    watched = Watched()
    for now_s, step in (
        (102.0, watched.delays.called),  # the request's verdict took 2 s
        (110.0, lambda: watched.delays.said(text=False)),
        (111.0, lambda: watched.delays.said(text=True)),
        (112.0, lambda: watched.delays.said(text=True)),
        (113.0, lambda: watched.delays.gave(text=False)),
        (114.0, lambda: watched.delays.gave(text=True)),  # and the text's 3 s
        (119.0, lambda: watched.delays.gave(text=True)),
    ):
        watched.now_s = now_s
        step()
    assert watched.told("first_text") == [1, 5.0]
    assert watched.told("end") == [0, 0.0]


def test_the_whole_reply_waits_for_the_requests_verdict_and_for_the_last() -> None:
    watched = Watched()
    for now_s, step in (
        (102.0, watched.delays.called),
        (120.0, watched.delays.said_all),
        (121.0, watched.delays.gave_all),
    ):
        watched.now_s = now_s
        step()
    assert watched.told("end") == [1, 3.0]


def test_a_backend_called_beside_the_request_is_not_waited_for_and_one_called_again_is() -> None:
    watched = Watched()
    watched.delays.called()  # beside
    watched.now_s = 101.0
    watched.delays.said(text=True)
    watched.now_s = 104.0
    watched.delays.called()  # again, without what was dropped
    watched.now_s = 105.0
    watched.delays.said(text=True)
    watched.delays.gave(text=True)
    assert watched.told("first_text") == [1, 4.0]


def test_nothing_is_measured_of_a_reply_that_was_not_given() -> None:
    watched = Watched()
    watched.delays.called()
    watched.delays.said(text=True)
    watched.delays.said_all()
    assert watched.told("first_text") == watched.told("end") == [0, 0.0]
