"""guard-service verify: of pulled folders and of artifacts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from guard_service.__main__ import main
from guard_service.pulled import PULLED_FILE
from tests.service.fake_hub import COMMIT, FILES, REPOSITORY
from tests.service.pull.conftest import Run
from tests.service.tiny_artifact import tiny_artifact

library = pytest.importorskip("huggingface_hub")


def test_pulled_folder_verifies(run: Run, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run()
    assert main(["verify", str(folder)]) == 0
    assert f"{REPOSITORY} at commit {COMMIT}" in capsys.readouterr().out


def test_every_change_to_a_pulled_folder_is_named(
    run: Run, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run()
    capsys.readouterr()
    (folder / "config.json").write_bytes(FILES["config.json"][::-1])
    (folder / "README.md").write_bytes(b"longer than it was")
    (folder / "LICENSE.txt").unlink()
    (folder / "USE_POLICY.md").rename(tmp_path / "moved")
    (folder / "USE_POLICY.md").symlink_to(tmp_path / "moved")
    (folder / "pytorch_model.bin").touch()
    assert main(["verify", str(folder)]) == 1
    said = capsys.readouterr().err
    for name in ("config.json: its sha256", "README.md: 18 bytes", "LICENSE.txt: missing"):
        assert name in said
    assert "USE_POLICY.md: missing, or not a plain file" in said
    assert "pytorch_model.bin'" in said and "model-00001" not in said


@pytest.mark.parametrize(
    "record",
    [
        "",
        "[]",
        "{}",
        '{"format": "llama-guard-pull/1"}',
        json.dumps(
            {"format": "llama-guard-pull/1", "repository": "a", "commit": "b", "endpoint": "c"}
            | {"date": "d", "files": {"../x": {"size": 1, "sha256": "0" * 64}}}
        ),
        "[" * 200_000,
        " " * 2_000_000,
    ],
)
def test_broken_records_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], record: str
) -> None:
    (tmp_path / PULLED_FILE).write_text(record)
    assert main(["verify", str(tmp_path)]) == 1
    assert f"{tmp_path / PULLED_FILE}: " in capsys.readouterr().err


def test_artifact_verifies_by_digests_and_golden_prompts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tiny_artifact(tmp_path / "guard")
    assert main(["verify", str(made.folder)]) == 0
    said = capsys.readouterr().out
    assert made.digest in said and f"{len(made.manifest.golden)} prompts" in said


def test_artifact_that_scores_otherwise_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_artifact(tmp_path / "guard").folder
    document = json.loads((folder / "guard.json").read_text())
    document["golden"][0]["unsafe"] = 1 - document["golden"][0]["unsafe"]
    (folder / "guard.json").write_text(json.dumps(document))
    assert main(["verify", str(folder)]) == 1
    assert "golden" in capsys.readouterr().err


def test_artifact_with_a_changed_byte_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_artifact(tmp_path / "guard").folder
    with (folder / "tokenizer.json").open("r+b") as file:
        file.write(b" ")
    assert main(["verify", str(folder)]) == 1
    assert "tokenizer.json: its sha256" in capsys.readouterr().err


def test_folder_that_is_neither_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path)]) == 1
    assert "neither guard.json nor pulled.json nor config.json" in capsys.readouterr().err


def test_flags_alone_still_serve(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--print-config", "--port", "50052"]) == 0
    assert "port: 50052" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["pul"])
    assert "did you mean pull?" in capsys.readouterr().err
