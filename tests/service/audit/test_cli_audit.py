"""guardctl audit verify and show."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from guard_service.audit.files import segments
from guard_service.audit.keys import read_keys
from guard_service.audit.log import Log
from guard_service.cli.app import app
from tests.service.audit.logs import written

RUN = CliRunner()


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_text("ab" * 32 + "\n")
    return path


@pytest.fixture
def log(tmp_path: Path, key: Path) -> Path:
    return written(tmp_path / "log", keys=read_keys(key))


def test_a_log_that_holds(log: Path, key: Path) -> None:
    for paths in ([log], segments(log), reversed(segments(log))):
        done = RUN.invoke(app, ["audit", "verify", *map(str, paths), "--key", str(key)])
        assert done.exit_code == 0, done.output
        assert "12 verdict" in done.stdout and "note" not in done.stdout
    (reaches,) = (x.split()[1] for x in done.stdout.splitlines() if x.startswith("reaches"))
    done = RUN.invoke(app, ["audit", "verify", str(log), "--key", str(key), "--reaches", reaches])
    assert done.exit_code == 0


def test_a_log_that_does_not_names_the_first_line(log: Path, key: Path) -> None:
    path = segments(log)[1]
    path.write_bytes(path.read_bytes().replace(b"r3", b"r9"))
    done = RUN.invoke(app, ["audit", "verify", str(log), "--key", str(key)])
    assert done.exit_code == 1
    assert done.stdout.startswith(f"BROKEN {path.name}:2: was changed")


def test_what_a_witness_saw_must_be_there(log: Path, key: Path) -> None:
    asked = ["audit", "verify", str(log), "--key", str(key), "--reaches"]
    done = RUN.invoke(app, [*asked, f"999:{'0' * 64}"])
    assert done.exit_code == 1 and "were cut from the end" in done.stdout
    done = RUN.invoke(app, [*asked, f"3:{'0' * 64}"])
    assert done.exit_code == 1 and "line 2 was another one" in done.stdout
    assert RUN.invoke(app, [*asked, "nonsense"]).exit_code == 2


def test_nothing_is_no_log(tmp_path: Path, key: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = RUN.invoke(app, ["audit", "verify", str(tmp_path / "empty"), "--key", str(key)])
    assert done.exit_code == 2 and "no segments" in done.stderr


def test_show_picks_lines(tmp_path: Path, key: Path) -> None:
    folder = tmp_path / "log"
    log = Log(folder, read_keys(key), 10_000, fsync=False)
    common = {"request_id": "r1", "tenant": "shop"}
    log.append(
        [
            {
                "kind": "verdict",
                **common,
                "action": "block",
                "unsafe": 0.9,
                "fired": {"S9": 0.5},
                "direction": "prompt",
                "policy": {"name": "default"},
                "verdict_id": "v1",
            },
            {
                "kind": "refused",
                "request_id": "r2",
                "code": "NOT_FOUND",
                "reason": "UNKNOWN_POLICY",
            },
        ]
    )
    log.stop()

    def shown(*options: str) -> list[str]:
        done = RUN.invoke(app, ["audit", "show", str(folder), "--key", str(key), *options])
        assert done.exit_code == 0, done.output
        return done.stdout.splitlines()

    assert len(shown()) == 4
    (blocked,) = shown("--action", "block")
    assert "block 0.9000 S9 prompt default v1 r1 shop" in blocked
    (other,) = shown("--request", "r2")
    assert "NOT_FOUND UNKNOWN_POLICY r2" in other
    (whole,) = shown("--kind", "verdict", "--json")
    assert json.loads(whole)["unsafe"] == 0.9
    path = segments(folder)[0]
    path.write_bytes(path.read_bytes().replace(b"shop", b"sh0p"))
    done = RUN.invoke(app, ["audit", "show", str(folder), "--key", str(key)])
    assert done.exit_code == 1 and "BROKEN audit-000001.jsonl:2" in done.stderr
