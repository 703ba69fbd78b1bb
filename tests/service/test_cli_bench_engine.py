"""guardctl bench engine: what is asked, what is counted, and who may fail."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from guard_service.artifact import load_named
from guard_service.cli.app import app
from guard_service.cli.bench_contender import Contender
from guard_service.cli.bench_figures import LENGTHS, Plan, contenders, figures
from guard_service.cli.bench_machine import Machine, multiply_adds_per_token
from guard_service.cli.bench_questions import Questions
from guard_service.cli.bench_table import show_figures
from guard_service.cli.peers import Answer, Question
from guard_service.cli.peers.ours import Ours
from guard_service.cli.peers.worker import answered, memory
from guard_service.manifest import Geometry

RUN = CliRunner()


@pytest.fixture(scope="module")
def questions() -> Questions:
    return Questions(load_named("starter"))


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    peers = ("gguf=/nowhere/model.gguf",)
    return figures(Plan("starter", peers, threads=1, repeats=1, cold_starts=1))


def test_conversations_have_exactly_so_many_tokens_and_are_new(questions: Questions) -> None:
    asked = [questions.of(tokens) for tokens in (10, 40, 160, 160)]
    assert [len(one.body) for one in asked] == [10, 40, 160, 160]
    assert len({one.prefix for one in asked}) == 1
    assert asked[2].body[2:] != asked[3].body[2:]
    assert asked[2].body[-1] == asked[3].body[-1] == asked[0].body[-1]  # the turn's end
    assert asked[0].ids == [*asked[0].prefix, *asked[0].body, *asked[0].closing]


def test_a_new_prefix_shares_almost_nothing_with_any_other(questions: Questions) -> None:
    known, *new = (questions.of(20, new_prefix=cold) for cold in (False, True, True))
    shared = {os.path.commonprefix([known.prefix, one.prefix]) for one in new}
    assert {len(one) for one in shared} == {1} and new[0].prefix != new[1].prefix
    assert {len(one.prefix) for one in (known, *new)} == {questions.prefix_tokens}


def test_what_does_not_fit_the_window_is_refused(questions: Questions) -> None:
    with pytest.raises(ValueError, match="640 tokens"):
        questions.of(640)


def test_a_growing_reply_is_one_conversation_check_by_check(questions: Questions) -> None:
    grown, length = questions.growing(100, 32)
    sizes = [len(one.body) for one in grown]
    assert length == 100 and [size - sizes[0] for size in sizes] == [0, 32, 64, 68]
    for before, after in zip(grown, grown[1:], strict=False):
        assert after.body[: len(before.body) - 2] == before.body[:-2]
    assert all(one.of_response and one.prefix == grown[0].prefix for one in grown)
    longest, most = questions.growing(10_000, 32)
    assert max(len(one.body) for one in longest) <= questions.window + 2 and most < 10_000


def test_another_template_takes_the_models_tokenizer() -> None:
    own = Questions(load_named("starter"))
    other = Questions(load_named("starter"), "llama-guard-3-1b")
    assert other.closing_tokens > own.closing_tokens
    with pytest.raises(ValueError, match="unknown template"):
        Questions(load_named("starter"), "nonsense")


def test_multiply_adds_of_a_token_leave_out_what_the_last_layer_need_not_do() -> None:
    shape = Geometry(
        layers=3, hidden=8, mlp=16, heads=4, kv_heads=2, head_dim=2, vocab=9, max_positions=9
    )
    matrices = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16  # query, key and value, output, MLP
    assert multiply_adds_per_token(shape) == 2 * matrices + 2 * 8 * 4


def test_the_machines_rates_are_of_three_products() -> None:
    machine = Machine(1, rows=8, inner=64, columns=32)
    machine.run()
    rates = machine.rates()
    assert set(rates) == {"fp32", "int8", "int4"}
    assert all(0 < rate < math.inf for rate in rates.values())


class Echo:
    """A peer that computes nothing."""

    def verdict(self, question: Question, decode: int) -> Answer:
        return Answer(len(question.ids), (1,) * decode)


def test_a_worker_answers_line_by_line(questions: Questions) -> None:
    question = questions.of(20)
    request = {"do": "verdict", "questions": [question.document()], "decode": 4}
    told = answered(Echo(), json.loads(json.dumps(request)))
    assert told["tokens"] == len(question.ids) and told["written"] == (1, 1, 1, 1)
    assert told["seconds"] >= 0
    assert 0 < memory()["rss_mib"] <= memory()["peak_mib"]
    with pytest.raises(ValueError, match="dance"):
        answered(Echo(), {"do": "dance"})


def test_our_engine_counts_what_it_computes_and_what_a_stream_saves(questions: Questions) -> None:
    ours = Ours(Path("starter"), 1)
    known, new = questions.of(40), questions.of(40, new_prefix=True)
    row = 40 + questions.closing_tokens + 3  # the verdict's own tokens
    assert ours.verdict(new, 1).computed == questions.prefix_tokens + row
    assert ours.verdict(known, 4).computed == row  # the self-test had this prefix
    grown, length = questions.growing(96, 32)
    told = ours.stream(grown)
    assert told["tokens"] < told["rescan_tokens"]
    assert told["tokens"] <= len(grown[-1].body) + len(grown) * (questions.closing_tokens + 3 + 2)
    assert told["score_difference"] < 1e-4


def test_a_contender_that_ends_is_told_once_and_asked_no_more(questions: Questions) -> None:
    one = Contender("ours", "ours", "starter", 1)
    one.open(questions.of(20))
    assert one.failure == "" and one.start["total_s"] >= one.start["start_s"] > 0
    assert one._process is not None
    os.kill(one._process.pid, signal.SIGKILL)
    assert one.verdict(questions.of(20), 1) is None
    assert one.failure.endswith("its process ended with status -9")
    assert one.ask({"do": "memory"}) is None
    one.close()


def test_peers_are_kinds_and_paths() -> None:
    peers = ("transformers=/a/b", "torch=/e", "gguf=/c/d.gguf")
    found = contenders(Plan("starter", peers, threads=3))
    both = [f"{kind}-{number}" for kind in ("transformers", "torch") for number in ("fp32", "bf16")]
    assert [one.kind for one in found] == ["ours", *both, "gguf"]
    assert {one.threads for one in found} == {3} and found[-1].path == "/c/d.gguf"
    for wrong in ("gguf", "llama=/a"):
        with pytest.raises(ValueError, match="KIND=PATH"):
            contenders(Plan("starter", (wrong,)))


def test_figures_are_those_of_every_length_that_fits(report: dict[str, Any]) -> None:
    ours = report["contenders"][0]
    fit = [tokens for tokens in LENGTHS if tokens <= report["model"]["window_tokens"]]
    cases = {(one["prefix"], one["tokens"], one["verdict"]) for one in ours["verdicts"]}
    assert cases == {(p, t, v) for p in ("warm", "cold") for t in fit for v in ("safe", "unsafe")}
    assert report["left_out"] == [tokens for tokens in LENGTHS if tokens not in fit]
    for one in ours["verdicts"]:
        cold = report["model"]["prefix_tokens"] if one["prefix"] == "cold" else 0
        assert (
            one["computed_tokens"] == cold + one["tokens"] + report["model"]["closing_tokens"] + 3
        )
        assert one["times_ours"] == 1.0
    assert len(ours["cold_starts"]) == 1 and ours["failure"] is None
    assert 0 < ours["rss_mib"] <= ours["peak_mib"]
    assert report["stream"]["share_of_allowed"] <= 1
    assert report["machine"]["prefill_share_of_int8"] > 0


def test_a_peer_that_fails_is_told_and_ends_nothing(
    report: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    peer = report["contenders"][1]
    assert "/nowhere/model.gguf" in peer["failure"]
    assert peer["verdicts"] == [] and peer["rss_mib"] is None
    show_figures(report)
    shown = capsys.readouterr().out
    assert "! gguf model.gguf did not take part" in shown
    assert "left out: conversations of 640 tokens" in shown
    assert "int8 rate in prefill" in shown and "warm  160 unsafe" in shown
    json.dumps(report)


def test_a_mistake_in_a_peer_is_told_before_anything_runs() -> None:
    result = RUN.invoke(app, ["bench", "engine", "--peer", "nobody=/a"])
    assert result.exit_code == 1 and "KIND=PATH" in result.stderr
