"""guardctl cascade: files of scores in, a band and its figures out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from guard_policies.loader import parse_policy
from guard_service.cli.app import app
from tests.middleware.fake_service import FakeService, verdict

RUN = CliRunner()
ROWS = (  # unsafe, the first guard's score, the second's
    (False, 0.1, 0.1),
    (False, 0.2, 0.1),
    (True, 0.4, 0.9),
    (False, 0.6, 0.2),
    (True, 0.8, 0.9),
    (True, 0.9, 0.9),
)


def write(path: Path, lines: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def scored(path: Path, model: str, scores: list[float | None], policy: str = "2") -> str:
    judge = {"model": model, "model_digest": "1", "policy": "p@1", "policy_digest": policy}
    return write(
        path,
        [
            {"id": f"r{at}", "action": None, "unsafe_score": None, "scores": {}, "error": "X: y"}
            if score is None
            else {
                "id": f"r{at}",
                "action": "block" if score >= 0.5 else "allow",
                "unsafe_score": score,
                "scores": {"S1": score},
                "error": None,
                **judge,
            }
            for at, score in enumerate(scores)
        ],
    )


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    rows: list[dict[str, object]] = [
        {
            "id": f"r{at}",
            "messages": [{"role": "user", "content": "x"}],
            "label": "unsafe" if unsafe else "safe",
            "split": "dev",
        }
        for at, (unsafe, _, _) in enumerate(ROWS)
    ]
    return [
        write(tmp_path / "rows.jsonl", rows),
        scored(tmp_path / "first.jsonl", "small", [first for _, first, _ in ROWS]),
        scored(tmp_path / "second.jsonl", "large", [second for *_, second in ROWS]),
    ]


def test_the_report_has_both_guards_the_band_and_the_curve(
    files: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "report.json"
    result = RUN.invoke(
        app, ["cascade", *files, "--split", "dev", "--json", "--out", str(out), "--tolerance", "0"]
    )
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report == json.loads(out.read_text())
    assert report["format"] == "guard-cascade/1" and report["data"]["rows"] == 6
    assert report["judges"]["second"][0]["model"] == "large"
    assert report["cascade"]["band"] == [0.3, 0.7]
    assert report["cascade"]["sent"] == pytest.approx(1 / 3)
    assert report["first"]["recall"] == pytest.approx(2 / 3)
    assert report["first"]["intervals"]["recall"] == pytest.approx([0.2077, 0.9385], abs=1e-3)
    assert report["curve"][0]["band"] is None and report["curve"][-1]["recall"] == 1.0


def test_people_see_the_piece_for_their_policy(files: list[str]) -> None:
    shown = RUN.invoke(app, ["cascade", *files], env={"COLUMNS": "80"}).stdout
    rows = {" ".join(line.split()[:2]) for line in shown.splitlines()}
    assert rows >= {"first 0.0%", "second 100.0%", "cascade 33.3%"}
    assert "cascade:\n  band: [0.3, 0.7]\n" in shown
    assert "first: small 1, p@1" in shown and "33.3%" in shown


def test_rows_that_one_guard_did_not_judge_are_left_out_and_told(
    files: list[str], tmp_path: Path
) -> None:
    scored(tmp_path / "second.jsonl", "large", [None, *(second for *_, second in ROWS[1:])])
    report = json.loads(RUN.invoke(app, ["cascade", *files, "--json"]).stdout)
    assert report["data"]["rows"] == 5 and report["data"]["not_judged"] == 1


def test_files_of_other_rows_are_refused(files: list[str], tmp_path: Path) -> None:
    scored(tmp_path / "second.jsonl", "large", [0.1] * 5)
    result = RUN.invoke(app, ["cascade", *files])
    assert result.exit_code == 2 and "it holds 5 of 6 rows" in result.stderr


def test_guards_are_compared_under_one_policy_and_alone(files: list[str], tmp_path: Path) -> None:
    path = tmp_path / "second.jsonl"
    sound = path.read_text()
    scored(path, "large", [second for *_, second in ROWS], policy="3")
    result = RUN.invoke(app, ["cascade", *files])
    assert result.exit_code == 2 and "different policies" in result.stderr
    path.write_text(sound.replace('"large"', '"small"', 1))
    result = RUN.invoke(app, ["cascade", *files])
    assert result.exit_code == 2 and "second.jsonl: is of several guards" in result.stderr


def test_a_report_is_not_written_over(files: list[str], tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    out.write_text("mine")
    result = RUN.invoke(app, ["cascade", *files, "--out", str(out)])
    assert result.exit_code == 2 and out.read_text() == "mine"


def test_a_verdict_s_tier_and_its_reason_are_shown(server: list[str], service: FakeService) -> None:
    decided = verdict()
    decided.model.tier, decided.model.tier_reason = "second", "IN_BAND"
    service.answer = lambda request: decided
    shown = RUN.invoke(app, ["check", *server, "hello"]).stdout
    assert "model fake (second guard: IN_BAND)" in shown


BOTH = (  # role, language, unsafe, the first guard's score, the second's
    ("user", "en", False, 0.1, 0.1),
    ("user", "en", True, 0.3, 0.9),
    ("user", "de", True, 0.9, 0.9),
    ("user", "de", False, 0.2, 0.1),
    ("assistant", "en", False, 0.7, 0.1),
    ("assistant", "en", True, 0.9, 0.9),
    ("assistant", "de", False, 0.1, 0.1),
    ("assistant", "de", True, 0.8, 0.9),
)


@pytest.fixture
def both(tmp_path: Path) -> list[str]:
    """Files of rows in both directions and two languages."""
    rows: list[dict[str, object]] = [
        {
            "id": f"r{at}",
            "messages": [{"role": "user", "content": "x"}, {"role": role, "content": "y"}][
                role == "user" :
            ],
            "label": "unsafe" if unsafe else "safe",
            "language": language,
            "split": "dev",
        }
        for at, (role, language, unsafe, _, _) in enumerate(BOTH)
    ]
    return [
        write(tmp_path / "rows.jsonl", rows),
        scored(tmp_path / "first.jsonl", "small", [row[3] for row in BOTH]),
        scored(tmp_path / "second.jsonl", "large", [row[4] for row in BOTH]),
    ]


def test_each_direction_gets_the_band_that_its_rows_want(both: list[str]) -> None:
    result = RUN.invoke(app, ["cascade", *both, "--tolerance", "0", "--json"])
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    bands = {way: fit["cascade"]["band"] for way, fit in report["directions"].items()}
    assert bands == {"prompt": [0.25, 0.6], "response": [0.4, 0.75]}
    for fit in report["directions"].values():
        assert fit["cascade"]["recall"] == 1.0 and fit["cascade"]["fpr"] == 0.0
        assert fit["cascade"]["sent"] == 0.25


def test_languages_are_told_under_the_band_of_their_direction(both: list[str]) -> None:
    report = json.loads(RUN.invoke(app, ["cascade", *both, "--tolerance", "0", "--json"]).stdout)
    found = {(one["direction"], one["language"]): one for one in report["languages"]}
    assert set(found) == {(w, tag) for w in ("prompt", "response") for tag in ("de", "en")}
    english, german = found["prompt", "en"], found["prompt", "de"]
    assert (english["sent"], german["sent"]) == (0.5, 0.0)
    assert (english["first"]["recall"], english["cascade"]["recall"]) == (0.0, 1.0)
    assert (found["response", "en"]["first"]["fpr"], german["first"]["fpr"]) == (1.0, 0.0)


def test_people_see_a_band_for_each_direction(both: list[str]) -> None:
    shown = RUN.invoke(app, ["cascade", *both, "--tolerance", "0"], env={"COLUMNS": "120"}).stdout
    assert "band: {prompt: [0.25, 0.6], response: [0.4, 0.75]}" in shown
    assert "Prompts alone and together" in shown and "response de" in shown
    policy = "name: x\nversion: '1'\n" + shown[shown.index("cascade:\n") :]
    assert parse_policy(policy).cascade is not None
