"""The band that is fitted, on rows where the right one is known."""

from __future__ import annotations

import numpy as np
import pytest

from guard_service.evaluation.cascade import Fit, fit_band
from guard_service.evaluation.figures import Bools, Floats


def fitted(rows: list[tuple[bool, float, bool]], tolerance: float = 0.0) -> Fit:
    """From (unsafe, the first guard's score, whether the second fires); the first fires at 0.5."""
    labels, scores, second = (np.array(column) for column in zip(*rows, strict=True))
    return fit_band(labels, scores, scores >= 0.5, second, tolerance)


def test_the_band_holds_the_rows_that_only_the_second_gets_right_and_no_others() -> None:
    fit = fitted(
        [
            (False, 0.1, False),
            (False, 0.2, False),
            (True, 0.4, True),
            (False, 0.6, False),
            (True, 0.8, True),
            (True, 0.9, True),
        ]
    )
    assert (fit.first.recall, fit.first.fpr) == (2 / 3, 1 / 3)
    assert (fit.second.recall, fit.second.fpr) == (1.0, 0.0)
    assert fit.chosen.band == (0.3, 0.7)
    assert fit.chosen.sent == pytest.approx(2 / 6)
    assert (fit.chosen.recall, fit.chosen.fpr, fit.chosen.agreement) == (1.0, 0.0, 1.0)


def test_no_band_is_chosen_where_the_first_is_as_good() -> None:
    fit = fitted([(False, 0.1, False), (True, 0.9, True), (True, 0.6, False)])
    assert fit.chosen.band is None and fit.chosen.sent == 0.0
    assert fit.curve == (fit.first,)


def test_tolerance_buys_a_cheaper_band() -> None:
    rows = [(True, 0.3 + at / 1000, True) for at in range(100)]  # the first misses all of them
    rows += [(True, 0.9, True)] * 100 + [(False, 0.05, False)] * 200
    assert fitted(rows).chosen.sent == pytest.approx(100 / 400)
    assert fitted(rows, tolerance=0.1).chosen.sent == pytest.approx(80 / 400)


def test_a_second_guard_that_flags_more_is_not_paid_for_with_false_positives() -> None:
    rows = [(True, 0.4, True)] * 5 + [(True, 0.9, True)] * 5
    rows += [(False, 0.41, True)] * 5 + [(False, 0.1, False)] * 95
    fit = fitted(rows)
    assert fit.chosen.band is not None
    low, high = fit.chosen.band
    assert low <= 0.4 <= high < 0.41
    assert (fit.chosen.recall, fit.chosen.fpr) == (1.0, 0.0)


@pytest.mark.parametrize("unsafe", [True, False])
def test_rows_of_one_kind_only_fit_nothing(unsafe: bool) -> None:
    with pytest.raises(ValueError, match="none of one kind"):
        fitted([(unsafe, 0.2, False), (unsafe, 0.8, True)])


def drawn(count: int, seed: int = 0) -> tuple[Bools, Floats, Bools, Bools]:
    """Rows of which the first guard is unsure and the second surer."""
    rng = np.random.default_rng(seed)
    labels = rng.random(count) < 0.4
    logits = rng.normal(np.where(labels, 1.2, -1.2), 1.5)
    scores = 1 / (1 + np.exp(-logits))
    return labels, scores, scores >= 0.5, rng.random(count) < np.where(labels, 0.97, 0.03)


def test_every_point_is_what_its_band_makes_of_the_rows() -> None:
    labels, scores, first, second = drawn(500)
    fit = fit_band(labels, scores, first, second, 0.02)
    assert len(fit.curve) > 10
    for point in (*fit.curve, fit.chosen):
        inside = np.zeros(len(labels), bool)
        if point.band is not None:
            inside = (point.band[0] <= scores) & (scores <= point.band[1])
        fired = np.where(inside, second, first)
        assert point.sent == pytest.approx(inside.mean())
        assert point.recall == pytest.approx(fired[labels].mean())
        assert point.fpr == pytest.approx(fired[~labels].mean())
        assert point.agreement == pytest.approx((fired == second).mean())
    gains = [point.recall - point.fpr for point in fit.curve]
    assert gains == sorted(gains)
    assert [point.sent for point in fit.curve] == sorted(point.sent for point in fit.curve)


def test_no_cheaper_band_keeps_what_the_chosen_one_keeps() -> None:
    labels, scores, first, second = drawn(60)
    chosen = fit_band(labels, scores, first, second, 0.05)
    recall, fpr = second[labels].mean() - 0.05, second[~labels].mean() + 0.05
    sent = []
    for low in scores:
        for high in scores[scores >= low]:
            inside = (low <= scores) & (scores <= high)
            fired = np.where(inside, second, first)
            if fired[labels].mean() >= recall and fired[~labels].mean() <= fpr:
                sent.append(inside.mean())
    assert chosen.chosen.sent == pytest.approx(min(sent))
