"""Golden scores of a checkpoint: recorded once, held wherever the folder is served."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from guard_service.__main__ import main
from guard_service.artifact import GOLDEN_FILE, ArtifactError
from guard_service.engines import EngineFailed, open_engine
from guard_service.engines.golden import CONVERSATIONS, GoldenScores, Recorded, read_golden
from guard_service.manifest import File, Golden
from guard_service.pulled import Pulled, sha256_of
from tests.service.conftest import RunGuard
from tests.service.torch.conftest import opened

Change = Callable[[dict[str, Any]], Any]
Said = pytest.CaptureFixture[str]


@pytest.fixture
def folder(vision_folder: Path, tmp_path: Path) -> Path:
    """A copy without a record."""
    return shutil.copytree(vision_folder, tmp_path / "guard")


@pytest.fixture(scope="module")
def recorded_once(vision_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy with its record."""
    folder = shutil.copytree(vision_folder, tmp_path_factory.mktemp("recorded") / "guard")
    assert main(["verify", str(folder), "--record"]) == 0
    return folder


@pytest.fixture
def recorded(recorded_once: Path, tmp_path: Path) -> Path:
    """Another, which may be spoilt."""
    return shutil.copytree(recorded_once, tmp_path / "guard")


def changed(folder: Path, change: Change) -> None:
    document = json.loads((folder / GOLDEN_FILE).read_text())
    change(document)
    (folder / GOLDEN_FILE).write_text(json.dumps(document))


def pull(folder: Path) -> None:
    """Make the folder one that was pulled."""
    files = {one.name: File(one.stat().st_size, sha256_of(one)) for one in folder.iterdir()}
    Pulled("owner/name", "0" * 40, "https://hub.example", "2026-01-01", files).write(folder)


def test_what_is_recorded_is_checked_at_load_and_by_verify(recorded: Path, capsys: Said) -> None:
    engine = opened(recorded)
    assert engine.golden is not None and len(engine.golden.golden) == len(CONVERSATIONS) + 2
    assert {one.image for one in engine.golden.golden} == {None, (64, 48), (1120, 560)}
    engine.self_test()
    assert main(["verify", str(recorded)]) == 0
    said = capsys.readouterr().out
    assert "sha256 as when golden.json was recorded" in said
    assert "10 conversations score as recorded, within 0.05" in said


def test_text_model_records_no_images(text_folder: Path, tmp_path: Path, capsys: Said) -> None:
    folder = shutil.copytree(text_folder, tmp_path / "guard")
    assert main(["verify", str(folder), "--record", "--tolerance", "0.01"]) == 0
    assert "8 conversations recorded" in capsys.readouterr().out
    golden = opened(folder).golden
    assert golden is not None and golden.tolerance == 0.01
    assert all(one.image is None for one in golden.golden)


@pytest.mark.parametrize("at", [0, -1], ids=["text", "image"])
async def test_model_that_scores_otherwise_is_never_ready(
    recorded: Path, run_guard: RunGuard, capsys: Said, at: int
) -> None:
    def otherwise(document: dict[str, Any]) -> None:
        document["golden"][at]["unsafe"] = (document["golden"][at]["unsafe"] + 0.4) % 1

    changed(recorded, otherwise)
    with pytest.raises(EngineFailed, match="golden conversations score up to 0"):
        await run_guard(open_engine(recorded))
    assert main(["verify", str(recorded)]) == 1
    assert "tolerance 0.05 with float32 weights" in capsys.readouterr().err


def test_difference_within_the_tolerance_holds(recorded: Path) -> None:
    def a_little(document: dict[str, Any]) -> None:
        unsafe = document["golden"][0]["unsafe"]
        document["golden"][0]["unsafe"] = unsafe + (0.04 if unsafe < 0.5 else -0.04)

    changed(recorded, a_little)
    opened(recorded).self_test()
    changed(recorded, lambda document: document.update(tolerance=0.01))
    with pytest.raises(EngineFailed, match="tolerance 0.01"):
        opened(recorded).self_test()


def test_weights_rounded_at_load_have_more_leeway() -> None:
    scores = GoldenScores("", "", 0.04, (Recorded((("user", ""),), 0.5, {}),))
    allowed = [scores.allowed(held) for held in ("bfloat16", "int8", "int4")]
    assert allowed == [0.04, 0.08, 0.16]


def test_other_weights_under_an_old_record_are_refused(recorded: Path, capsys: Said) -> None:
    shard = min(recorded.glob("*.safetensors"))
    tensors = load_file(shard)
    next(iter(tensors.values())).mul_(1.001)
    save_file(tensors, shard)
    with pytest.raises(ArtifactError, match="recorded of files with digest"):
        open_engine(recorded)
    assert main(["verify", str(recorded)]) == 1
    assert "remove the record if you changed the model" in capsys.readouterr().err


def test_checkpoint_of_no_known_source_is_scored_and_that_is_said(
    folder: Path, capsys: Said
) -> None:
    assert main(["verify", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "files   have not been checked" in said
    assert "scores  are numbers, and the same each time (float32)" in said
    assert not (folder / GOLDEN_FILE).exists()


def test_checkpoint_whose_weights_are_broken_fails(folder: Path, capsys: Said) -> None:
    shard = min(folder.glob("*.safetensors"))
    tensors = load_file(shard)
    next(iter(tensors.values())).fill_(float("nan"))
    save_file(tensors, shard)
    assert main(["verify", str(folder)]) == 1
    assert "no finite number" in capsys.readouterr().err


def test_pulled_folder_is_recorded_after_its_digests_hold(folder: Path, capsys: Said) -> None:
    pull(folder)
    assert main(["verify", str(folder)]) == 0
    assert "none recorded; --record does so" in capsys.readouterr().out
    assert main(["verify", str(folder), "--record"]) == 0
    capsys.readouterr()
    assert main(["verify", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "sha256 as in pulled.json" in said and "score as recorded" in said
    (folder / GOLDEN_FILE).unlink()
    (folder / "README.md").write_text("added")
    assert main(["verify", str(folder), "--record"]) == 1
    assert not (folder / GOLDEN_FILE).exists()


def test_record_is_never_written_over(recorded: Path, capsys: Said) -> None:
    before = (recorded / GOLDEN_FILE).read_bytes()
    assert main(["verify", str(recorded), "--record"]) == 1
    assert "remove it first" in capsys.readouterr().err
    assert (recorded / GOLDEN_FILE).read_bytes() == before


BROKEN: dict[str, tuple[Change, str]] = {
    "format": (lambda d: d.update(format="guard-golden/9"), "its format is not"),
    "score": (lambda d: d["golden"][0].update(unsafe=2), r"golden\[0\].unsafe"),
    "code": (lambda d: d["golden"][0].update(categories={"X": 0}), "a code such as S1"),
    "image": (lambda d: d["golden"][0].update(image=[10**6, 1]), r"golden\[0\].image\[0\]"),
    "role": (lambda d: d["golden"][0].update(turns=[["system", ""]]), "user, assistant"),
    "nothing": (lambda d: d.update(golden=[]), "is empty"),
    "no turns": (lambda d: d["golden"][0].update(turns=[]), "or a conversation is"),
    "tolerance": (lambda d: d.update(tolerance=0.9), "tolerance"),
    "more": (lambda d: d.update(more=1), "'more': unknown"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_records_are_refused_by_their_field(tmp_path: Path, case: str) -> None:
    digest = "sha256:" + "0" * 64
    golden = Recorded((("user", "hi"),), 0.5, {"S1": 0.5}, (64, 48))
    GoldenScores(digest, "float32", 0.05, (golden,)).write(tmp_path)
    assert read_golden(tmp_path, digest) == GoldenScores(digest, "float32", 0.05, (golden,))
    change, said = BROKEN[case]
    changed(tmp_path, change)
    with pytest.raises(ArtifactError, match=said):
        read_golden(tmp_path, digest)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"[" * 100_000, b" " * (4 * 2**20 + 1)])
def test_records_that_are_no_object_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / GOLDEN_FILE).write_bytes(content)
    with pytest.raises(ArtifactError, match=GOLDEN_FILE):
        read_golden(tmp_path, "sha256:")


def test_image_that_is_not_seen_is_found(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The golden images count: a model that is shown another picture is not ready."""
    engine = opened(recorded)
    tiles = engine._tiler.tiles if engine._tiler else None
    assert tiles is not None

    def blank(picture: Any) -> Any:
        made = tiles(picture)
        made.pixels.zero_()
        return made

    monkeypatch.setattr(engine._tiler, "tiles", blank)
    with pytest.raises(EngineFailed, match="golden"):
        engine.self_test()


def test_scores_of_a_golden_conversation_are_those_that_are_served(recorded: Path) -> None:
    engine = opened(recorded)
    assert engine.golden is not None
    for one in engine.golden.golden:
        found: Golden = engine.score(one.conversation)
        assert found.unsafe == pytest.approx(one.unsafe, abs=1e-5)
        assert found.categories == pytest.approx(one.categories, abs=1e-5)
