"""guard-quantize from a shell: what it prints, what it keeps, how it ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from guard_policies.loader import parse_policy
from guard_quantization.__main__ import app
from tests.quantization.evaluation.test_stage import data as labelled

RUN = CliRunner()


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    folder = tmp_path / "data"
    folder.mkdir()
    lines = [
        {
            "id": row.id,
            "messages": [{"role": role, "content": text} for role, text in row.turns],
            "label": "unsafe" if row.unsafe else "safe",
            "categories": list(row.categories or ()),
            "language": row.language,
            "source": row.source,
            "split": row.split,
        }
        for row in labelled()
    ]
    (folder / "f.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return ["--data", str(folder)]


def test_evaluate_prints_a_report_that_guardctl_reads(data: list[str]) -> None:
    result = RUN.invoke(app, ["evaluate", "fake", *data, "--no-probe", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["format"] == "guard-evaluation/1"
    assert report["all"]["recall"] == pytest.approx(0.75)
    shown = RUN.invoke(app, ["evaluate", "fake", *data, "--no-probe"]).stdout
    assert "40 rows, 0 without verdict" in shown and "By language" in shown


def test_broken_limit_ends_with_status_1_and_stands_on_the_page(
    data: list[str], tmp_path: Path
) -> None:
    limits, out = tmp_path / "limits.yaml", tmp_path / "out"
    limits.write_text("min: {recall: 0.8}\nagreement: 0.9\n")
    run = ["evaluate", "fake", *data, "--no-probe", "--gate", str(limits)]
    result = RUN.invoke(app, [*run, "--reference", "fake", "--out", str(out)])
    assert result.exit_code == 1
    assert "limit broken: recall: 0.7500, must be at least 0.8" in result.stderr
    assert result.stderr.count("limit broken") == 1
    assert "recall: 0.7500, must be at least 0.8" in (out / "report.html").read_text()
    limits.write_text("min: {recall: 0.7}")
    held = RUN.invoke(app, [*run, "--reference", "fake", "--out", str(out)])
    assert held.exit_code == 0 and "done before" in held.stderr


def test_limits_that_need_a_reference_are_refused_before_anything_is_judged(
    data: list[str], tmp_path: Path
) -> None:
    (tmp_path / "limits.yaml").write_text("worse: {f1: 0.01}")
    result = RUN.invoke(app, ["evaluate", "fake", *data, "--gate", str(tmp_path / "limits.yaml")])
    assert isinstance(result.exception, ValueError) and "--reference" in str(result.exception)


def test_compare_takes_models_and_files_of_scores(data: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    RUN.invoke(app, ["evaluate", "fake", *data, "--no-probe", "--out", str(out)])
    result = RUN.invoke(app, ["compare", "fake", str(out / "scores-model.jsonl"), *data, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["verdicts"]["agreement"] == 1.0 and found["unsafe_score"]["max"] == 0.0
    shown = RUN.invoke(app, ["compare", "fake", "fake", *data]).stdout
    assert "verdicts agree on 1.0000" in shown and "AUROC" in shown


def test_thresholds_are_a_piece_of_a_policy(data: list[str]) -> None:
    result = RUN.invoke(app, ["thresholds", "fake", *data, "--least-rows", "5", "--fpr", "0.1"])
    assert result.exit_code == 0, result.output
    policy = parse_policy('name: fitted\nversion: "1"\n' + result.stdout)
    assert policy.languages == ("de", "en")
