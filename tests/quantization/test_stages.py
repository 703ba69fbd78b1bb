"""Stages: done once, recorded, resumed, never written over."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from guard_quantization.stages import RECORD, Figures, Origin, Run, StaleStage, digest


@dataclass(frozen=True)
class Plan:
    layers: int = 3
    blocks: tuple[int, ...] = (32,)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run", say=lambda line: None)


def origin(tmp_path: Path, plan: Plan = Plan(), text: str = "in") -> Origin:
    (tmp_path / "input").mkdir(exist_ok=True)
    (tmp_path / "input" / "a.txt").write_text(text)
    return Origin.of("prune", plan, {"source": tmp_path / "input"})


def make(folder: Path) -> Figures:
    (folder / "out.txt").write_text("made")
    return {"kept": 2}


def test_a_stage_is_done_once_and_says_what_came_of_it(run: Run, tmp_path: Path) -> None:
    calls: list[Path] = []

    def counted(folder: Path) -> Figures:
        calls.append(folder)
        return make(folder)

    folder = run.stage(origin(tmp_path), counted)
    assert folder == run.stage(origin(tmp_path), counted) and len(calls) == 1
    assert (folder / "out.txt").read_text() == "made"
    record = run.record("prune")
    assert record["figures"] == {"kept": 2}
    assert record["origin"]["settings"] == {"layers": 3, "blocks": [32]}
    assert record["seconds"] >= 0 and record["peak_mib"] > 1 and "numpy" in record["versions"]


def test_an_interrupted_stage_goes_on_in_its_folder(run: Run, tmp_path: Path) -> None:
    def broken(folder: Path) -> Figures:
        (folder / "half.txt").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.stage(origin(tmp_path), broken)
    assert not (run.folder / "prune").exists()

    def rest(folder: Path) -> Figures:
        assert (folder / "half.txt").read_text() == "half"
        return make(folder)

    assert (run.stage(origin(tmp_path), rest) / "out.txt").exists()


def test_a_stage_that_failed_at_once_leaves_nothing_in_the_way(run: Run, tmp_path: Path) -> None:
    def broken(folder: Path) -> Figures:
        raise ValueError

    with pytest.raises(ValueError):
        run.stage(origin(tmp_path), broken)
    assert not [*run.folder.iterdir()]
    assert run.stage(origin(tmp_path, text="mended"), make).is_dir()


@pytest.mark.parametrize(
    ("plan", "text", "named"), [(Plan(layers=4), "in", "layers"), (Plan(), "other", "source")]
)
@pytest.mark.parametrize("finished", [True, False])
def test_another_origin_is_refused_and_what_differs_is_named(
    run: Run, tmp_path: Path, plan: Plan, text: str, named: str, finished: bool
) -> None:
    def broken(folder: Path) -> Figures:
        (folder / "half.txt").write_text("half")
        raise KeyboardInterrupt

    if finished:
        run.stage(origin(tmp_path), make)
    else:
        with pytest.raises(KeyboardInterrupt):
            run.stage(origin(tmp_path), broken)
    with pytest.raises(StaleStage, match=rf"\({named}\)"):
        run.stage(origin(tmp_path, plan, text), make)


@pytest.mark.parametrize("content", [None, "no json", "{}"])
def test_a_folder_that_no_stage_made_is_never_taken_for_a_result(
    run: Run, tmp_path: Path, content: str | None
) -> None:
    (run.folder / "prune").mkdir(parents=True)
    if content is not None:
        (run.folder / "prune" / RECORD).write_text(content)
    with pytest.raises(StaleStage, match="delete"):
        run.stage(origin(tmp_path), make)


def test_a_digest_covers_names_and_contents_but_no_records(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    first = digest(tmp_path)
    (tmp_path / RECORD).write_text(json.dumps({}))
    assert digest(tmp_path) == first
    (tmp_path / "a").rename(tmp_path / "b")
    renamed = digest(tmp_path)
    (tmp_path / "b").write_text("2")
    assert len({first, renamed, digest(tmp_path)}) == 3
    with pytest.raises(FileNotFoundError):
        digest(tmp_path / "nothing")
