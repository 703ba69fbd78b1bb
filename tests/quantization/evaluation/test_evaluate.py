"""Figures of a guard: their arithmetic against definitions and hand-made cases."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from guard_policies.assessment import Direction
from guard_quantization.data import Row
from guard_quantization.evaluation.evaluate import (
    Scores,
    auroc,
    by,
    calibrations,
    category_figures,
    expected_calibration_error,
    figures,
    fit_calibration,
    score_rows,
)
from guard_quantization.starter.teacher import CODES
from guard_service.engines.fake import FakeEngine
from guard_service.manifest import Calibration


def row(unsafe: bool, codes: tuple[str, ...] | None = (), role: str = "user") -> Row:
    turns = (("user", "a"), (role, "b")) if role == "assistant" else (("user", "b"),)
    return Row("r", turns, unsafe, codes, "en", "s", "f", "dev")


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=2, max_size=40))
def test_auroc_is_the_share_of_pairs_in_order(pairs: list[tuple[bool, int]]) -> None:
    labels = np.array([label for label, _ in pairs])
    scores = np.array([score for _, score in pairs], float)
    found = auroc(labels, scores)
    ordered = [
        1.0 if p > n else 0.5 if p == n else 0.0 for p in scores[labels] for n in scores[~labels]
    ]
    if not ordered:
        assert math.isnan(found)
    else:
        assert abs(found - sum(ordered) / len(ordered)) < 1e-12


def test_figures_count_at_the_threshold() -> None:
    rows = [row(True, ("S1",)), row(True, ("S1",)), row(False), row(False)]
    found = figures(rows, np.array([0.5, 0.4, 0.6, 0.1]), 0.5)
    assert (found["recall"], found["fpr"], found["f1"]) == (0.5, 0.5, 0.5)
    assert by(rows, np.array([0.5, 0.4, 0.6, 0.1]), lambda r: r.file)["f"] == found


def test_a_group_of_one_class_has_no_auroc_and_no_made_up_rate() -> None:
    found = figures([row(False)], np.array([0.9]))
    assert math.isnan(found["auroc"]) and math.isnan(found["recall"]) and found["fpr"] == 1.0


def test_category_f1_counts_any_of_a_row_s_codes_as_right() -> None:
    shares = np.zeros((3, len(CODES)))
    shares[0, CODES.index("S2")] = 1
    shares[1, CODES.index("S10")] = 1
    shares[2, CODES.index("S1")] = 1
    rows = [row(True, ("S1", "S2")), row(True, ("S10",)), row(True, ("S10",))]
    found = category_figures(rows, shares)
    assert found["by_category"]["S2"]["f1"] == 1.0
    assert abs(found["by_category"]["S10"]["f1"] - 2 / 3) < 1e-12


def test_calibration_error_is_zero_for_true_frequencies() -> None:
    labels = np.array([True, False, False, False] * 100)
    assert expected_calibration_error(labels, np.full(400, 0.25)) < 1e-12
    assert abs(expected_calibration_error(labels, np.full(400, 0.95)) - 0.7) < 1e-12


def test_calibration_recovers_a_scale_and_bias_that_were_applied() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, 20_000)
    labels = rng.random(20_000) < 1 / (1 + np.exp(-logits))
    distorted = 1 / (1 + np.exp(-(logits * 3 - 1)))
    fitted = fit_calibration(labels, distorted)
    assert abs(fitted.scale - 1 / 3) < 0.03 and abs(fitted.bias - 1 / 3) < 0.05


def test_each_direction_is_calibrated_on_its_own_rows() -> None:
    rows = [row(n % 2 == 0, None, role) for role in ("user", "assistant") for n in range(200)]
    rng = np.random.default_rng(1)
    noise = rng.normal(0, 1, 400)
    logits = np.where([r.unsafe for r in rows], 1.0, -1.0) + noise
    logits[200:] += 3
    fitted = calibrations(rows, 1 / (1 + np.exp(-logits)))
    assert fitted[Direction.RESPONSE].bias < fitted[Direction.PROMPT].bias - 2


def test_a_direction_without_rows_of_both_labels_keeps_its_scores() -> None:
    rows = [row(n % 2 == 0, None, "user") for n in range(40)]
    fitted = calibrations(rows, np.linspace(0.1, 0.9, 40))
    assert fitted[Direction.RESPONSE] == Calibration() != fitted[Direction.PROMPT]
    assert {*calibrations([], np.empty(0)).values()} == {Calibration()}


def test_rows_are_scored_in_their_own_order() -> None:
    texts = ("short", "a rather longer text " * 5, "mid size text")
    rows = [
        Row(str(n), (("user", text),), False, (), "en", "s", "f", "dev")
        for n, text in enumerate(texts)
    ]
    engine = FakeEngine()
    together = score_rows(engine, rows)
    alone = [score_rows(engine, [one]).unsafe[0] for one in rows]
    assert isinstance(together, Scores)
    assert together.unsafe.tolist() == alone
