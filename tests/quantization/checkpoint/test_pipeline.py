"""A checkpoint's whole way to an artifact that serves, in small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from guard_quantization.checkpoint.beliefs import open_teacher
from guard_quantization.checkpoint.pipeline import STAGES, CheckpointPipeline, one_stage
from guard_quantization.checkpoint.random_weights import write_random_checkpoint
from guard_quantization.export.hf import RANDOM
from guard_quantization.recipe import CheckpointRecipe, RecipeError, load_recipe
from guard_quantization.stages import StaleStage, digest
from guard_service.engines import open_engine
from guard_service.engines.torch.published import LLAMA_GUARD_3_1B
from tests.quantization.starter.test_pipeline import toy_row
from tests.quantization.tiny_llama import saved, tiny_llama

RECIPES = Path(__file__).parents[3] / "quantization" / "recipes"
DOCUMENT: dict[str, Any] = {
    "name": "small",
    "template": "llama-guard-3-1b",
    "calibration": {"toy": [24, 1.0]},
    "prune": {"layers": 3, "intermediate_size": 64, "rows": 12, "held_back": 6},
    "distill": {
        "plan": {
            "template": "llama-guard-3-1b", "lr": 1e-3, "warmup": 2, "tokens": 4096, "trust": 0.5,
            "quantized_from": 0.5, "held_back": 6,
        },
        "epochs": [{"toy": [12, 1.0]}],
        "held": {"toy": [6, 1.0]},
    },
    "quantize": {"block": 32, "rows": 8, "rotate": True},
    "export": {"bits": 4, "block": 32, "embedding_bits": 4},
    "evaluate": {
        "probe": False, "reference": "source", "steps": True, "least_rows": 5,
        "limits": {"min": {"auroc": 0.01}},
    },
}  # fmt: skip


def recipe(folder: Path, **changes: Any) -> CheckpointRecipe:
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump({**DOCUMENT, **changes}))
    read = load_recipe(path)
    assert isinstance(read, CheckpointRecipe)
    return read


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    (folder / "data").mkdir()
    lines = "\n".join(json.dumps(toy_row(number)) for number in range(160))
    (folder / "data" / "toy.jsonl").write_text(lines + "\n")
    saved(tiny_llama(initializer_range=0.05, max_position_embeddings=4096), folder / "llama")
    return folder


def pipeline(place: Path, read: CheckpointRecipe, runs: str) -> CheckpointPipeline:
    teacher = open_teacher(str(place / "llama"), read.window_tokens)
    said: list[str] = []
    return CheckpointPipeline(
        read, place / "llama", place / "data", place / runs, teacher, said.append
    )


def test_a_checkpoint_becomes_an_artifact_whether_or_not_it_was_interrupted(place: Path) -> None:
    read = recipe(place)
    made = pipeline(place, read, "once").make()
    engine = open_engine(made)
    engine.self_test()
    assert engine.card.name == "small" and engine.card.template == "llama-guard-3-1b"
    for last in STAGES:  # a new process for each stage
        pieces = pipeline(place, read, "pieces").make(last)
    assert open_engine(pieces).card.digest == engine.card.digest
    pipe = pipeline(place, read, "once")
    assert [pipe.run.record(name)["origin"]["stage"] for name in STAGES] == list(STAGES)
    steps = pipe.run.record("prune")["figures"]["steps"]
    assert [step["step"] for step in steps] == ["source", "depth", "mlp", "head"]
    assert steps[0]["mib"] > steps[1]["mib"] > steps[2]["mib"] > steps[3]["mib"]
    assert pipe.run.record("distill")["figures"]["examples"] == 12
    judged = pipe.run.record("evaluate")["figures"]
    assert list(judged["accuracy"]) == ["reference", "prune", "distill", "model"]
    assert judged["rows"] == 32 and 0 <= judged["agreement"] <= 1 and pipe.broken == []
    text = (pipe.run.folder / "report.html").read_text()
    for said in ("Pruning", "Distillation", "Quantization", "The artifact", "How well it judges"):
        assert said in text
    assert "Against the reference" in text and "Limits that are broken" not in text


def test_a_limit_that_no_longer_holds_is_told_without_judging_anew(place: Path) -> None:
    only = {"prune": None, "distill": None, "quantize": None}
    pipeline(place, recipe(place, **only), "gate").make()
    evaluate = {**DOCUMENT["evaluate"], "limits": {"min": {"auroc": 1.0}}}
    pipe = pipeline(place, recipe(place, **only, evaluate=evaluate), "gate")
    pipe.make()
    assert [one.figure for one in pipe.broken] == ["auroc"]
    assert "Limits that are broken" in pipe.write_page().read_text()


def test_a_stage_goes_from_folder_to_folder_and_gives_what_a_run_gives(place: Path) -> None:
    read = recipe(place, prune=None, distill=None, evaluate=None)
    made = pipeline(place, read, "whole").make("quantize")
    data, out = place / "data", place / "alone" / "int4"
    assert digest(one_stage("quantize", read, place / "llama", out, data)) == digest(made)
    assert "Quantization" in (out / "report.html").read_text()
    with pytest.raises(ValueError, match="no stage distill"):
        one_stage("distill", read, place / "llama", place / "alone" / "taught", data)


def test_stages_that_a_recipe_leaves_out_are_skipped(place: Path) -> None:
    read = recipe(place, prune=None, distill=None, quantize=None, evaluate=None)
    pipe = pipeline(place, read, "export-only")
    open_engine(pipe.make()).self_test()
    assert {path.name for path in pipe.run.folder.iterdir()} == {"export", "report.html"}


def test_another_plan_never_takes_an_old_result(place: Path) -> None:
    pipeline(place, recipe(place), "stale").make("prune")
    changed = recipe(place, prune={**DOCUMENT["prune"], "layers": 2})
    with pytest.raises(StaleStage, match="layers"):
        pipeline(place, changed, "stale").make("prune")


def test_random_weights_never_pass_for_a_guard(place: Path, tmp_path: Path) -> None:
    config = {
        **LLAMA_GUARD_3_1B,
        **json.loads((place / "llama" / "config.json").read_text()),
    }
    write_random_checkpoint(tmp_path / "llama", config, place / "llama" / "tokenizer.model", 0)
    read = recipe(tmp_path, prune=None, distill=None, quantize=None, evaluate=None)
    pipe = CheckpointPipeline(
        read, tmp_path / "llama", place / "data", tmp_path / "runs", None, lambda line: None
    )
    card = open_engine(pipe.make()).card
    assert card.name == "small-random" and card.notice == RANDOM


@pytest.mark.parametrize("name", ["llama-guard-3-1b.yaml", "llama-guard-3-1b-oneshot.yaml"])
def test_the_recipes_for_llama_guard_load_and_make_the_published_shape(name: str) -> None:
    read = load_recipe(RECIPES / name)
    assert isinstance(read, CheckpointRecipe) and read.prune and read.quantize
    assert (read.prune.layers, read.prune.intermediate_size) == (12, 6400)
    assert (read.quantize.bits, read.quantize.block) == (read.export.bits, read.export.block)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prune": {"layer": 3}}, "prune has no key 'layer'; did you mean 'layers'"),
        ({"distill": {"plan": {"template": "x", "trust": 2.0}}}, "trust"),
        ({"quantize": {"bits": "four"}}, r"quantize\.bits"),
        ({"calibration": {"toy": 3}}, "calibration.toy must be a list"),
        ({"template": 7}, "template '7' is unknown"),
        ({"evaluate": {"limits": {"min": {"auroq": 0.9}}}}, "evaluate.limits: .*'auroq'"),
        ({"evaluate": {"limits": {"agreement": 0.9}}}, "name evaluate.reference"),
        ({"evaluate": {"threshold": 2.0}}, "evaluate.threshold is 2.0"),
        ({"evaluate": {"rows": {"toy": [1]}}}, "evaluate.rows.toy must be a list of 2"),
    ],
)
def test_a_mistake_in_a_recipe_is_named(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        recipe(tmp_path, **changes)
