"""What steps are named by, which rows they judge, and the table that tells what each costs."""

from __future__ import annotations

from pathlib import Path

import pytest

from guard_quantization.checkpoint.steps import (
    Step,
    compare_steps,
    page,
    steps_of,
    thinned,
    write_steps,
)
from tests.quantization.evaluation.test_stage import data


def test_a_run_stands_for_the_stages_that_can_be_judged(tmp_path: Path) -> None:
    for stage in ("prune", "quantize", "export"):
        (tmp_path / "run" / stage / "model").mkdir(parents=True)
    found = steps_of(["starter", f"mine={tmp_path / 'run'}"])
    assert [step.name for step in found] == ["starter", "mine prune", "mine export"]
    assert found[0].place == "starter"
    assert found[2].place == str(tmp_path / "run" / "export" / "model")


def test_two_steps_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="NAME=FOLDER"):
        steps_of(["a/guard", "b/guard"])
    assert [step.name for step in steps_of(["a/guard", "other=b/guard"])] == ["guard", "other"]


def test_rows_are_thinned_evenly_within_each_file() -> None:
    rows = [*data(40), *data(6, file="small")]
    some = thinned(rows, 10)
    assert [row.id for row in some if row.file == "f"] == [f"dev{n}" for n in range(0, 40, 4)]
    assert len([row for row in some if row.file == "small"]) == 6
    assert thinned(rows, 0) == rows


def test_the_table_has_points_with_intervals_and_no_made_up_figures() -> None:
    first = {
        "safe": 20, "unsafe": 10, "auroc": 0.9, "f1": 0.5, "agreement": 1.0,
        "intervals": {"auroc": [0.85, 0.95]},
        "against_first": {"auroc": {"difference": 0.0, "interval": None}},
    }  # fmt: skip
    second = {
        **first, "auroc": None, "agreement": 0.875, "intervals": {},
        "against_first": {"auroc": {"difference": -0.0123, "interval": [-0.02, None]}},
    }  # fmt: skip
    lines = page({"sets": {"dev": {"whole": first, "pruned": second}}}).splitlines()
    assert lines[0] == "### dev (20 safe, 10 unsafe)"
    assert lines[4] == "| whole | 90.0 (85.0 to 95.0) | +0.0 | 50.0 | 100.0 |"
    assert lines[5] == "| pruned |  | -1.2 | 50.0 | 87.5 |"


def test_a_model_beside_itself_costs_nothing_and_is_judged_once(tmp_path: Path) -> None:
    steps = [Step("first", "fake"), Step("same", "fake")]
    report = compare_steps(steps, data(40), tmp_path)
    assert report["steps"] == ["first", "same"] and [*report["sets"]] == ["dev"]
    same = report["sets"]["dev"]["same"]
    assert same["against_first"]["auroc"]["difference"] == 0.0 and same["agreement"] == 1.0
    assert same["auroc"] == pytest.approx(0.875)  # a quarter of the unsafe rows is like the safe
    (kept,) = tmp_path.glob("scores-*.jsonl")
    assert len(kept.read_text().splitlines()) == 40
    assert "| same | 87.5" in write_steps(tmp_path, report).read_text()
