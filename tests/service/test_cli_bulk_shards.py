"""guardctl bulk over folders and Parquet: blocks whole or not there, going on, counting."""

from __future__ import annotations

import fcntl
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from guard_api.v1 import guard_pb2, verdict_pb2
from guard_service.cli.app import app
from guard_service.cli.bulk_blocks import plan_of, records_of
from guard_service.cli.bulk_parts import Parts
from tests.middleware.fake_service import Answer, FakeService, verdict
from tests.service.test_cli_bulk import FULL, score_in_text

RUN = CliRunner()


@pytest.fixture
def service() -> FakeService:
    return FakeService(answer=score_in_text)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three files: 250 lines with a blank one, 30 packed, 20 further down."""
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    plain = [json.dumps({"id": f"a{n}", "text": str(n / 1000)}) for n in range(249)]
    (folder / "a.jsonl").write_text("\n".join([*plain[:100], "", *plain[100:]]))
    packed = "".join(json.dumps({"id": f"b{n}", "text": "0.5"}) + "\n" for n in range(30))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(packed.encode()))
    lines = "".join(json.dumps({"id": f"c{n}", "text": "0.25"}) + "\n" for n in range(20))
    (folder / "deep" / "c.jsonl").write_text(lines)
    (folder / "notes.txt").write_text("not an input")
    return folder


def read(out: Path) -> list[dict[str, Any]]:
    texts = [path.read_text() for path in sorted(out.glob("part-*"))]
    return [json.loads(line) for text in texts for line in text.splitlines()]


def bulk(source: Path, out: Path, *options: str) -> Any:
    return RUN.invoke(app, ["bulk", str(source), str(out), "--block-lines", "40", *options])


def test_folder_is_judged_in_blocks_and_counted(
    server: list[str], source: Path, tmp_path: Path
) -> None:
    result = bulk(source, tmp_path / "out", *server)
    assert result.exit_code == 0, result.stderr
    assert "299 lines in, 299 out, 0 twice, 0 missing, 0 with an error" in result.stderr
    found = read(tmp_path / "out")
    asked = [*(f"a{n}" for n in range(249)), *(f"b{n}" for n in range(30))]
    assert [one["id"] for one in found] == [*asked, *(f"c{n}" for n in range(20))]
    assert [one["unsafe_score"] for one in found[:249]] == pytest.approx(
        [n / 1000 for n in range(249)]
    )
    assert (found[99]["line"], found[100]["line"]) == (100, 102)
    assert {one["file"] for one in found} == {"a.jsonl", "b.jsonl.gz", "deep/c.jsonl"}
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary == {"lines_in": 299, "lines_out": 299, "twice": 0, "missing": 0, "errors": 0}


def test_run_goes_on_with_the_blocks_that_are_not_there(
    server: list[str], service: FakeService, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    bulk(source, out, *server)
    whole, asked = read(out), len(service.asked)
    (out / "part-000002.jsonl").unlink()
    (out / ".part-000002.jsonl.dead").write_text('{"id":"torn')
    result = bulk(source, out, *server)
    assert result.exit_code == 0 and "8 of 9 blocks are there already" in result.stderr
    assert read(out) == whole and len(service.asked) == asked + 39  # one is blank
    assert not list(out.glob(".part-*"))


def test_stopped_run_keeps_whole_blocks_only(
    server: list[str], service: FakeService, source: Path, tmp_path: Path
) -> None:
    service.answer = full_after(100)
    out = tmp_path / "out"
    result = bulk(source, out, *server, "--patience", "0", "-c", "1")
    assert result.exit_code == 3 and "goes on with the blocks that are not there" in result.stderr
    assert len(read(out)) == 80 and len(list(out.glob("part-*"))) == 2
    service.answer = score_in_text
    assert bulk(source, out, *server).exit_code == 0
    assert len(read(out)) == 299


def full_after(calls: int) -> Callable[[guard_pb2.ClassifyRequest], Answer]:
    left = iter(range(calls))
    return lambda request: FULL if next(left, None) is None else score_in_text(request)


@pytest.mark.parametrize("change", ["input", "size", "foreign", "lock", "plan"])
def test_output_of_another_run_is_left_alone(
    server: list[str], source: Path, tmp_path: Path, change: str
) -> None:
    out = tmp_path / "out"
    assert bulk(source, out, *server).exit_code == 0
    before = read(out)
    (out / "part-000001.jsonl").rename(tmp_path / "away")
    options = list(server)
    with (out / ".lock").open("w") as lock:
        if change == "input":
            (source / "a.jsonl").write_text('{"id": 1, "text": "0.1"}\n')
        elif change == "size":
            options += ["--block-lines", "50"]
        elif change == "foreign":
            (out / "mine.txt").write_text("keep")
        elif change == "lock":
            fcntl.flock(lock.fileno(), fcntl.LOCK_EX)
        else:
            (out / "plan.json").unlink()
        result = bulk(source, out, *options)
    assert result.exit_code == 2 and "cannot go on with out" in result.stderr
    assert len(read(out)) == len(before) - 40


def test_restart_writes_it_anew(server: list[str], source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    bulk(source, out, *server)
    (source / "b.jsonl.gz").unlink()
    assert bulk(source, out, *server).exit_code == 2
    assert bulk(source, out, *server, "--restart").exit_code == 0
    assert len(read(out)) == 269


def test_lines_of_two_judges_are_told(
    server: list[str], service: FakeService, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    bulk(source, out, *server)
    (out / "part-000001.jsonl").unlink()
    other = verdict(score=0.1)
    other.model.digest = "sha256:99"

    def by_another(request: guard_pb2.ClassifyRequest) -> verdict_pb2.Verdict:
        return other

    service.answer = by_another
    result = bulk(source, out, *server)
    assert result.exit_code == 2 and "more than one model or policy" in result.stderr


def test_bad_lines_have_an_error_and_the_run_goes_on(server: list[str], tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.jsonl").write_text('{broken\n{"id": "ok", "text": "0.1"}\n[1]\n')
    result = bulk(source, tmp_path / "out", *server)
    assert result.exit_code == 1 and "3 out, 0 twice, 0 missing, 2 with an error" in result.stderr


def test_lost_and_repeated_lines_are_counted(
    server: list[str], source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    bulk(source, out, *server)
    part = out / "part-000000.jsonl"
    lines = part.read_text().splitlines(keepends=True)
    part.write_text("".join([lines[0], *lines[:-2]]))
    result = bulk(source, out, *server)
    assert result.exit_code == 3
    assert "299 lines in, 298 out, 1 twice, 2 missing" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "out", "--ray", "local"], "there is no file or folder"),
        (["in", "in/a.jsonl"], "OUT must be a folder"),
        (["in/deep/empty", "out"], "there is no file that ends in"),
        (["in/bad.parquet", "out"], "bad.parquet"),
    ],
)
def test_wrong_use_is_told(
    server: list[str], source: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (source / "deep" / "empty").mkdir()
    (source / "bad.parquet").write_text("not parquet")
    first, second, *options = arguments
    result = RUN.invoke(
        app, ["bulk", str(tmp_path / first), str(tmp_path / second), *options, *server]
    )
    assert result.exit_code == 2 and message in result.stderr


def test_parquet_rows_are_the_lines_they_would_be(server: list[str], tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
    from pyarrow import Table

    turns = [{"role": "user", "content": "0.1"}, {"role": "assistant", "content": "0.2"}]
    rows: list[dict[str, Any]] = [{"id": str(n), "text": str(n / 100)} for n in range(90)]
    rows += [{"id": "m", "messages": turns, "target_role": "assistant"}, {"id": "none"}]
    source = tmp_path / "in.parquet"
    parquet.write_table(Table.from_pylist(rows, _schema()), source, row_group_size=35)
    result = bulk(source, tmp_path / "out", *server)
    assert result.exit_code == 1 and "92 lines in, 92 out, 0 twice, 0 missing, 1 with" in (
        result.stderr
    )
    found = read(tmp_path / "out")
    assert [one["id"] for one in found] == [row["id"] for row in rows]
    assert [one["unsafe_score"] for one in found[:91]] == pytest.approx(
        [*(n / 100 for n in range(90)), 0.2]
    )
    assert "needs either" in found[91]["error"]


def _schema() -> Any:
    import pyarrow as pa

    turn = pa.struct([("role", pa.string()), ("content", pa.string())])
    texts = [(name, pa.string()) for name in ("id", "text", "target_role")]
    return pa.schema([*texts, ("messages", pa.list_(turn))])


@given(
    st.lists(st.sampled_from([b'{"text": "a"}', b"", b"  ", b"{", b'{"text": "\xc3\xa4"}'])),
    st.integers(1, 7),
    st.booleans(),
)
@settings(deadline=None)
def test_blocks_hold_every_line_that_the_whole_file_holds(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], size: int, ends: bool
) -> None:
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n" * ends)
    plan = plan_of(path, size)
    found = [record.line for block in plan.blocks for record in records_of(path, block)]
    assert found == [at for at, line in enumerate(lines, 1) if line.strip()]
    assert plan.records == len(found)
    assert all(block.lines <= size for block in plan.blocks)


def test_of_two_writers_of_a_block_one_whole_file_stays(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text("{}\n")
    (block,) = plan_of(source, 10).blocks
    parts = Parts(tmp_path)

    def slow() -> Any:
        yield b"1\n"
        parts.write(block, [b"other\n"])
        yield b"2\n"

    parts.write(block, slow())
    assert parts.path(block).read_bytes() == b"1\n2\n"

    def fails() -> Any:
        yield b"torn\n"
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        parts.write(block, fails())
    assert parts.path(block).read_bytes() == b"1\n2\n"
    assert not list(tmp_path.glob(".part-*"))
