"""guardctl bulk: order, errors by line, going on after an interruption, slowing down."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from guard_api.v1 import guard_pb2, verdict_pb2
from guard_service.cli.app import app
from guard_service.cli.bulk_lines import MAX_LINE_BYTES, read_record, read_records
from guard_service.cli.bulk_output import NotResumable, open_output
from guard_service.cli.pace import Pace, Stopped
from tests.middleware.fake_service import Answer, FakeService, Refusal, verdict

RUN = CliRunner()
FULL = Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", retry_after_s=0.01)
GONE = Refusal(grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")


def score_in_text(request: guard_pb2.ClassifyRequest) -> Answer:
    """Judges by the number that the text is: out-of-order answers would show."""
    return verdict(score=float(request.conversation.messages[-1].parts[0].text))


@pytest.fixture
def service() -> FakeService:
    return FakeService(answer=score_in_text)


def lines_in(count: int) -> list[dict[str, Any]]:
    return [{"id": f"r{number}", "text": f"{number / 1000}"} for number in range(count)]


def write(path: Path, lines: list[Any]) -> str:
    text = "".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def read(path: Path) -> list[dict[str, Any]]:
    data = path.read_bytes()
    text = gzip.decompress(data) if path.suffix == ".gz" else data
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_every_line_is_answered_in_order(
    server: list[str], service: FakeService, tmp_path: Path, suffix: str
) -> None:
    source = write(tmp_path / f"in.jsonl{suffix}", lines_in(300))
    out = tmp_path / f"out.jsonl{suffix}"
    result = RUN.invoke(app, ["bulk", source, str(out), "-c", "8", *server])
    assert result.exit_code == 0
    assert "300 lines judged, 0 with an error" in result.stderr
    found = read(out)
    assert [one["id"] for one in found] == [f"r{number}" for number in range(300)]
    assert [one["unsafe_score"] for one in found] == pytest.approx([n / 1000 for n in range(300)])
    assert found[4]["action"] == "allow" and found[4]["error"] is None
    assert found[4]["scores"] == pytest.approx({"S1": 0.001, "S10": 0.003})
    assert service.most_in_flight <= 8


def test_line_that_cannot_be_judged_gets_an_error_and_the_run_goes_on(
    server: list[str], service: FakeService, tmp_path: Path
) -> None:
    turns = [{"role": "user", "content": "0.1"}, {"role": "assistant", "content": "0.2"}]
    source = write(
        tmp_path / "in.jsonl",
        [
            {"id": "ok", "messages": turns, "target_role": "assistant", "language": "de"},
            "{broken",
            "",
            {"id": "both", "text": "x", "messages": turns},
            {"id": "role", "messages": turns, "target_role": "user"},
            {"id": 7, "messages": []},
            "[1]",
            {"id": "refused", "text": "not a number"},
            {"text": "0.3"},
        ],
    )
    refused = Refusal(grpc.StatusCode.INVALID_ARGUMENT, "CONVERSATION_TOO_LONG", details="too long")

    def answer(request: guard_pb2.ClassifyRequest) -> Answer:
        text = request.conversation.messages[-1].parts[0].text
        return refused if text == "not a number" else score_in_text(request)

    service.answer = answer
    result = RUN.invoke(app, ["bulk", source, str(tmp_path / "out.jsonl"), *server])
    assert result.exit_code == 1
    assert "8 lines judged, 6 with an error" in result.stderr
    found = read(tmp_path / "out.jsonl")
    assert [one["id"] for one in found] == ["ok", None, "both", "role", 7, None, "refused", None]
    assert [one["line"] for one in found] == [1, 2, 4, 5, 6, 7, 8, 9]
    errors = [one["error"] for one in found]
    assert errors[0] is errors[7] is None
    assert errors[1] == "BAD_LINE: the line is not JSON in UTF-8"
    assert errors[6] == "CONVERSATION_TOO_LONG: too long"
    assert all(one["action"] is None for one in found if one["error"])
    assert [one.language for one in service.asked].count("de") == 1


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("kept", [0.0, 0.33, 0.71, 1.0])
def test_run_goes_on_where_it_was_torn(
    server: list[str], service: FakeService, tmp_path: Path, suffix: str, kept: float
) -> None:
    source = write(tmp_path / "in.jsonl", lines_in(40))
    whole, torn = tmp_path / f"whole.jsonl{suffix}", tmp_path / f"torn.jsonl{suffix}"
    RUN.invoke(app, ["bulk", source, str(whole), *server])
    torn.write_bytes(whole.read_bytes()[: int(kept * whole.stat().st_size)])
    service.asked.clear()
    result = RUN.invoke(app, ["bulk", source, str(torn), *server])
    assert result.exit_code == 0
    assert read(torn) == read(whole)
    if not suffix:
        assert len(service.asked) == 40 - int(kept * 40)


def test_restart_writes_anew(server: list[str], service: FakeService, tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", lines_in(3)), tmp_path / "out.jsonl"
    for _ in range(2):
        RUN.invoke(app, ["bulk", source, str(out), "--restart", *server])
    assert len(read(out)) == 3 and len(service.asked) == 6


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    "foreign",
    [
        b"my diary\n",
        b"my diary",
        b'{"id":"r1","line":1}\n',
        b'{"id":"r0","line":1}\n' + b'{"id":"r1","line":2}\n' + b'{"id":"r2","line":3}\n',
    ],
)
def test_file_that_is_not_this_runs_output_is_left_alone(
    server: list[str], tmp_path: Path, suffix: str, foreign: bytes
) -> None:
    source, out = write(tmp_path / "in.jsonl", lines_in(2)), tmp_path / f"out{suffix}"
    content = gzip.compress(foreign) if suffix else foreign
    out.write_bytes(content)
    result = RUN.invoke(app, ["bulk", source, str(out), *server])
    assert result.exit_code == 2
    assert "--restart writes it anew" in result.stderr
    assert out.read_bytes() == content


def test_lines_of_another_model_are_not_mixed_in(
    server: list[str], service: FakeService, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    source = write(tmp_path / "in.jsonl", lines_in(1))
    RUN.invoke(app, ["bulk", source, str(out), *server])
    write(tmp_path / "in.jsonl", lines_in(2))
    other = verdict()
    other.model.digest = "sha256:ff"
    service.script = [other]
    result = RUN.invoke(app, ["bulk", source, str(out), *server])
    assert result.exit_code == 2 and "another model or policy" in result.stderr
    assert len(read(out)) == 1


def test_standard_input_and_output_are_files_too(server: list[str]) -> None:
    stdin = json.dumps({"id": "a", "text": "0.5"}) + "\n"
    read_end, write_end = os.pipe()
    os.write(write_end, stdin.encode())
    os.close(write_end)
    kept = os.dup(0)
    os.dup2(read_end, 0)
    try:
        result = RUN.invoke(app, ["bulk", "-", "-", *server])
    finally:
        os.dup2(kept, 0)
        os.close(kept)
        os.close(read_end)
    assert json.loads(result.stdout)["unsafe_score"] == 0.5


def test_overload_slows_the_run_down_and_costs_no_line(
    server: list[str], service: FakeService, tmp_path: Path
) -> None:
    service.script = [FULL] * 5
    source = write(tmp_path / "in.jsonl", lines_in(10))
    result = RUN.invoke(app, ["bulk", source, str(tmp_path / "out.jsonl"), *server])
    assert result.exit_code == 0
    assert all(one["error"] is None for one in read(tmp_path / "out.jsonl"))


def test_guard_that_stays_away_stops_the_run_unfinished(
    server: list[str], service: FakeService, tmp_path: Path
) -> None:
    source, out = write(tmp_path / "in.jsonl", lines_in(3)), tmp_path / "out.jsonl"
    service.answer = lambda request: GONE
    stopped = RUN.invoke(app, ["bulk", source, str(out), "--patience", "0", *server])
    assert stopped.exit_code == 3
    assert "the same command again goes on" in stopped.stderr
    service.answer = score_in_text
    assert RUN.invoke(app, ["bulk", source, str(out), *server]).exit_code == 0
    assert len(read(out)) == 3


@pytest.mark.parametrize("code", [grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNAUTHENTICATED])
def test_what_would_meet_every_line_stops_the_run(
    server: list[str], service: FakeService, tmp_path: Path, code: grpc.StatusCode
) -> None:
    service.answer = lambda request: Refusal(code)
    source = write(tmp_path / "in.jsonl", lines_in(3))
    result = RUN.invoke(app, ["bulk", source, str(tmp_path / "out.jsonl"), *server])
    assert result.exit_code == 3
    assert read(tmp_path / "out.jsonl") == []


def test_interrupted_run_says_so_and_can_go_on(
    server: list[str], service: FakeService, tmp_path: Path
) -> None:
    release = threading.Event()

    def answer(request: guard_pb2.ClassifyRequest) -> Answer:
        if request.conversation.messages[0].parts[0].text == "0.005":
            os.kill(os.getpid(), signal.SIGINT)
            release.wait(30)
        return score_in_text(request)

    service.answer = answer
    source, out = write(tmp_path / "in.jsonl", lines_in(10)), tmp_path / "out.jsonl"
    try:
        result = RUN.invoke(app, ["bulk", source, str(out), "-c", "1", *server])
    finally:
        release.set()
    assert result.exit_code == 130
    assert "interrupted after" in result.stderr
    assert len(read(out)) <= 5
    service.answer = score_in_text
    assert RUN.invoke(app, ["bulk", source, str(out), *server]).exit_code == 0
    assert [one["id"] for one in read(out)] == [f"r{number}" for number in range(10)]


def test_live_pipe_is_answered_before_it_ends_and_can_be_interrupted(server: list[str]) -> None:
    command = [sys.executable, "-c", "from guard_service.cli import main; main()", "bulk", "-", "-"]
    with subprocess.Popen(
        [*command, *server],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as run:
        assert run.stdin and run.stdout and run.stderr
        run.stdin.write(b'{"id": "a", "text": "0.5"}\n')
        run.stdin.flush()
        assert json.loads(run.stdout.readline())["id"] == "a"
        run.send_signal(signal.SIGINT)
        assert run.wait(60) == 130
        assert b"interrupted after 1 lines" in run.stderr.read()


@pytest.mark.parametrize("arguments", [["none", "out"], ["in", "none/out"], ["in", "in"]])
def test_impossible_files_are_wrong_usage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in").touch()
    assert RUN.invoke(app, ["bulk", *arguments, "-s", "localhost:1"]).exit_code == 2


def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        open_output(out, iter(()), restart=False),
        pytest.raises(NotResumable, match="another run"),
        open_output(out, iter(()), restart=True),
    ):
        pass


@given(st.binary(max_size=200) | st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(
        st.sampled_from(["id", "text", "messages", "role", "content", "target_role", "language"]),
        inner,
    ),
    max_leaves=12,
).map(lambda value: json.dumps(value).encode()))  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_no_line_breaks_the_reader(raw: bytes) -> None:
    record = read_record(raw, 1)
    assert (record.conversation is None) == bool(record.wrong)


def test_line_without_end_does_not_fill_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_bytes(b"x" * (2 * MAX_LINE_BYTES + 5) + b'\n{"id":1,"text":"a"}')
    with path.open("rb") as stream:
        first, second = read_records(stream)
    assert "over" in first.wrong and first.line == 1
    assert second.id == 1 and second.line == 2


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_pace_halves_once_for_one_full_queue_and_grows_back() -> None:
    clock = Clock()
    pace = Pace(32, patience_s=10, clock=clock)
    for _ in range(5):
        assert pace.turned_away(1.0)
    assert pace.places == 16
    clock.now_s = 1.0
    pace.turned_away(1.0)
    assert pace.places == 8
    for _ in range(2000):
        pace.answered()
    assert pace.places == 32


def test_pace_runs_out_of_patience_only_without_answers() -> None:
    clock = Clock()
    pace = Pace(4, patience_s=10, clock=clock)
    clock.now_s = 9.0
    assert pace.turned_away(None)
    pace.answered()
    clock.now_s = 18.0
    assert pace.turned_away(None)
    clock.now_s = 28.0
    assert pace.turned_away(None)
    clock.now_s = 28.1
    assert not pace.turned_away(None)


def test_pace_lets_nobody_wait_after_the_end() -> None:
    pace = Pace(1, patience_s=10)
    with pace.place():
        pace.stop()
    with pytest.raises(Stopped), pace.place():
        pass


def test_verdict_of_the_wire_is_what_the_lines_say(
    server: list[str], service: FakeService, tmp_path: Path
) -> None:
    service.script = [verdict(verdict_pb2.ACTION_BLOCK, 0.987654321)]
    source = write(tmp_path / "in.jsonl", lines_in(1))
    RUN.invoke(app, ["bulk", source, str(tmp_path / "out.jsonl"), *server])
    (line,) = read(tmp_path / "out.jsonl")
    assert (line["action"], line["unsafe_score"]) == ("block", 0.987654)
    assert (line["policy"], line["model"], line["complete"]) == ("default@1", "fake", True)
