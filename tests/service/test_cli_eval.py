"""guardctl eval: judged by a running guard, counted by label, held against limits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import grpc
import pytest
from typer.testing import CliRunner

from guard_api.v1 import guard_pb2, verdict_pb2
from guard_service.cli.app import app
from tests.middleware.fake_service import Answer, FakeService, Refusal, verdict

RUN = CliRunner()
TOO_LONG = Refusal(grpc.StatusCode.INVALID_ARGUMENT, "CONVERSATION_TOO_LONG", details="too long")
GONE = Refusal(grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")


def by_the_number(request: guard_pb2.ClassifyRequest) -> Answer:
    """Blocks from 0.6 on, which no threshold of P(unsafe) at one half would."""
    text = request.conversation.messages[-1].parts[0].text
    if text == "too long":
        return TOO_LONG
    block = float(text) >= 0.6
    action = verdict_pb2.ACTION_BLOCK if block else verdict_pb2.ACTION_ALLOW
    return verdict(action, float(text))


@pytest.fixture
def service() -> FakeService:
    return FakeService(answer=by_the_number)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Forty rows in two files: unsafe ones have 0.55 to 0.93 in steps, safe ones 0.02 to 0.4."""
    folder = tmp_path / "data"
    folder.mkdir()
    for file, part in (("a", range(20)), ("b", range(20, 40))):
        lines = [line(n) for n in part]
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    return folder


def line(number: int, **more: Any) -> dict[str, Any]:
    unsafe = number % 2 == 0
    text = f"+{0.55 + number / 100:.2f}" if unsafe else f"+{number / 100 + 0.01:.2f}"
    return {
        "id": f"r{number}",
        "messages": [{"role": "user", "content": text}],
        "target_role": "user",
        "label": "unsafe" if unsafe else "safe",
        "categories": ["S10"] if unsafe else [],
        "language": "de",
        "source": "s",
        "split": "dev",
        **more,
    }


def add(data: Path, *lines: dict[str, Any]) -> None:
    (data / "c.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))


def test_figures_are_of_the_guard_s_own_verdicts_unless_a_threshold_is_given(
    server: list[str], data: Path, service: FakeService
) -> None:
    result = RUN.invoke(app, ["eval", str(data), "--json", *server])
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["verdict"] == "the guard's own"
    assert (report["all"]["safe"], report["all"]["unsafe"], report["all"]["auroc"]) == (20, 20, 1.0)
    assert report["all"]["recall"] == pytest.approx(17 / 20)  # 0.55, 0.57 and 0.59 passed
    assert report["judges"][0]["model"] == "fake"
    assert report["categories"]["accuracy"] == 1.0
    assert {request.language for request in service.asked} == {"de"}
    half = RUN.invoke(app, ["eval", str(data), "--json", "--threshold", "0.5", *server])
    assert json.loads(half.stdout)["all"]["recall"] == 1.0


def test_people_see_figures_with_intervals_by_group(server: list[str], data: Path) -> None:
    shown = RUN.invoke(app, ["eval", str(data), *server], env={"COLUMNS": "160"}).stdout
    assert "40 rows, 0 without verdict; unsafe is: the guard's own" in shown
    assert "By file" in shown and "By language" in shown and "By category" in shown
    assert "[0.640, 0.948]" in shown  # Wilson's interval of 17 in 20


def test_rows_without_verdict_are_told_and_end_with_status_1(server: list[str], data: Path) -> None:
    bad = line(50, messages=[{"role": "user", "content": ["?"]}])
    add(data, line(41), line(48, messages=[{"role": "user", "content": "too long"}]), bad)
    result = RUN.invoke(app, ["eval", str(data), "--json", *server])
    assert result.exit_code == 1
    assert "2 rows have no verdict and are in no figure" in result.stderr
    report = json.loads(result.stdout)
    assert report["unjudged"]["by_reason"] == {"CONVERSATION_TOO_LONG": 1, "BAD_LINE": 1}
    assert report["all"]["rows"] == 41 and report["data"]["rows"] == 43


def test_kept_scores_are_gone_on_with_and_give_figures_without_a_guard(
    server: list[str], data: Path, service: FakeService, tmp_path: Path
) -> None:
    kept = tmp_path / "scores.jsonl"
    first = RUN.invoke(app, ["eval", str(data), "--json", "--scores", str(kept), *server])
    whole = kept.read_bytes()
    kept.write_bytes(whole[: len(whole) // 2])
    done = whole[: len(whole) // 2].count(b"\n")
    service.asked.clear()
    second = RUN.invoke(app, ["eval", str(data), "--json", "--scores", str(kept), *server])
    assert len(service.asked) == 40 - done
    nobody = ["--server", "127.0.0.1:1"]
    third = RUN.invoke(app, ["eval", str(data), "--json", "--scores", str(kept), *nobody])
    assert first.stdout == second.stdout == third.stdout and third.exit_code == 0
    assert kept.read_bytes() == whole


def test_guard_that_stays_away_ends_the_run_unfinished(
    server: list[str], data: Path, service: FakeService
) -> None:
    service.answer = lambda request: GONE
    result = RUN.invoke(app, ["eval", str(data), "--patience", "0", *server])
    assert result.exit_code == 3 and not result.stdout
    assert "nothing was kept; with --scores FILE" in result.stderr


def test_broken_limit_ends_with_status_1_and_is_named(
    server: list[str], data: Path, tmp_path: Path
) -> None:
    limits, out = tmp_path / "limits.yaml", tmp_path / "report.json"
    limits.write_text("min: {recall: 0.9, auroc: 0.9}\nmax: {fpr: 0.1}\n")
    run = ["eval", str(data), "--gate", str(limits), *server]
    result = RUN.invoke(app, [*run, "--out", str(out)])
    assert result.exit_code == 1
    assert "limit broken: recall: 0.8500, must be at least 0.9" in result.stderr
    assert result.stderr.count("limit broken") == 1
    limits.write_text("worse: {recall: 0}\nby: {file: {'*': {min: {auroc: 0.9}}}}\n")
    held = RUN.invoke(app, [*run, "--reference", str(out)])
    assert held.exit_code == 0, held.stderr
    assert "all 2 limits hold" in held.stderr


def test_what_is_wrong_is_told_before_any_row_is_judged(
    server: list[str], data: Path, service: FakeService, tmp_path: Path
) -> None:
    limits, report = tmp_path / "limits.yaml", tmp_path / "report.json"
    two = tmp_path / "two.yaml"
    limits.write_text("worse: {f1: 0.1}")
    two.write_text("agreement: 0.9")
    report.write_text("{}")
    for extra, said in (
        (["--gate", str(limits)], "name it with --reference"),
        (["--gate", str(report)], "has no limit"),
        (["--gate", str(two)], "agreement needs two guards"),
        (["--reference", str(report)], "not a report"),
        (["--out", str(report)], "never written over"),
        (["--out", str(tmp_path / "none" / "x.json")], "there is no folder"),
        (["--split", "test"], "no row of split 'test'"),
    ):
        result = RUN.invoke(app, ["eval", str(data), *extra, *server])
        assert (result.exit_code, said in result.stderr) == (2, True), result.stderr
    add(data, {"id": "x"})
    assert RUN.invoke(app, ["eval", str(data), *server]).exit_code == 2
    assert service.asked == []


def test_guard_sees_no_label_and_nobody_else_sees_the_text(
    server: list[str], data: Path, service: FakeService, tmp_path: Path
) -> None:
    kept, out = tmp_path / "scores.jsonl", tmp_path / "report.json"
    shown = RUN.invoke(
        app, ["eval", str(data), "--scores", str(kept), "--out", str(out), *server]
    ).stdout
    asked = str(service.asked)
    assert "+0.55" in asked and "unsafe" not in asked and "S10" not in asked
    for text in (kept.read_text(), out.read_text(), shown):
        assert "+0." not in text
