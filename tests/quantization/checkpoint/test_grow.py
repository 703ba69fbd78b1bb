"""A grown model computes what it grew from, and every part of it learns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from guard_quantization.__main__ import app
from guard_quantization.checkpoint.grow import grow_artifact, grown
from guard_quantization.evaluation.judges import CheckpointJudge
from guard_quantization.export.agree import probe_prompts
from guard_quantization.export.decoder import Precision
from guard_quantization.llama import GuardLlama, LlamaShape
from guard_service.engines.onnx import OnnxEngine
from tests.service.tiny_artifact import RELEASE, tiny_artifact

SMALL = LlamaShape(50, 64, 96, 2, 2, 1, head_dim=32, max_position_embeddings=64)
LARGE = replace(SMALL, num_hidden_layers=5, intermediate_size=160)
PREFIX, READ = torch.arange(7), torch.tensor([[3, 6], [5, 8], [1, 4]])


def small() -> GuardLlama:
    torch.manual_seed(0)
    made = GuardLlama(SMALL, 5)
    made.eval()
    return made


def large(seed: int = 0) -> GuardLlama:
    made = GuardLlama(LARGE, 5)
    made.eval()
    state = {k: v for k, v in small().state_dict().items() if k not in ("cos", "sin")}
    made.load_state_dict(grown(state, 5, 160, seed))
    return made


def test_a_grown_model_computes_what_it_grew_from() -> None:
    rows = torch.randint(0, 50, (3, 11))
    assert torch.allclose(large()(PREFIX, rows, READ), small()(PREFIX, rows, READ), atol=1e-5)


def test_all_that_is_new_has_a_gradient_after_a_step() -> None:
    model, rows = large(), torch.randint(0, 50, (3, 11))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(PREFIX, rows, READ).square().sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    for name, weight in model.named_parameters():
        assert weight.grad is not None
        new = weight.grad[96:] if name.endswith(("gate_proj.weight", "up_proj.weight")) else None
        assert (weight.grad if new is None else new).abs().max() > 0, name


def test_the_seed_decides_what_new_neurons_read() -> None:
    name = "model.layers.0.mlp.gate_proj.weight"
    first, again, other = (large(seed).state_dict()[name] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(first[:96], small().state_dict()[name])


@pytest.mark.parametrize(("layers", "width"), [(1, 160), (5, 64)])
def test_nothing_shrinks(layers: int, width: int) -> None:
    with pytest.raises(ValueError, match="cannot grow"):
        grown(small().state_dict(), layers, width, 0)


def test_an_artifact_grows_into_a_checkpoint_that_judges_alike(tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "artifact", precision=Precision(32, 32, 32))
    out = tmp_path / "grown"
    grow_artifact(artifact, out, layers=4, width=160, seed=0)
    prompts = probe_prompts(artifact, 4)
    engine, judge = OnnxEngine(artifact), CheckpointJudge(out, RELEASE.template)
    for known, found in zip(engine.assess(prompts), judge.assess(prompts), strict=True):
        assert known.assessment.unsafe_score == pytest.approx(
            found.assessment.unsafe_score, abs=1e-4
        )
    engine.close()
    asked = ["grow", str(artifact.folder), str(out), "--layers", "4", "--intermediate-size", "160"]
    assert isinstance(CliRunner().invoke(app, asked).exception, FileExistsError)
