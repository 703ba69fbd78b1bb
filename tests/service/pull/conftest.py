"""A hub on this machine, and pulls from it."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guard_service.__main__ import main
from guard_service.pulled import PULLED_FILE
from tests.service.fake_hub import FILES, REPOSITORY, UNWANTED, FakeHub

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"
Run = Callable[..., int]
Failure = Callable[..., str]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """An honest hub. The client does not wait between its attempts, nor long for answers."""
    library = pytest.importorskip("huggingface_hub")
    for part in ("constants", "file_download", "utils"):
        importlib.import_module(f"huggingface_hub.{part}")
    for name in ("HF_TOKEN", "HF_ENDPOINT", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(library.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(library.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 5)
    monkeypatch.setattr(library.constants, "DOWNLOAD_CHUNK_SIZE", 1024)
    monkeypatch.setattr(library.constants, "HF_HUB_ENABLE_HF_TRANSFER", False)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    library.utils.reset_sessions()
    with FakeHub(REPOSITORY, {**FILES, **UNWANTED}).serving() as hub:
        yield hub
    library.utils.reset_sessions()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "models" / "guard"


@pytest.fixture
def run(hub: FakeHub, folder: Path) -> Run:
    """Pull from the hub into the folder, with the licence accepted; more flags may follow."""
    where = ["--to", str(folder), "--endpoint", hub.endpoint, "--accept-licence"]
    return lambda *more: main(["pull", REPOSITORY, *where, *more])


@pytest.fixture
def failure(run: Run, capsys: pytest.CaptureFixture[str]) -> Failure:
    """Runs a pull that fails, and gives the line that it ends with."""

    def fail(*more: str) -> str:
        assert run(*more) == 1
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("guard-service pull: ")
        return last

    return fail


def pulled(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != PULLED_FILE}
