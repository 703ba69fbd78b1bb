"""The exported graph computes what torch computes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from guard_quantization.export.decoder import ExportError, Precision, Weights, export_graphs
from guard_quantization.export.int4 import Blocks, quantize_blocks
from guard_quantization.llama import GuardLlama, LlamaShape
from guard_service.engines.expanding import SEVEN_BITS, matrices
from guard_service.engines.graph_files import graph_tensors
from guard_service.engines.plans import EXPANDED, FP32, INT8, PLANS, STORED, graph_file

Arrays = dict[str, NDArray[Any]]
FLOAT = Precision(bits=32, embedding_bits=32)
SHAPE = LlamaShape(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)


def state_of(model: torch.nn.Module) -> Arrays:
    return {name: value.detach().numpy() for name, value in model.state_dict().items()}


def lively(model: torch.nn.Module) -> torch.nn.Module:
    """Weights large enough that attention is far from uniform."""
    torch.manual_seed(3)
    for parameter in model.parameters():
        parameter.data *= 4 if parameter.dim() == 2 else 1
        parameter.data += 0.1 * torch.randn_like(parameter) * (parameter.dim() == 1)
    return model.eval()


class Runner:
    """The exported graph as a function."""

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        weights: Weights,
        precision: Precision,
        head: tuple[int, ...] | None = None,
        plan: str = STORED,
    ) -> None:
        export_graphs(folder, config, weights, head, precision)
        options = onnxruntime.SessionOptions()
        if plan != STORED:
            stored = graph_tensors((folder / graph_file(STORED)).read_bytes())
            tensors = graph_tensors((folder / graph_file(plan)).read_bytes())
            wanted = [tensor for tensor in tensors if tensor.location == EXPANDED]
            made = matrices(folder, {t.name: t for t in stored}, wanted, precision.bits, SEVEN_BITS)
            values = map(onnxruntime.OrtValue.ortvalue_from_numpy, made.values())
            options.add_external_initializers(list(made), list(values))
        self.session = onnxruntime.InferenceSession(str(folder / graph_file(plan)), options)
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.nothing: Arrays = {
            value.name: np.zeros([0 if size == "P" else size for size in value.shape], np.float32)
            for value in self.session.get_inputs()
            if value.name.startswith("past")
        }

    def snapshot(self, prefix: NDArray[np.int64]) -> Arrays:
        feeds = {"ids": prefix[None], "read": np.zeros((1, 1), np.int64), **self.nothing}
        values = dict(zip(self.outputs, self.session.run(self.outputs, feeds), strict=True))
        return {name: values[name.replace("past", "present")] for name in self.nothing}

    def logits(
        self, ids: NDArray[np.int64], read: NDArray[np.int64], past: Arrays | None = None
    ) -> NDArray[np.float32]:
        feeds = {"ids": ids, "read": read, **(past or self.nothing)}
        found: NDArray[np.float32] = self.session.run(["logits"], feeds)[0]
        return found


@pytest.fixture
def batch() -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    rng = np.random.default_rng(0)
    read = np.array([[5, 9], [19, 18], [3, 3], [10, 0], [7, 12]])
    return rng.integers(0, 300, 37), rng.integers(0, 300, (5, 20)), read


def test_float_export_equals_torch_with_and_without_a_snapshot(
    tmp_path: Path, batch: tuple[NDArray[np.int64], ...]
) -> None:
    prefix, rows, read = batch
    model = lively(GuardLlama(SHAPE, head_tokens=11))
    runner = Runner(tmp_path, SHAPE.config(), state_of(model), FLOAT)
    with torch.no_grad():
        wanted = model(*map(torch.from_numpy, batch)).numpy()
    assert wanted.std() > 0.3
    np.testing.assert_allclose(
        runner.logits(rows, read, runner.snapshot(prefix)), wanted, atol=1e-4
    )
    whole = np.concatenate([np.tile(prefix, (5, 1)), rows], axis=1)
    np.testing.assert_allclose(runner.logits(whole, read + len(prefix)), wanted, atol=1e-4)


@pytest.mark.parametrize(
    ("precision", "plan"),
    [
        (FLOAT, STORED),
        (Precision(8, 32, 8), STORED),
        (Precision(4, 32, 4), STORED),
        (Precision(4, 32, 4), INT8),
        (Precision(4, 32, 4), FP32),
    ],
    ids=str,
)
def test_a_row_scores_the_same_alone_and_in_a_batch(
    tmp_path: Path, batch: tuple[NDArray[np.int64], ...], precision: Precision, plan: str
) -> None:
    prefix, rows, read = batch
    state = state_of(lively(GuardLlama(SHAPE, 11)))
    runner = Runner(tmp_path, SHAPE.config(), state, precision, plan=plan)
    past = runner.snapshot(prefix)
    together = runner.logits(rows, read, past)
    for row, places, wanted in zip(rows, read, together, strict=True):
        alone = runner.logits(row[None, : places.max() + 1], places[None], past)
        np.testing.assert_allclose(alone[0], wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("precision", "plan", "most"),
    [
        (Precision(8, 32, 8, 0), STORED, 0.02),
        (Precision(8, 32, 8), STORED, 0.04),
        (Precision(8, 32, 8), FP32, 0.02),
        (Precision(8, 32, 8), INT8, 0.06),
        (Precision(4, 32, 4), STORED, 0.35),
        (Precision(4, 32, 4), FP32, 0.35),
        (Precision(4, 32, 4), INT8, 0.35),
    ],
    ids=str,
)
def test_quantized_logits_stay_near_torch(
    tmp_path: Path,
    batch: tuple[NDArray[np.int64], ...],
    precision: Precision,
    plan: str,
    most: float,
) -> None:
    prefix, rows, read = batch
    model = lively(GuardLlama(SHAPE, head_tokens=11))
    runner = Runner(tmp_path, SHAPE.config(), state_of(model), precision, plan=plan)
    with torch.no_grad():
        wanted = model(*map(torch.from_numpy, batch)).numpy()
    error = runner.logits(rows, read, runner.snapshot(prefix)) - wanted
    assert np.sqrt((error**2).mean()) / wanted.std() < most


def quantized(state: Arrays, bits: int, block: int) -> dict[str, NDArray[Any] | Blocks]:
    """Matrices of the layers and the embedding as blocks, the rest as it is."""
    return {
        name: quantize_blocks(array, bits, block)
        if array.ndim == 2 and name != "lm_head.weight"
        else array
        for name, array in state.items()
    }


@pytest.mark.parametrize("plan", PLANS)
def test_codes_of_a_quantized_checkpoint_are_exported_as_they_are(
    tmp_path: Path, batch: tuple[NDArray[np.int64], ...], plan: str
) -> None:
    _, rows, read = batch
    precision = Precision(4, 32, 4)
    state = state_of(lively(GuardLlama(SHAPE, 11)))
    for folder in ("floats", "codes"):
        (tmp_path / folder).mkdir()
    floats = Runner(tmp_path / "floats", SHAPE.config(), state, precision, plan=plan)
    blocks = quantized(state, 4, 32)
    codes = Runner(tmp_path / "codes", SHAPE.config(), blocks, precision, plan=plan)
    np.testing.assert_allclose(codes.logits(rows, read), floats.logits(rows, read), atol=1e-4)


@pytest.mark.parametrize(
    ("precision", "said"),
    [
        (Precision(4, 64, 4), "4 bits in blocks of 32, the export asks for 4 in blocks of 64"),
        (Precision(8, 32, 4), "4 bits in blocks of 32, the export asks for 8"),
        (Precision(4, 32, 8), "the export asks for 8 in blocks of 64"),
    ],
)
def test_codes_of_another_precision_are_refused(
    tmp_path: Path, precision: Precision, said: str
) -> None:
    weights = quantized(state_of(GuardLlama(SHAPE, 11)), 4, 32)
    with pytest.raises(ValueError, match=said):
        export_graphs(tmp_path, SHAPE.config(), weights, None, precision)


def test_matrices_quantized_unlike_are_refused(tmp_path: Path) -> None:
    state = state_of(GuardLlama(SHAPE, 11))
    name = "model.layers.0.self_attn.k_proj.weight"
    weights = {**quantized(state, 4, 32), name: state[name]}
    with pytest.raises(ExportError, match="quantized alike"):
        export_graphs(tmp_path, SHAPE.config(), weights, None, Precision(4, 32, 4))


def test_what_is_not_a_plain_llama_is_refused(tmp_path: Path) -> None:
    weights = state_of(GuardLlama(SHAPE, 11))
    for change, said in (
        ({"model_type": "mistral"}, "model_type"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "yarn"),
        ({"hidden_size": 80}, "embed_tokens"),
    ):
        folder = tmp_path / said
        folder.mkdir()
        with pytest.raises(ExportError, match=said):
            export_graphs(folder, {**SHAPE.config(), **change}, weights, None, FLOAT)


def test_an_export_is_never_written_over(tmp_path: Path) -> None:
    weights = state_of(GuardLlama(SHAPE, 11))
    parameters = export_graphs(tmp_path, SHAPE.config(), weights, None, FLOAT)
    assert parameters == sum(array.size for array in weights.values())
    with pytest.raises(FileExistsError):
        export_graphs(tmp_path, SHAPE.config(), weights, None, FLOAT)
