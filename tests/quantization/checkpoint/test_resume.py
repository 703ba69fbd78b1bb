"""A stage that is killed again and again, one step later each time, ends in the same bytes."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import yaml

from guard_quantization.checkpoint import pipeline
from guard_quantization.checkpoint.pipeline import STAGES, CheckpointPipeline
from guard_quantization.recipe import load_checkpoint_recipe
from guard_quantization.stages import RECORD, Run, digest
from tests.quantization.starter.test_pipeline import toy_row
from tests.quantization.tiny_llama import saved, tiny_llama

RECIPE = {
    "name": "small",
    "template": "llama-guard-3-1b",
    "calibration": {"toy": [12, 1.0]},
    "prune": {"layers": 1, "keep_last": 0, "intermediate_size": 64, "rows": 6, "held_back": 3},
    "distill": {
        "plan": {"template": "llama-guard-3-1b", "trust": 0.0, "held_back": 3},
        "epochs": [{"toy": [6, 1.0]}],
        "held": {"toy": [3, 1.0]},
    },
    "quantize": {"block": 32, "rows": 4, "rotate": True},
    "export": {"block": 32},
    "evaluate": {"rows": {"toy": [8, 1.0]}, "probe": False, "least_rows": 2},
}
MOST_KILLS = 40
# Children of a server that has loaded torch and run nothing: no threads that a fork would break.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    (folder / "data").mkdir()
    lines = "\n".join(json.dumps(toy_row(number)) for number in range(60))
    (folder / "data" / "toy.jsonl").write_text(lines + "\n")
    saved(tiny_llama(num_hidden_layers=2, max_position_embeddings=4096), folder / "llama")
    return folder


def do(stage: str, place: Path, out: Path, dies_at: int) -> None:
    """One stage into `out`, killed before its `dies_at`-th step that would be seen on the disk."""
    import torch

    torch.set_num_threads(1)
    left = dies_at

    def mortal(step: Callable[..., Any]) -> Callable[..., Any]:
        def stepped(*args: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*args, **named)

        return stepped

    for name in ("rename", "replace", "fsync"):
        setattr(os, name, mortal(getattr(os, name)))
    recipe = load_checkpoint_recipe(place / "recipe.yaml")
    source = place / "llama"
    way = CheckpointPipeline(recipe, source, place / "data", out.parent)
    way.run = Run(out.parent, names={stage: out.name})
    with patch.object(pipeline, "contrast_rows", list):  # they take a second to read
        way.stage(stage, source)


def ended(stage: str, place: Path, out: Path, dies_at: int = 0) -> int:
    """How the process that did it ended."""
    process = FORKS.Process(target=do, args=(stage, place, out, dies_at))
    process.start()
    process.join()
    code = process.exitcode
    assert code is not None
    return code


def result(out: Path) -> tuple[str, set[str], Any]:
    """Digest, names of files, figures."""
    files = {path.relative_to(out).as_posix() for path in out.rglob("*")}
    return digest(out), files, json.loads((out / RECORD).read_text())["figures"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_is_killed_at_every_step_ends_in_the_same_bytes(
    place: Path, tmp_path: Path, stage: str
) -> None:
    assert ended(stage, place, tmp_path / "once") == 0
    out = tmp_path / "killed"
    kills = 0
    while (code := ended(stage, place, out, kills + 1)) != 0:
        assert code == -signal.SIGKILL and not out.exists()
        kills += 1
        assert kills < MOST_KILLS
    assert kills >= 3
    assert result(out) == result(tmp_path / "once")
