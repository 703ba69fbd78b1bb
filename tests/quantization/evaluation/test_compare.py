"""Two guards on the same rows: differences, agreement, the rows that moved."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from guard_quantization.evaluation.compare import compare, differences
from guard_service.evaluation.figures import Judged, figures
from tests.service.labelled import noisy, row, scores


def test_guard_compared_with_itself_differs_in_nothing() -> None:
    rows, said = noisy(80)
    found = compare(rows, said, said)
    json.dumps(found, allow_nan=False)
    assert all(one["difference"] == 0 for one in found["figures"].values())
    assert found["verdicts"]["agreement"] == 1.0
    assert found["unsafe_score"] == {"max": 0.0, "p99": 0.0, "mean": 0.0, "shift": 0.0}
    assert found["categories"]["agreement"] == 1.0
    assert found["figures"]["auroc"]["interval"] == [None, None]  # no resample differs


def test_distances_flips_and_worst_rows_are_those_that_were_made() -> None:
    rows = [row(n, n < 2) for n in range(4)]
    found = compare(rows, scores([0.9, 0.6, 0.4, 0.1]), scores([0.8, 0.2, 0.6, 0.1]), worst=2)
    assert found["unsafe_score"]["max"] == pytest.approx(0.4)
    assert found["unsafe_score"]["mean"] == pytest.approx(0.175)
    assert found["unsafe_score"]["shift"] == pytest.approx(-0.075)
    assert (found["verdicts"]["to_unsafe"], found["verdicts"]["to_safe"]) == (1, 1)
    assert found["verdicts"]["agreement"] == 0.5
    assert [one["id"] for one in found["worst"]] == ["r1", "r2"]
    assert set(found["worst"][0]) == {"file", "id", "label", "reference", "other"}


def test_paired_interval_is_narrower_than_those_of_the_guards_alone() -> None:
    rows, said = noisy(400)
    rng = np.random.default_rng(1)
    moved = np.clip(said.unsafe + rng.normal(0, 0.02, 400), 0, 1)
    found = compare(rows, said, replace(said, unsafe=moved))["figures"]["auroc"]
    low, high = found["interval"]
    assert low <= found["difference"] <= high
    labels = np.array([one.unsafe for one in rows])
    alone: Any = figures(Judged(labels, said.unsafe, said.unsafe >= 0.5))["intervals"]
    assert high - low < (alone["auroc"][1] - alone["auroc"][0]) / 2


def test_guard_that_is_really_worse_has_an_interval_below_zero() -> None:
    rows, good = noisy(400, shift=2.0)
    _, bad = noisy(400, seed=1, shift=0.5)
    found = compare(rows, good, bad)
    assert found["figures"]["auroc"]["interval"][1] < 0
    assert found["figures"]["brier"]["interval"][0] > 0
    assert found["by"]["language"]["de"]["figures"]["auroc"]["difference"] < 0
    assert found["by"]["language"]["de"]["rows"] == 200


def test_few_rows_have_differences_without_an_interval() -> None:
    labels = np.array([True, False] * 4)
    one = Judged(labels, np.linspace(0, 1, 8), labels)
    found = differences(one, Judged(labels, np.linspace(1, 0, 8), labels))
    assert found["auroc"]["difference"] != 0 and np.isnan(found["auroc"]["interval"]).all()


def test_rows_that_one_guard_did_not_judge_are_left_out_and_told() -> None:
    rows, said = noisy(40)
    other = replace(said, failures={3: "TOO_LONG"})
    found = compare(rows, replace(said, failures={0: "X", 1: "X"}), other)
    assert found["judged_by_both"] == 37
    assert found["unjudged"] == {"reference": 2, "other": 1}
