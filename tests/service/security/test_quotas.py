"""Quotas: what passes in a time, by a clock that the test moves."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guard_service.security.quotas import Quota


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_burst_passes_and_then_the_rate() -> None:
    clock = Clock()
    quota = Quota(rate=2, burst=3, clock=clock)
    for _ in range(3):
        assert quota.wait_s(1) == 0
        quota.take(1)
    assert quota.wait_s(1) == pytest.approx(0.5)
    clock.now += 0.5
    assert quota.wait_s(1) == 0


def test_more_than_a_burst_passes_when_full_and_is_paid_back() -> None:
    clock = Clock()
    quota = Quota(rate=10, burst=10, clock=clock)
    assert quota.wait_s(100) == 0
    quota.take(100)
    assert quota.wait_s(1) == pytest.approx(9.1)
    clock.now += 9.2
    assert quota.wait_s(1) == 0 and quota.wait_s(100) > 0


def test_no_bound_never_waits() -> None:
    quota = Quota(math.inf, math.inf, Clock())
    quota.take(10**12)
    assert quota.wait_s(10**12) == 0


@pytest.mark.parametrize("burst", [5.0, math.inf])
def test_other_bounds_do_not_forgive_what_was_taken(burst: float) -> None:
    clock = Clock()
    quota = Quota(1, 10, clock)
    quota.take(10)
    quota.bound(burst if math.isinf(burst) else 1, burst)
    assert quota.wait_s(1) == (0 if math.isinf(burst) else pytest.approx(6))
    quota.bound(1, 10)
    assert not math.isnan(quota.wait_s(1))


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 5), st.integers(1, 30)), max_size=60))
def test_never_more_than_burst_and_rate_beside_one_large_request(
    calls: list[tuple[float, int]],
) -> None:
    clock, taken = Clock(), 0
    quota = Quota(rate=3, burst=7, clock=clock)
    for pause, amount in calls:
        clock.now += pause
        if quota.wait_s(amount) == 0:
            quota.take(amount)
            taken += amount
    assert taken <= 7 + 3 * (clock.now - 1000) + 30
