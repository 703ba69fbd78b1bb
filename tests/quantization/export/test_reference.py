"""Fast graph, optimum's export and torch: one model, the same scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from typer.testing import CliRunner

from guard_quantization.__main__ import app
from guard_quantization.checkpoint.streaming import load_llama
from guard_quantization.export.agree import (
    agreement,
    plan_scores,
    probe_prompts,
    reference_score,
    reference_scores,
)
from guard_quantization.export.decoder import ExportError, Precision
from guard_quantization.export.hf import LLAMA_GUARD_3_1B, export_checkpoint
from guard_quantization.export.reference import Reference, export_reference
from guard_service.artifact import Artifact, load
from tests.quantization.export.test_gguf import HEAD, cut
from tests.quantization.tiny_llama import saved, tiny_llama

FLOAT = Precision(bits=32, embedding_bits=32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_llama(max_position_embeddings=4096, initializer_range=0.08)
    return cut(model, tmp_path_factory.mktemp("checkpoint") / "cut")


@pytest.fixture(scope="module")
def exact(checkpoint: Path) -> Artifact:
    return export_checkpoint(checkpoint, checkpoint.parent / "exact", precision=FLOAT)


class Torch:
    """Logits of the checkpoint in torch, and how many rows were asked for."""

    def __init__(self, folder: Path) -> None:
        self._model = load_llama(folder).requires_grad_(False)
        self.rows = 0

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        self.rows += 1
        found: NDArray[np.float32] = self._model(torch.tensor([list(ids)])).logits[0].numpy()
        return found


def test_the_fast_graph_scores_as_torch_does(checkpoint: Path, exact: Artifact) -> None:
    peer = Torch(checkpoint)
    prompts = probe_prompts(exact, 4)
    wanted = reference_scores(exact, prompts, peer.logits, HEAD)
    found = agreement(prompts, plan_scores(exact, prompts, "stored"), wanted)
    assert len(prompts) == peer.rows == 4
    assert found["unsafe"]["max"] < 1e-4 and found["categories"]["max"] < 1e-4
    assert found["verdicts"] == {"agree": 1.0, "differ": 0}
    assert set(found["categories"]["by_code"]) == set(LLAMA_GUARD_3_1B.categories)


def test_another_model_does_not_agree(checkpoint: Path, exact: Artifact) -> None:
    peer = Torch(checkpoint)

    def reversed_logits(ids: Sequence[int]) -> NDArray[np.float32]:
        return -peer.logits(ids)

    prompts = probe_prompts(exact, 3)
    wanted = reference_scores(exact, prompts, reversed_logits, HEAD)
    found = agreement(prompts, plan_scores(exact, prompts, "stored"), wanted)
    assert found["unsafe"]["max"] > 0.1 and found["verdicts"]["differ"] > 0


def test_scores_are_those_of_their_definition(checkpoint: Path, exact: Artifact) -> None:
    (prompt,) = probe_prompts(exact, 1)
    few = replace(prompt, categories=("S1", "S3"))
    verdict, column = exact.manifest.verdict, {token: at for at, token in enumerate(HEAD)}
    length = len(prompt.prefix) + len(prompt.body) + len(prompt.closing)
    logits = np.zeros((length + 3, len(HEAD)), np.float32)
    logits[length - 1, column[verdict.unsafe]] = 1.0
    logits[length + 2, column[verdict.codes["S3"]]] = np.log(3)
    scored = reference_score(exact.manifest, few, lambda ids: logits, HEAD)
    assert scored.unsafe == pytest.approx(1 / (1 + np.exp(-1)))
    assert scored.categories == pytest.approx((scored.unsafe / 4, scored.unsafe * 3 / 4))
    with pytest.raises(ExportError, match="no logits of token"):
        reference_score(exact.manifest, few, lambda ids: logits, HEAD[:3])


def test_every_plan_is_held_against_fp32(checkpoint: Path) -> None:
    folder = checkpoint.parent / "int4"
    export_checkpoint(checkpoint, folder, precision=Precision(bits=4, block=16, embedding_bits=8))
    asked = ["agree", str(folder), "--prompts", "3", "--json"]
    told = CliRunner().invoke(app, asked)
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout[told.stdout.index("{") :])
    assert found["reference"] == "fp32" and set(found["plans"]) == {"stored", "int8"}
    assert 0 < found["plans"]["int8"]["unsafe"]["max"] < 0.05
    assert CliRunner().invoke(app, [*asked, "--most", "0"]).exit_code == 1


def test_without_optimum_the_export_says_what_to_install(tmp_path: Path, checkpoint: Path) -> None:
    if find_spec("optimum") is not None:
        pytest.skip("optimum is installed")
    with pytest.raises(ExportError, match=r"\[reference\]"):
        export_reference(checkpoint, tmp_path / "reference")
    assert not (tmp_path / "reference").exists()


def test_a_folder_that_is_no_export_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ExportError, match=r"model\.onnx"):
        Reference(checkpoint)


@pytest.mark.parametrize("is_cut", [True, False], ids=["cut", "whole"])
def test_optimums_export_is_the_reference(
    checkpoint: Path, exact: Artifact, tmp_path: Path, is_cut: bool
) -> None:
    pytest.importorskip("optimum.exporters.onnx")
    source = checkpoint
    if not is_cut:
        model = tiny_llama(max_position_embeddings=4096, initializer_range=0.08)
        source = saved(model, tmp_path / "whole")
    out = tmp_path / "reference"
    made = CliRunner().invoke(app, ["reference", str(source), str(out)])
    assert made.exit_code == 0, made.output
    assert json.loads((out / "reference.json").read_text())["torch_difference"] < 1e-4
    told = CliRunner().invoke(
        app, ["agree", str(exact.folder), str(out), "--prompts", "3", "--most", "1e-4", "--json"]
    )
    assert told.exit_code == 0, told.output
    plans = json.loads(told.stdout[told.stdout.index("{") :])["plans"]
    assert plans["stored"]["verdicts"]["differ"] == 0
    with pytest.raises(FileExistsError):
        export_reference(source, out)
    assert load(exact.folder).digest == exact.digest
