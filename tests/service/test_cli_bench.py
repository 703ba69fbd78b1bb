"""guardctl bench: what is measured and how it is told."""

from __future__ import annotations

import json
from pathlib import Path

import grpc
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from guard_service.cli.app import app
from guard_service.cli.bench_load import percentile
from guard_service.cli.bench_run import overhead
from tests.middleware.fake_service import FakeService, Refusal

RUN = CliRunner()
SHORT = ["--duration", "20", "--count", "40", "--warm-up", "0"]


def test_report_is_one_line_of_json(server: list[str], service: FakeService) -> None:
    result = RUN.invoke(app, ["bench", *SHORT, "-c", "4", "--json", *server])
    assert result.exit_code == 0
    assert result.stdout.count("\n") == 1
    told = json.loads(result.stdout)["service"]
    assert told["verdicts"] == 40 and told["errors"] == {}
    assert 0 < told["p50_ms"] <= told["p90_ms"] <= told["p99_ms"] <= told["max_ms"]
    assert service.most_in_flight <= 4


def test_every_text_is_sent_once_and_asks_for_a_fresh_verdict(
    server: list[str], service: FakeService
) -> None:
    RUN.invoke(app, ["bench", *SHORT, *server])
    texts = [asked.conversation.messages[0].parts[0].text for asked in service.asked]
    assert len(set(texts)) == len(texts) == 40
    assert all(asked.no_cache for asked in service.asked)


def test_errors_are_counted_by_reason_and_tell_in_the_exit_code(
    server: list[str], service: FakeService
) -> None:
    service.script = [Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")] * 3
    result = RUN.invoke(app, ["bench", *SHORT, *server])
    assert result.exit_code == 1
    assert "3 x OVERLOADED" in result.stdout
    assert "37 verdicts" in result.stdout


def test_conversations_come_from_a_file(
    server: list[str], service: FakeService, tmp_path: Path
) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    RUN.invoke(app, ["bench", *SHORT, "--file", str(tmp_path / "in.jsonl"), "--cache", *server])
    texts = {asked.conversation.messages[0].parts[0].text for asked in service.asked}
    assert texts == {"a", "b"}
    assert not any(asked.no_cache for asked in service.asked)


def test_engine_is_measured_bare_and_compared() -> None:
    arguments = ["bench", "--model", "fake", "-d", "0.2", "--warm-up", "0", "-c", "4", "--json"]
    told = json.loads(RUN.invoke(app, [*arguments, "--compare-engine"]).stdout)
    assert [engine["batch"] for engine in told["engine"]] == [1, 4]
    assert "time_per_verdict" in told["overhead"]
    alone = json.loads(RUN.invoke(app, ["bench", "engine", *arguments[1:]]).stdout)
    assert "service" not in alone and alone["engine"][0]["verdicts"] > 0


def test_overhead_is_a_share_of_the_engines_own_time() -> None:
    report = {
        "concurrency": 1,
        "service": {"verdicts": 9, "verdicts_per_s": 80.0, "p50_ms": 12.0},
        "engine": [{"batch": 1, "verdicts_per_s": 100.0, "p50_ms": 10.0}],
    }
    assert overhead(report) == {"time_per_verdict": 0.25, "p50_latency": 0.2}


def test_unknown_mode_is_wrong_usage() -> None:
    assert RUN.invoke(app, ["bench", "everything"]).exit_code == 2


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0, 100))
@settings(deadline=None)
def test_percentile_is_a_measured_value_that_enough_do_not_exceed(
    values: list[float], percent: float
) -> None:
    found = percentile(values, percent)
    assert found in values
    assert sum(value <= found for value in values) >= len(values) * percent / 100 - 1e-9
    assert percentile(values, 100) == max(values)
