"""Figures against scikit-learn and by hand; intervals that say no more than the rows do."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from guard_service.evaluation.curves import curves
from guard_service.evaluation.figures import (
    LEAST_ROWS,
    NAMES,
    Judged,
    figures,
    interval,
    measure,
    resamples,
    values,
    wilson,
)

ROW = st.tuples(st.booleans(), st.integers(0, 8))


def judged(rows: list[tuple[bool, int]], threshold: float = 0.5) -> Judged:
    scores = np.array([score / 8 for _, score in rows])
    return Judged(np.array([label for label, _ in rows], bool), scores, scores >= threshold)


def random_rows(count: int, seed: int = 0, shift: float = 1.0) -> Judged:
    """Calibrated scores: P(unsafe) is the chance with which the label was drawn."""
    rng = np.random.default_rng(seed)
    scores = 1 / (1 + np.exp(-rng.normal(0, 2 * shift, count)))
    return Judged(rng.random(count) < scores, scores, scores >= 0.5)


@given(st.lists(ROW, min_size=2, max_size=40))
@settings(max_examples=40, deadline=None)
def test_figures_are_those_of_scikit_learn(rows: list[tuple[bool, int]]) -> None:
    one = judged([(True, 8), (False, 0), *rows])
    found = values(one)
    assert found["auroc"] == pytest.approx(metrics.roc_auc_score(one.labels, one.scores))
    assert found["auprc"] == pytest.approx(metrics.average_precision_score(one.labels, one.scores))
    assert found["brier"] == pytest.approx(metrics.brier_score_loss(one.labels, one.scores))
    assert found["f1"] == pytest.approx(metrics.f1_score(one.labels, one.fired))
    assert found["precision"] == pytest.approx(metrics.precision_score(one.labels, one.fired))
    assert found["recall"] == pytest.approx(metrics.recall_score(one.labels, one.fired))
    assert found["fpr"] == pytest.approx((~one.labels & one.fired).sum() / (~one.labels).sum())


@given(st.lists(st.tuples(ROW, st.integers(0, 3)), min_size=1, max_size=20))
@settings(max_examples=40, deadline=None)
def test_a_weight_counts_a_row_so_many_times(rows: list[tuple[tuple[bool, int], int]]) -> None:
    once, copies = [row for row, _ in rows], [count for _, count in rows]
    ordered = sorted(range(len(rows)), key=lambda at: -once[at][1])
    weights = np.array([[copies[at] for at in ordered]], float)
    weighted = measure(judged(once).sorted(), weights)
    repeated = values(judged([row for row, count in rows for _ in range(count)]))
    for name in NAMES:
        assert weighted[name][0] == pytest.approx(repeated[name], nan_ok=True), name


@pytest.mark.parametrize("label", [True, False])
def test_what_one_class_does_not_define_has_no_value(label: bool) -> None:
    found = values(judged([(label, 6)] * 30))
    undefined = {"auroc", "auprc", *(("fpr",) if label else ("recall", "f1"))}
    assert {name for name in NAMES if math.isnan(found[name])} == undefined


def test_no_rows_have_no_figure_at_all() -> None:
    found = figures(judged([]))
    assert found["rows"] == 0
    assert all(math.isnan(values(judged([]))[name]) for name in NAMES)


def test_few_rows_of_a_class_give_counts_and_values_but_no_bootstrap_interval() -> None:
    few = [(True, 5 + n % 3) for n in range(LEAST_ROWS - 1)]
    found = figures(judged(few + [(False, n % 8) for n in range(50)]))
    assert (found["rows"], found["unsafe"]) == (59, 9)
    assert isinstance(found["auroc"], float) and 0 < found["auroc"] < 1
    ends = found["intervals"]
    assert isinstance(ends, dict)
    assert all(np.isnan(ends[name]).all() for name in ("auroc", "auprc", "f1", "ece", "brier"))
    assert ends["recall"][0] < 1.0 == ends["recall"][1]


def test_rows_told_apart_without_a_mistake_get_no_interval_of_no_width() -> None:
    ends = figures(judged([(True, 8), (False, 0)] * 40))["intervals"]
    assert isinstance(ends, dict) and np.isnan(ends["auroc"]).all()


def test_wilson_says_something_of_none_and_of_all() -> None:
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(20, 20) == pytest.approx((0.8389, 1.0), abs=1e-4)
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0, 20)[0] == 0.0 and wilson(20, 20)[1] == 1.0
    assert np.isnan(wilson(0, 0)).all()


def test_resamples_keep_each_stratum_s_number_of_rows() -> None:
    strata = np.array([0] * 30 + [1] * 12 + [2] * 15)
    drawn = np.concatenate(list(resamples(strata)))
    assert drawn.shape == (1000, 57)
    assert (drawn[:, :30].sum(axis=1) == 30).all() and (drawn[:, 30:42].sum(axis=1) == 12).all()
    assert abs(drawn.mean(axis=0) - 1).max() < 0.2 and drawn.std() > 0.8
    again = np.concatenate(list(resamples(strata)))
    assert (drawn == again).all()
    assert not (drawn == np.concatenate(list(resamples(strata, seed=1)))).all()


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    held = {"auroc": 0, "f1": 0, "auprc": 0, "brier": 0}
    truth = values(random_rows(200_000, seed=99))
    for seed in range(40):
        ends = figures(random_rows(300, seed))["intervals"]
        assert isinstance(ends, dict)
        for name in held:
            aim = 0.0 if name == "ece" else truth[name]
            held[name] += ends[name][0] <= aim <= ends[name][1] or (
                name == "ece" and ends[name][0] < 0.02
            )
    assert all(count >= 33 for count in held.values()), held


def test_calibration_error_s_interval_is_mirrored_since_resamples_have_more_of_it() -> None:
    one = random_rows(400, seed=3)
    lines = [measure(one.sorted(), some)["ece"] for some in resamples(one.sorted().labels)]
    drawn, value = np.concatenate(lines), values(one)["ece"]
    assert drawn.mean() > value
    low, high = interval(value, drawn, reverse=True)
    assert low < value and high < np.percentile(drawn, 97.5)


def test_curves_begin_and_end_where_they_must_and_stay_short() -> None:
    found = curves(random_rows(3000))
    assert found["roc"][0] == [0.0, 0.0] and found["roc"][-1] == [1.0, 1.0]
    assert found["pr"][-1][0] == 1.0 and len(found["pr"]) <= 200
    area = np.trapezoid([y for _, y in found["roc"]], [x for x, _ in found["roc"]])
    assert area == pytest.approx(values(random_rows(3000))["auroc"], abs=0.01)
    assert sum(one["rows"] for one in found["calibration"]) == 3000
    assert all(
        one["interval"][0] <= one["unsafe"] <= one["interval"][1] for one in found["calibration"]
    )
    assert curves(judged([(True, 1)]))["roc"] == []
