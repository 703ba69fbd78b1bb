"""Rows, score files and reports: what is counted, what is left out and said, what is refused."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from guard_policies.assessment import Direction
from guard_service.evaluation.report import evaluate, write_new
from guard_service.evaluation.rows import DataError, data_files, read_rows
from guard_service.evaluation.scores import read_scores
from tests.service.labelled import noisy, row, scores

LINE: dict[str, Any] = {
    "id": "a",
    "messages": [{"role": "user", "content": "hello"}],
    "label": "unsafe",
    "categories": None,
    "language": "de",
    "source": "s",
    "split": "dev",
}


def write(path: Path, *lines: Any) -> Path:
    text = "\n".join(one if isinstance(one, str) else json.dumps(one) for one in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def test_rows_of_a_folder_are_read_file_by_file_and_split_by_split(tmp_path: Path) -> None:
    reply = {**LINE, "id": "b", "messages": [*LINE["messages"], {"role": "assistant"}]}
    write(tmp_path / "two.jsonl.gz", {**LINE, "label": "safe", "categories": []}, "", reply)
    write(tmp_path / "one.jsonl", {**LINE, "split": "train"}, {**LINE, "group": "g"})
    (tmp_path / "README.md").touch()
    found = [one for one, _ in read_rows(data_files(tmp_path), "dev")]
    assert [(one.file, one.id, one.unsafe) for one in found] == [
        ("one", "a", True),
        ("two", "a", False),
        ("two", "b", True),
    ]
    assert [one.categories for one in found] == [None, (), None]
    assert found[0].group == "g" and found[2].direction is Direction.RESPONSE
    assert len(list(read_rows(data_files(tmp_path)))) == 4


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not a labelled row in JSON"),
        ("[]", "not a labelled row in JSON"),
        ("[" * 100_000, "not a labelled row in JSON"),
        ({**LINE, "label": "bad"}, "label must be safe or unsafe"),
        ({key: value for key, value in LINE.items() if key != "id"}, "the row has no 'id'"),
        ({**LINE, "id": 7}, "id must be a text"),
        ({**LINE, "messages": []}, "the last of messages"),
        ({**LINE, "messages": [{"role": "system", "content": "x"}]}, "the last of messages"),
        ({**LINE, "messages": "secret"}, "not a labelled row in JSON"),
        ({**LINE, "categories": "S1"}, "categories must be a list"),
        ({key: value for key, value in LINE.items() if key != "split"}, "the row has no 'split'"),
    ],
)
def test_line_outside_the_schema_is_named_by_file_line_and_field(
    tmp_path: Path, line: Any, said: str
) -> None:
    path = write(tmp_path / "x.jsonl", LINE, "", line)
    with pytest.raises(DataError) as refused:
        list(read_rows([path], "dev"))
    assert f"x.jsonl:3: {said}" in str(refused.value) and "secret" not in str(refused.value)


def test_folder_without_data_and_broken_packing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no .jsonl"):
        data_files(tmp_path)
    path = write(tmp_path / "x.jsonl.gz", LINE)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="broken"):
        list(read_rows([path]))


def judged_line(number: int, score: float, **more: Any) -> dict[str, Any]:
    line = {"id": f"r{number}", "action": "allow", "unsafe_score": score, "scores": {"S1": score}}
    return {**line, "error": None, "model": "m", "policy": "p@1", **more}


def test_score_file_gives_scores_the_guard_s_own_verdicts_and_failures(tmp_path: Path) -> None:
    rows = [row(n, n > 1) for n in range(5)]
    failed: dict[str, Any] = {"id": "r2", "action": None, "unsafe_score": None, "scores": {}}
    failed["error"] = "BAD: text"
    path = write(
        tmp_path / "s.jsonl",
        judged_line(0, 0.1),
        judged_line(1, 0.2, action="flag", complete=False),
        failed,
        judged_line(3, 0.3, shadow_action="block"),
        judged_line(4, 0.4, scores={"S1": 0.1, "S77": 0.3}),
    )
    found = read_scores(path, rows)
    assert found.failures == {2: "BAD"} and found.judged() == [0, 1, 3, 4]
    kept = found.take(found.judged())
    assert kept.unsafe.tolist() == [0.1, 0.2, 0.3, 0.4]
    assert kept.verdicts(None).tolist() == [False, True, True, False]
    assert kept.verdicts(0.25).tolist() == [False, False, True, True]
    assert found.columns[-1] == "S77" and found.codes[4, -1] == 0.3
    assert found.incomplete == 1 and found.judges[0]["model"] == "m"


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([judged_line(0, 0.1)], "holds 1 of 2 rows"),
        ([judged_line(0, 0.1), judged_line(7, 0.1)], ":2: belongs to other rows"),
        ([judged_line(n, 0.1) for n in range(3)], "more lines than there are rows"),
        ([judged_line(0, 1.5)], ":1: not a line that guardctl wrote"),
        ([judged_line(0, float("nan"))], ":1: not a line that guardctl wrote"),
        ([judged_line(0, 0.1, action="pass")], ":1: not a line that guardctl wrote"),
        (["[]"], ":1: not a line that guardctl wrote"),
    ],
)
def test_score_file_of_other_rows_or_not_whole_is_refused(
    tmp_path: Path, lines: list[Any], said: str
) -> None:
    path = write(tmp_path / "s.jsonl", *lines)
    with pytest.raises(DataError, match=said):
        read_scores(path, [row(0, True), row(1, False)])


def test_report_has_all_rows_and_every_group_and_is_strict_json() -> None:
    rows, said = noisy(160)
    report = evaluate(rows, said)
    json.dumps(report, allow_nan=False)
    assert report["all"]["rows"] == 160 and report["verdict"] == "P(unsafe) >= 0.5"
    assert set(report["by"]) == {"file", "language", "direction", "source", "group"}
    assert {name: one["rows"] for name, one in report["by"]["language"].items()} == {
        "de": 80,
        "en": 80,
    }
    assert report["by"]["group"] == {}
    low, high = report["all"]["intervals"]["auroc"]
    assert low < report["all"]["auroc"] < high
    assert report["categories"]["accuracy"] == report["categories"]["macro_f1"] == 1.0
    assert report["by_category"]["S10"]["rows"] == 40
    assert list(report["by_category"]) == ["S1", "S10"]


def test_rows_without_verdict_are_counted_and_in_no_figure() -> None:
    rows, said = noisy(40)
    report = evaluate(rows, replace(said, failures={0: "TOO_LONG", 9: "TOO_LONG"}))
    assert report["unjudged"] == {
        "rows": 2,
        "share": 0.05,
        "by_reason": {"TOO_LONG": 2},
        "by_file": {"a": 1, "b": 1},
    }
    assert report["data"]["rows"] == 40 and report["all"]["rows"] == 38


def test_over_refusal_counts_safe_rows_of_the_named_files_and_groups_only() -> None:
    rows = [
        *(row(n, False, file="p", group="sounds_dangerous") for n in range(4)),
        row(4, True, file="p", group="sounds_dangerous"),
        row(5, False, file="twins"),
        row(6, False),
    ]
    said = scores([0.9, 0.1, 0.1, 0.1, 0.9, 0.9, 0.9])
    found = evaluate(rows, said)["over_refusal"]
    assert (found["rows"], found["fpr"]) == (4, 0.25)
    both = evaluate(rows, said, over_refusal=("*/sounds*", "twins"))["over_refusal"]
    assert both["fpr"] == 0.4 and both["by"]["twins"]["rows"] == 1
    none = evaluate(rows, said, over_refusal=("x",))["over_refusal"]
    assert none["rows"] == 0 and none["fpr"] is None


def test_naming_counts_any_of_a_row_s_codes_and_misses_for_the_first() -> None:
    rows = [
        row(0, True, ("S1", "S2")),
        row(1, True, ("S10",)),
        row(2, True, ("S10", "S5")),
        row(3, True, None),
        row(4, False),
    ]
    report = evaluate(rows, scores([0.9, 0.9, 0.1, 0.9, 0.9], ["S2", "S10", "S1", "S1", "S1"]))
    assert report["categories"]["rows"] == 3
    assert report["categories"]["accuracy"] == pytest.approx(2 / 3)
    assert report["by_category"]["S10"]["named_f1"] == pytest.approx(2 / 3)
    assert report["by_category"]["S2"]["named_f1"] == 1.0
    assert report["by_category"]["S10"]["recall"] == 0.5
    assert report["categories"]["intervals"]["macro_f1"] == [None, None]


def test_reports_on_other_rows_or_labels_have_another_digest() -> None:
    rows, said = noisy(20)
    digests = {
        evaluate(rows, said)["data"]["digest"],
        evaluate([replace(rows[0], unsafe=not rows[0].unsafe), *rows[1:]], said)["data"]["digest"],
        evaluate(rows[::-1], said)["data"]["digest"],
    }
    assert len(digests) == 3
    assert evaluate(rows, scores(list(np.zeros(20))))["data"]["digest"] in digests


def test_report_files_are_never_written_over(tmp_path: Path) -> None:
    write_new(tmp_path / "r.json", "one")
    with pytest.raises(FileExistsError, match="never written over"):
        write_new(tmp_path / "r.json", "two")
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]
    assert (tmp_path / "r.json").read_text() == "one"
