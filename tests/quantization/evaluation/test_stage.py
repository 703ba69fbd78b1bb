"""The evaluate stage: which rows, who judges, what is written, what a build fails on."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from guard_policies.assessment import Direction
from guard_policies.loader import parse_policy
from guard_quantization.data import Row
from guard_quantization.evaluation.plan import EvaluatePlan
from guard_quantization.evaluation.stage import (
    MODEL,
    REFERENCE,
    broken_limits,
    choose_rows,
    evaluate_model,
    fit_languages,
)
from guard_quantization.evaluation.thresholds import Fit, fitted
from guard_service.engines.fake import FakeEngine
from guard_service.evaluation.gate import read_limits, read_report
from guard_service.evaluation.rows import DataError
from tests.service.labelled import scores

PLAN = EvaluatePlan(probe=False, least_rows=5)


def data(count: int = 40, split: str = "dev", file: str = "f") -> list[Row]:
    """Half unsafe; the fake engine finds all but every fourth of these."""
    texts = ("a cake", "fake-bomb", "a boat", "fake-bomb", "tea", "fake-bomb", "a hat", "a bomb")
    return [
        Row(
            f"{split}{n}",
            (("user", f"{texts[n % 8]} {n}"),),
            n % 2 == 1,
            ("S9",) if n % 2 else (),
            ("en", "de")[n // 8 % 2],
            "s",
            file,
            split,
        )
        for n in range(count)
    ]


def test_rows_of_the_plan_are_chosen_the_same_way_every_time() -> None:
    rows = [*data(), *data(split="test"), *data(split="train"), *data(file="other")]
    plan = replace(PLAN, split="test", rows={"f": (20, 1.0)})
    chosen = choose_rows(rows, plan)
    assert chosen == choose_rows(rows, plan)
    assert {row.file for row in chosen.rows} == {"f"} and len(chosen.rows) <= 24
    assert {chosen.rows[at].split for at in chosen.reported} == {"test"}
    assert {chosen.rows[at].split for at in chosen.fit} == {"dev"}
    assert chosen.digest != choose_rows(rows, replace(plan, split="dev")).digest
    probed = choose_rows(rows, replace(plan, probe=True))
    assert {probed.rows[at].source for at in probed.reported} == {"s", "probe"}
    with pytest.raises(DataError, match="no row of split 'test'"):
        choose_rows(data(), plan)


def test_stage_writes_reports_a_comparison_and_a_policy(tmp_path: Path) -> None:
    chosen = choose_rows([*data(), *data(split="test")], replace(PLAN, split="test"))
    judges: dict[str, Any] = {REFERENCE: FakeEngine, MODEL: partial(FakeEngine, categories=("S1",))}
    told = evaluate_model(tmp_path, replace(PLAN, split="test"), chosen, judges)
    json.dumps(told, allow_nan=False)
    assert told["rows"] == 40 and told["agreement"] == 1.0
    assert told["accuracy"][MODEL]["recall"] == pytest.approx(0.75)
    report = read_report((tmp_path / "report.json").read_bytes(), "report")
    assert report["all"]["rows"] == 40 and set(report["by"]["language"]) == {"de", "en"}
    assert json.loads((tmp_path / "comparison.json").read_text())["judged_by_both"] == 40
    assert told["fitted"]["measured_on"] == "rows that were not fitted on"
    policy = parse_policy('name: x\nversion: "1"\n' + (tmp_path / "thresholds.yaml").read_text())
    assert policy.languages == ("de", "en")


def test_limits_are_held_against_what_was_written(tmp_path: Path) -> None:
    chosen = choose_rows(data(), PLAN)
    evaluate_model(tmp_path, PLAN, chosen, {REFERENCE: FakeEngine, MODEL: FakeEngine})
    held = read_limits("{min: {recall: 0.7}, worse: {f1: 0}, agreement: 1.0}")
    assert broken_limits(tmp_path, held) == []
    (said,) = broken_limits(tmp_path, read_limits("min: {recall: 0.8}"))
    assert str(said) == "recall: 0.7500, must be at least 0.8"


def test_what_was_fitted_is_measured_on_its_own_rows_only_when_there_are_no_others() -> None:
    chosen = choose_rows(data(), PLAN)
    said = scores([0.3 if row.unsafe else 0.1 for row in chosen.rows])
    found = fit_languages(chosen, said, PLAN)
    assert found["measured_on"] == "the rows they were fitted on"
    assert found["as_it_is"]["recall"] == 0.0 and found["with_fits"]["recall"] == 1.0
    assert found["with_fits"]["fpr"] == 0.0


def test_a_language_without_its_own_fit_has_the_direction_s_or_nothing() -> None:
    way = Direction.PROMPT
    fits = [Fit(way, "", 9, 9, 0.2, temperature=2.0), Fit(way, "de", 9, 9, 0.4, temperature=0.5)]
    fits.append(Fit(way, "th", 1, 1, None))
    rows = [replace(data(1)[0], language=tag) for tag in ("de", "th", "en")]
    reply = replace(rows[2], turns=(("user", "a"), ("assistant", "b")))
    found = fitted([*rows, reply], np.full(4, 0.3), fits, otherwise=0.5)
    assert found.fired.tolist() == [False, True, True, False]
    odds = 0.3 / 0.7
    sharper, softer = odds**2 / (1 + odds**2), odds**0.5 / (1 + odds**0.5)
    np.testing.assert_allclose(found.scores, [sharper, softer, softer, 0.3])
