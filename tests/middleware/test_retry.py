"""When a call is tried again."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guard_middleware.errors import (
    DeadlineExceeded,
    EngineFailed,
    GuardError,
    InvalidRequest,
    Overloaded,
    Unavailable,
)
from guard_middleware.retry import Attempts, Retries


@dataclass
class Clock:
    now_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s


def attempts(clock: Clock, timeout_s: float = 10.0, draw: float = 0.5) -> Attempts:
    return Attempts(Retries(4, 0.1, 1.0), timeout_s, clock, lambda: draw)


def test_pauses_double_under_full_jitter() -> None:
    tries = attempts(Clock())
    pauses = [tries.pause_after(Unavailable("gone")) for _ in range(3)]
    assert pauses == pytest.approx([0.05, 0.1, 0.2])


def test_last_attempt_is_not_followed_by_another() -> None:
    tries = attempts(Clock())
    for _ in range(3):
        tries.pause_after(Unavailable("gone"))
    assert tries.pause_after(Unavailable("gone")) is None


@pytest.mark.parametrize("error", [InvalidRequest, DeadlineExceeded, EngineFailed, GuardError])
def test_what_would_fail_again_is_not_retried(error: type[GuardError]) -> None:
    assert attempts(Clock()).pause_after(error("no")) is None


def test_try_that_was_cut_short_is_made_again_and_the_last_one_may_take_what_is_left() -> None:
    clock = Clock()
    plan = Attempts(Retries(3, 0.1, 1.0, try_timeout_s=2.0), 10.0, clock, lambda: 0.0)
    took = []
    for _ in range(3):
        took.append(plan.next_s())
        clock.now_s += took[-1]
        pause = plan.pause_after(DeadlineExceeded("late"))
    assert took == pytest.approx([2.0, 2.0, 6.0])
    assert pause is None


def test_try_that_took_the_whole_deadline_is_not_made_again() -> None:
    clock = Clock()
    plan = Attempts(Retries(3, try_timeout_s=2.0), 1.0, clock, lambda: 0.0)
    assert plan.next_s() == pytest.approx(1.0)
    assert plan.pause_after(DeadlineExceeded("late")) is None


def test_servers_delay_is_kept_and_jitter_comes_on_top() -> None:
    pause = attempts(Clock()).pause_after(Overloaded("full", retry_after_s=2.0))
    assert pause == pytest.approx(2.05)


def test_no_pause_reaches_past_the_deadline() -> None:
    tries = attempts(Clock(), timeout_s=1.0)
    assert tries.pause_after(Overloaded("full", retry_after_s=2.0)) is None


@given(
    st.floats(0.01, 60), st.floats(0, 0.999), st.floats(0, 30), st.integers(1, 12), st.floats(0, 9)
)
@settings(deadline=None)
def test_all_pauses_together_fit_into_the_deadline(
    timeout_s: float, draw: float, retry_after_s: float, tries: int, call_s: float
) -> None:
    clock = Clock()
    plan = Attempts(Retries(tries, 0.1, 5.0), timeout_s, clock, lambda: draw)
    for _ in range(tries):
        clock.now_s += min(call_s, plan.next_s())
        pause = plan.pause_after(Overloaded("full", retry_after_s=retry_after_s))
        if pause is None:
            return
        clock.now_s += pause
        assert clock.now_s < 100.0 + timeout_s
    pytest.fail("more pauses than attempts")


def test_time_left_shrinks_and_never_reaches_zero() -> None:
    clock = Clock()
    plan = attempts(clock, timeout_s=3.0)
    clock.now_s += 1.0
    assert plan.next_s() == pytest.approx(2.0)
    clock.now_s += 5.0
    assert plan.next_s() > 0


def test_a_deadline_of_nothing_is_refused() -> None:
    for timeout_s in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="timeout_s"):
            attempts(Clock(), timeout_s=timeout_s)
