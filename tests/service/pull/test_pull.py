"""What guard-service pull brings, and how it goes on after an interruption."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from guard_service.__main__ import main
from guard_service.pulled import PULLED_FILE
from tests.service.fake_hub import COMMIT, FILES, REPOSITORY, WEIGHTS, FakeHub, Request
from tests.service.pull.conftest import Failure, Run, pulled

library = pytest.importorskip("huggingface_hub")


def test_wanted_files_arrive_as_plain_files_and_nothing_else(run: Run, folder: Path) -> None:
    assert run() == 0
    assert pulled(folder) == FILES
    assert not any(path.is_symlink() or path.is_dir() for path in folder.iterdir())
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_record_names_commit_and_digests(run: Run, folder: Path, hub: FakeHub) -> None:
    run()
    record = json.loads((folder / PULLED_FILE).read_text())
    assert (record["repository"], record["commit"]) == (REPOSITORY, COMMIT)
    assert record["endpoint"] == hub.endpoint
    weights = hub.entry("", WEIGHTS)
    name = "model-00001-of-00002.safetensors"
    assert record["files"][name] == {"size": len(WEIGHTS), "sha256": weights["lfs"]["sha256"]}
    assert record["files"].keys() == FILES.keys()


def test_every_file_is_asked_for_at_the_commit_that_was_listed(run: Run, hub: FakeHub) -> None:
    run()
    assert [path for path in hub.paths() if "/resolve/" in path] == [
        hub.file_path(name) for name in FILES
    ]


def test_folder_is_by_default_models_and_the_name(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    assert main(["pull", REPOSITORY, "--accept-licence"]) == 0
    assert pulled(tmp_path / "models" / "Llama-Guard-3-1B") == FILES


def test_a_commit_may_be_named(run: Run, folder: Path, hub: FakeHub) -> None:
    assert run("--revision", COMMIT) == 0
    assert pulled(folder) == FILES


def test_unknown_revision_is_said(failure: Failure) -> None:
    assert "404" in failure("--revision", "d" * 40)


def test_nothing_is_written_over(failure: Failure, folder: Path, hub: FakeHub) -> None:
    folder.mkdir(parents=True)
    assert "exists" in failure()
    assert not hub.asked


def test_what_is_there_already_is_verified_and_the_hub_not_asked(
    run: Run, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run() == 0
    asked = len(hub.asked)
    assert run() == 0 and run("--revision", COMMIT) == 0
    assert f"already there, verified; commit {COMMIT}" in capsys.readouterr().err
    assert len(hub.asked) == asked


@pytest.mark.parametrize("change", ["bytes", "file", "record", "commit", "repository"])
def test_what_is_there_and_is_not_it_is_an_error(
    run: Run, failure: Failure, folder: Path, hub: FakeHub, change: str
) -> None:
    assert run() == 0
    record = json.loads((folder / PULLED_FILE).read_text())
    options: list[str] = []
    if change == "bytes":
        data = (folder / "config.json").read_bytes()
        (folder / "config.json").write_bytes(data[:-1] + b" ")
    elif change == "file":
        (folder / "more.bin").write_bytes(b"x")
    elif change == "record":
        (folder / PULLED_FILE).unlink()
    elif change == "commit":
        options = ["--revision", "e" * 40]
    else:
        (folder / PULLED_FILE).write_text(json.dumps({**record, "repository": "someone/else"}))
    asked = len(hub.asked)
    assert "exists, and is not written over" in failure(*options)
    assert len(hub.asked) == asked


def test_broken_off_download_goes_on_where_it_ended(
    run: Run, failure: Failure, hub: FakeHub, folder: Path
) -> None:
    name = "model-00001-of-00002.safetensors"
    hub.answers[hub.file_path(name)] = lambda ask: ask.break_off(WEIGHTS, after=4096)
    assert "the same command goes on" in failure()
    assert not folder.exists()
    hub.answers.clear()
    hub.asked.clear()
    assert run() == 0
    assert pulled(folder) == FILES
    asked = {path: headers.get("Range") for _, path, headers in hub.asked}
    assert asked[hub.file_path(name)] == "bytes=4096-"
    assert hub.file_path("config.json") not in asked


def test_hub_that_ignores_ranges_still_gives_the_file(
    run: Run, failure: Failure, hub: FakeHub, folder: Path
) -> None:
    name = hub.file_path("model-00001-of-00002.safetensors")
    hub.answers[name] = lambda ask: ask.break_off(WEIGHTS, after=4096)
    failure()
    hub.answers[name] = lambda ask: ask.send(200, WEIGHTS)
    assert run() == 0
    assert pulled(folder) == FILES


@pytest.mark.parametrize("before", [b"rotten", b"x" * len(WEIGHTS), b"x" * (len(WEIGHTS) + 1)])
def test_wrong_leftovers_are_fetched_anew(run: Run, folder: Path, before: bytes) -> None:
    draft = folder.with_name(f".{folder.name}.part")
    draft.mkdir(parents=True)
    (draft / "model-00001-of-00002.safetensors").write_bytes(before)
    (draft / PULLED_FILE).write_text("left by a crash")
    assert run() == 0
    assert pulled(folder) == FILES


def test_leftovers_of_other_names_and_links_are_refused(
    failure: Failure, folder: Path, tmp_path: Path
) -> None:
    draft = folder.with_name(f".{folder.name}.part")
    draft.mkdir(parents=True)
    (draft / "pytorch_model.bin").touch()
    assert "pytorch_model.bin" in failure()
    (draft / "pytorch_model.bin").unlink()
    (tmp_path / "precious").write_text("mine")
    (draft / "config.json").symlink_to(tmp_path / "precious")
    assert "config.json" in failure()
    assert (tmp_path / "precious").read_text() == "mine"
    shutil.rmtree(draft)
    draft.symlink_to(tmp_path)
    assert "is a link" in failure()


def test_two_pulls_into_one_folder_do_not_meet(run: Run, failure: Failure, folder: Path) -> None:
    draft = folder.with_name(f".{folder.name}.part")
    draft.mkdir(parents=True)
    handle = os.open(draft, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert "another pull" in failure()
    os.close(handle)
    assert run() == 0


def test_folder_that_appears_meanwhile_is_kept(
    run: Run, failure: Failure, hub: FakeHub, folder: Path
) -> None:
    def meddle(ask: Request) -> None:
        folder.mkdir(exist_ok=True)
        ask.answer()

    hub.answers[hub.file_path("README.md")] = meddle
    assert "appeared" in failure()
    folder.rmdir()
    assert run() == 0


def test_disk_must_have_room_before_a_file_is_asked_for(
    failure: Failure,
    hub: FakeHub,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**30, 2**30, 10_000))
    assert "are needed" in failure()
    assert not [path for path in hub.paths() if "/resolve/" in path]
    assert not any(folder.parent.iterdir())


def test_ctrl_c_says_that_the_same_command_goes_on(
    run: Run, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(library.file_download, "http_get", interrupt)
    assert run() == 130
    assert "goes on" in capsys.readouterr().err and not folder.exists()


def test_missing_library_is_said_in_one_line(
    failure: Failure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "[pull]" in failure()


def test_library_of_another_kind_is_said(
    failure: Failure, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "__version__", "1.0.0")
    assert "below 1.0" in failure()
    assert not hub.asked
