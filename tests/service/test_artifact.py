"""Artifact folders: written whole, read strictly, every mistake named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from guard_policies.assessment import Direction
from guard_service.artifact import ArtifactError, load, write_artifact
from guard_service.manifest import (
    Calibration,
    Geometry,
    Golden,
    Manifest,
    ManifestError,
    Quantization,
    Verdict,
    parse_manifest,
)

MANIFEST = Manifest(
    name="paper",
    template="compact",
    window_tokens=256,
    categories=("S1", "S10"),
    custom_categories=False,
    verdict=Verdict((1, 2, 3, 4, 5), 1, 2, 3, 4, {"S1": 5, "S10": 4}),
    geometry=Geometry(1, 16, 32, 2, 1, 8, 100, 512),
    parameters=1000,
    quantization=Quantization("int8", "int8", 64),
    licence="Apache-2.0",
    calibration={Direction.PROMPT: Calibration(1.5, -0.25), Direction.RESPONSE: Calibration()},
    golden=(Golden((("user", "grüß dich"),), 0.25, {"S1": 0.2, "S10": 0.05}),),
    provenance={"recipe": {"steps": [1, 2]}},
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    files = {}
    for name in ("model.onnx", "model.onnx.data", "tokenizer.json"):
        files[name] = tmp_path / f"source-{name}"
        files[name].write_bytes(name.encode() * 9)
    return write_artifact(tmp_path / "paper", MANIFEST, files).folder


def changed(folder: Path, change: Callable[[dict[str, Any]], object]) -> bytes:
    document = json.loads((folder / "guard.json").read_text("utf-8"))
    change(document)
    return json.dumps(document).encode()


def test_what_is_written_comes_back(folder: Path) -> None:
    artifact = load(folder)
    assert replace(artifact.manifest, files={}) == MANIFEST
    assert sorted(artifact.manifest.files) == ["model.onnx", "model.onnx.data", "tokenizer.json"]
    assert (artifact.model.name, artifact.tokenizer.name) == ("model.onnx", "tokenizer.json")
    assert artifact.digest.startswith("sha256:")


def test_the_digest_is_of_meaning_not_of_layout(folder: Path) -> None:
    before = load(folder).digest
    document = json.loads((folder / "guard.json").read_text("utf-8"))
    reordered = dict(reversed(document.items()))
    (folder / "guard.json").write_text(json.dumps(reordered, indent=7), "utf-8")
    assert load(folder).digest == before
    document["calibration"]["prompt"]["bias"] = 0.5
    (folder / "guard.json").write_text(json.dumps(document), "utf-8")
    assert load(folder).digest != before


def test_an_artifact_is_never_written_over(folder: Path) -> None:
    with pytest.raises(FileExistsError):
        write_artifact(folder, MANIFEST, {"model.onnx": folder / "model.onnx"})
    assert load(folder).manifest.name == "paper"


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: not in the manifest"):
        write_artifact(tmp_path / "half", MANIFEST, {"model.onnx": tmp_path / "a"})
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_every_mistake_in_a_manifest_is_named(folder: Path) -> None:
    def spoil(document: dict[str, Any]) -> None:
        document["template"] = "haiku"
        document["quantization"]["scheme"] = "int3"
        document["window_tokens"] = True
        document["verdict"]["codes"]["T1"] = 5
        document["golden"][0]["unsafe"] = 1.5
        document["golden"][0]["turns"][0][0] = "system"
        document["files"]["../x"] = {"size": 1, "sha256": "0" * 64}
        document["surprise"] = 1
        del document["licence"]

    with pytest.raises(ManifestError) as caught:
        parse_manifest(changed(folder, spoil))
    starts = {problem.split(":")[0] for problem in caught.value.problems}
    assert starts == {
        "template",
        "quantization.scheme",
        "window_tokens",
        "verdict.codes.'T1'",
        "golden[0].unsafe",
        "golden[0].turns[0][0]",
        "files.'../x'",
        "'surprise'",
        "licence",
    }
    assert any("compact" in problem and "haiku" in problem for problem in caught.value.problems)


def test_what_no_single_field_shows_is_checked(folder: Path) -> None:
    def spoil(document: dict[str, Any]) -> None:
        document["categories"] = ["S1", "S3"]
        document["verdict"]["unsafe"] = 1
        document["verdict"]["codes"]["S10"] = 77
        document["geometry"] |= {"vocab": 5, "heads": 3, "kv_heads": 2}
        del document["calibration"]["response"]

    with pytest.raises(ManifestError) as caught:
        parse_manifest(changed(folder, spoil))
    text = str(caught.value)
    for said in (
        "codes.S10: token 77",
        "same token",
        "outside the vocabulary",
        "S3 is missing",
        "heads is not a multiple",
        "must have prompt and response",
    ):
        assert said in text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"format": "guard-artifact/2"}', "guard-artifact/2"),
        (b"{}", "format is None"),
        (b"[1]", "not a JSON object"),
        (b"{", "not JSON"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b"[" * 100_000, "not JSON"),
        (b"\xff\xfe", "not JSON"),
    ],
)
def test_foreign_and_broken_manifests_are_refused(content: bytes, said: str) -> None:
    with pytest.raises(ManifestError, match=said):
        parse_manifest(content)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "tokenizer.json"])
def test_a_changed_file_is_refused(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[5] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=f"{name}: its sha256"):
        load(folder)
    (folder / name).write_bytes(content[:-1])
    with pytest.raises(ArtifactError, match=f"{name}: .* bytes"):
        load(folder)
    (folder / name).unlink()
    with pytest.raises(ArtifactError, match=name):
        load(folder)


def test_files_outside_the_manifest_are_refused_and_documents_are_not(folder: Path) -> None:
    (folder / "MODEL_CARD.md").write_text("# Paper")
    load(folder)
    (folder / "extra.data").write_bytes(b"")
    (folder / "more").mkdir()
    with pytest.raises(ArtifactError, match=r"(?s)extra\.data.*more"):
        load(folder)


def test_links_lead_nowhere_else(folder: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    for name in ("tokenizer.json", "guard.json"):
        shutil.move(folder / name, kept)
        os.symlink(kept, folder / name)
        with pytest.raises(ArtifactError, match="out of the folder"):
            load(folder)
        (folder / name).unlink()
        shutil.move(kept, folder / name)
    load(folder)


def test_a_special_file_is_not_waited_for(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")
    with pytest.raises(ArtifactError, match="not a file"):
        load(folder)


def test_a_folder_that_is_no_artifact_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match="exported first"):
        load(tmp_path)
    with pytest.raises(ArtifactError, match="no such folder"):
        load(tmp_path / "nowhere")


def test_calibration_is_a_sigmoid_without_overflow() -> None:
    assert Calibration().probability(0.0) == 0.5
    assert Calibration(2.0, -1.0).probability(0.5) == 0.5
    assert Calibration().probability(-1e6) == 0.0
    assert Calibration().probability(1e6) == 1.0
