"""The quantize stage: folders in and out, resumed to the same bytes, bad input refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from guard_quantization.checkpoint.layerwise import Chunk, Passage, chunks
from guard_quantization.checkpoint.quantize import (
    QuantizedCheckpoint,
    QuantizeError,
    QuantizePlan,
    quantize_checkpoint,
)
from guard_quantization.checkpoint.quantized import QUANTIZATION_FILE
from guard_quantization.export.decoder import ExportError, Shape
from guard_quantization.export.int4 import Blocks, quantize_blocks
from guard_quantization.training import Report
from tests.quantization.verdict_tokenizer import verdict_ranks

LAYERS, WIDTH, VOCAB = 2, 64, 90
PLAN = QuantizePlan(block=32, embedding_bits=8, rows=24)
NEAREST = replace(PLAN, method="nearest")
MATRIX = "model.layers.1.mlp.down_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
Made = tuple[Path, dict[str, Any]]


def build(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=72,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rope_theta=10000.0,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        tie_word_embeddings=tied,
        initializer_range=0.15,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():  # few causes seen through all channels: correlated inputs
        table = model.model.embed_tokens.weight
        table.copy_(torch.randn(VOCAB, 8) @ torch.randn(8, WIDTH) * 0.3 + 0.05 * table)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
    return model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("float")
    build().save_pretrained(folder, max_shard_size="60KB")
    (folder / "tokenizer.model").write_bytes(verdict_ranks())
    return folder


@pytest.fixture(scope="module")
def gptq(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A finished folder and its figures."""
    folder = tmp_path_factory.mktemp("made") / "gptq"
    return folder, quantize_checkpoint(source, folder, PLAN, calibration())


@pytest.fixture(scope="module")
def nearest(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The same without GPTQ."""
    folder = tmp_path_factory.mktemp("made") / "nearest"
    return folder, quantize_checkpoint(source, folder, NEAREST, calibration())


def calibration(rows: int = 24) -> list[list[int]]:
    rng = np.random.default_rng(8)
    return [rng.integers(0, VOCAB, rng.integers(5, 40)).tolist() for _ in range(rows)]


def dequantized(folder: Path) -> LlamaForCausalLM:
    """What a quantized folder computes, in transformers."""
    checkpoint = QuantizedCheckpoint(folder)
    config = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig.from_dict(config)).eval()
    state = {}
    for name in model.state_dict():
        tensor = checkpoint[name]
        floats = tensor.dequantize() if isinstance(tensor, Blocks) else tensor
        state[name] = torch.from_numpy(floats)
    model.load_state_dict(state)
    return model


def loss_of_logits(found: LlamaForCausalLM, rows: list[list[int]]) -> float:
    """Relative error of the logits on these rows."""
    wanted = build()
    with torch.no_grad():
        pairs = [(found(ids).logits, wanted(ids).logits) for ids in map(batch, rows)]
    lost = sum(float((a - b).square().sum()) for a, b in pairs)
    return float((lost / sum(float(b.square().sum()) for _, b in pairs)) ** 0.5)


def batch(row: list[int]) -> torch.Tensor:
    return torch.tensor([row])


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


class Interrupted(Exception):
    """What a test raises in place of Ctrl-C."""


def stopping_at(step: int) -> Callable[[str, int], Report]:
    class Stopping(Report):
        def at(self, done: int, note: str) -> None:
            if done == step:
                raise Interrupted

    return Stopping


def test_the_forward_is_that_of_transformers() -> None:
    model = build()
    rows = calibration(5)
    passage = Passage(Shape.of(model.config.to_dict()), 64)
    table = model.model.embed_tokens.weight.detach()
    states = [Chunk(table[torch.from_numpy(ids)], lengths) for ids, lengths in chunks(rows)]
    for layer in model.model.layers:

        def settle(group: tuple[str, ...], inputs: Any, layer: Any = layer) -> list[torch.Tensor]:
            return [layer.get_submodule(name).weight.detach() for name in group]

        norms = (
            layer.input_layernorm.weight.detach(),
            layer.post_attention_layernorm.weight.detach(),
        )
        passage.through(states, norms, settle)
    with torch.no_grad():
        wanted = [model.model(batch(row), output_hidden_states=True) for row in rows]
        found = torch.cat([chunk.states for chunk in states])
        normed = model.model.norm(found)
    torch.testing.assert_close(
        normed, torch.cat([one.last_hidden_state[0] for one in wanted]), atol=1e-4, rtol=1e-4
    )


def test_a_folder_of_codes_and_scales_comes_out(source: Path, gptq: Made) -> None:
    folder, figures = gptq
    checkpoint = QuantizedCheckpoint(folder)
    matrix = checkpoint[MATRIX]
    assert isinstance(matrix, Blocks) and matrix.shape == (WIDTH, 72)
    assert matrix.codes.shape == (WIDTH, 3, 32)
    norm = checkpoint["model.layers.1.input_layernorm.weight"]
    assert isinstance(norm, np.ndarray) and norm.dtype == np.float32
    assert isinstance(checkpoint["lm_head.weight"], np.ndarray)
    table = checkpoint[EMBEDDING]
    assert isinstance(table, Blocks)
    wanted = quantize_blocks(build().state_dict()[EMBEDDING].numpy(), 8, WIDTH)
    np.testing.assert_array_equal(table.codes, wanted.codes)
    settings = json.loads((folder / QUANTIZATION_FILE).read_text())
    assert settings["plan"]["method"] == "gptq" and settings["rotation"] == "none"
    assert settings["tensors"][MATRIX] == {"bits": 4, "columns": 72}
    assert (folder / "tokenizer.model").read_bytes() == verdict_ranks()
    assert [layer["layer"] for layer in figures["layers"]] == list(range(LAYERS))
    assert figures["mib"] < 0.5 * figures["mib_before"]
    assert not list(folder.parent.glob(".*"))


def test_gptq_with_propagation_beats_rounding(gptq: Made, nearest: Made) -> None:
    fresh = calibration(40)[24:]
    for folder, figures in (gptq, nearest):
        for layer in figures["layers"]:
            assert set(layer["int8_inputs"]) == {
                *("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
            }
            for errors in layer["matrices"].values():
                assert 0 < errors["error"] <= errors["nearest"] < 0.2
                assert folder.name == "gptq" or errors["error"] == errors["nearest"]
    lost = [loss_of_logits(dequantized(folder), fresh) for folder, _ in (gptq, nearest)]
    assert lost[0] < 0.9 * lost[1]


def test_rounding_needs_no_rows(source: Path, tmp_path: Path) -> None:
    plan = replace(PLAN, method="nearest", bits=8, embedding_bits=32, block=64)
    figures = quantize_checkpoint(source, tmp_path / "int8", plan)
    assert figures["layers"][0]["int8_inputs"] == {}
    assert figures["layers"][1]["matrices"]["mlp.up_proj"]["error"] < 0.01
    assert isinstance(QuantizedCheckpoint(tmp_path / "int8")[EMBEDDING], np.ndarray)
    assert loss_of_logits(dequantized(tmp_path / "int8"), calibration(8)) < 0.04


def test_a_rotated_folder_computes_the_same(source: Path, tmp_path: Path) -> None:
    plan = replace(NEAREST, bits=8, rotate=True, seed=4)
    quantize_checkpoint(source, tmp_path / "turned", plan)
    assert loss_of_logits(dequantized(tmp_path / "turned"), calibration(8)) < 0.05
    checkpoint = QuantizedCheckpoint(tmp_path / "turned")
    norm, table = checkpoint["model.norm.weight"], checkpoint[EMBEDDING]
    assert isinstance(norm, np.ndarray) and (norm == 1).all()
    assert isinstance(table, Blocks) and table.codes.shape == (VOCAB, 1, WIDTH)


def test_a_tied_checkpoint_gets_a_head_of_its_own(tmp_path: Path) -> None:
    build(tied=True).save_pretrained(tmp_path / "tied")
    plan = replace(NEAREST, embedding_bits=4)
    figures = quantize_checkpoint(tmp_path / "tied", tmp_path / "out", plan)
    checkpoint = QuantizedCheckpoint(tmp_path / "out")
    assert checkpoint.config["tie_word_embeddings"] is False
    table = build(tied=True).state_dict()[EMBEDDING].numpy()
    np.testing.assert_array_equal(checkpoint["lm_head.weight"], table)
    blocks, wanted = checkpoint[EMBEDDING], quantize_blocks(table, 4, 32)
    assert isinstance(blocks, Blocks)
    np.testing.assert_array_equal(blocks.dequantize(), wanted.dequantize())
    lost = np.linalg.norm(wanted.dequantize() - table) / np.linalg.norm(table)
    assert figures["embedding"]["error"] == pytest.approx(lost, rel=1e-4)


@pytest.mark.parametrize("step", [1, 2, LAYERS + 2])
def test_an_interrupted_run_ends_in_the_same_bytes(
    source: Path, gptq: Made, tmp_path: Path, step: int
) -> None:
    with pytest.raises(Interrupted):
        quantize_checkpoint(source, tmp_path / "cut", PLAN, calibration(), stopping_at(step))
    assert not (tmp_path / "cut").exists()
    kept = {file.name: file.stat().st_mtime_ns for file in (tmp_path / ".cut.work").iterdir()}
    assert len(kept) == step + 1
    figures = quantize_checkpoint(source, tmp_path / "cut", PLAN, calibration())
    assert figures == gptq[1]
    assert contents(tmp_path / "cut") == contents(gptq[0])
    for name, time in kept.items():  # what was finished was not made again
        assert (tmp_path / "cut" / name).stat().st_mtime_ns == time


def test_parts_of_another_run_are_not_taken(source: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        quantize_checkpoint(source, tmp_path / "out", PLAN, calibration(), stopping_at(1))
    for plan, rows in ((replace(PLAN, damping=0.1), calibration()), (PLAN, calibration()[1:])):
        with pytest.raises(QuantizeError, match="remove it"):
            quantize_checkpoint(source, tmp_path / "out", plan, rows)


def test_a_result_is_never_written_over(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="never written over"):
        quantize_checkpoint(source, tmp_path / "out", PLAN, calibration())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bits", 3),
        ("block", 48),
        ("embedding_bits", 16),
        ("method", "best"),
        ("rows", 0),
        ("damping", 0.0),
        ("seed", -1),
        ("tokens", 1),
        ("embedding_bits", 4.5),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_by_field(
    source: Path, tmp_path: Path, field: str, value: Any
) -> None:
    with pytest.raises(QuantizeError, match=f"quantize.{field}"):
        quantize_checkpoint(source, tmp_path / "x", replace(PLAN, **{field: value}), calibration())
    assert not list(tmp_path.iterdir())


def test_a_block_wider_than_the_table_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantizeError, match="quantize.block is 128, the width 64"):
        quantize_checkpoint(source, tmp_path / "x", QuantizePlan(), calibration())


@pytest.mark.parametrize(
    ("rows", "told"), [([], "needs calibration"), ([[1], [VOCAB]], "row 1"), ([[]], "row 0")]
)
def test_rows_that_do_not_fit_are_refused(
    source: Path, tmp_path: Path, rows: list[list[int]], told: str
) -> None:
    with pytest.raises(QuantizeError, match=told):
        quantize_checkpoint(source, tmp_path / "x", PLAN, rows)


def test_long_rows_keep_their_first_token_and_their_end(source: Path, tmp_path: Path) -> None:
    plan = replace(NEAREST, tokens=10)
    long = quantize_checkpoint(source, tmp_path / "long", plan, [[7, *range(60)]])
    cut = quantize_checkpoint(source, tmp_path / "cut", plan, [[7, *range(51, 60)]])
    whole = quantize_checkpoint(source, tmp_path / "whole", NEAREST, [[7, *range(60)]])
    assert long == cut != whole


def spoil(source: Path, folder: Path, value: float) -> Path:
    """A copy of `source` with one weight of MATRIX changed."""
    shutil.copytree(source, folder)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if MATRIX in tensors:
            tensors[MATRIX][3, 5] = value
            save_file(tensors, file, {"format": "pt"})
    return folder


def test_the_room_that_is_asked_for_is_what_the_parts_take(
    source: Path, nearest: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(path.stat().st_size for path in nearest[0].glob("*.safetensors"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size))
    quantize_checkpoint(source, tmp_path / "fits", NEAREST, calibration())
    headers = 8192  # that parts have besides, and that are not asked for
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size - headers))
    with pytest.raises(OSError, match="make room"):
        quantize_checkpoint(source, tmp_path / "large", NEAREST, calibration())
    assert not [path for path in tmp_path.iterdir() if path.name != "fits"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_weights_that_no_scale_holds_are_named(source: Path, tmp_path: Path, value: float) -> None:
    folder = spoil(source, tmp_path / "spoilt", value)
    with pytest.raises(ExportError, match=MATRIX):
        quantize_checkpoint(folder, tmp_path / "out", NEAREST)
    assert not (tmp_path / "out").exists()


def test_activations_that_overflow_are_told(tmp_path: Path) -> None:
    model = build()
    with torch.no_grad():
        for layer in model.model.layers[:2]:
            layer.post_attention_layernorm.weight.fill_(3e30)
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(QuantizeError, match="not finite"):
        quantize_checkpoint(tmp_path / "source", tmp_path / "out", PLAN, calibration())


def test_transformers_refuses_the_folder(nearest: Made) -> None:
    with pytest.raises(ValueError, match="quant_method"):
        AutoModelForCausalLM.from_pretrained(nearest[0])


def damage(folder: Path, what: str) -> None:
    settings = json.loads((folder / QUANTIZATION_FILE).read_text())
    index = folder / "model.safetensors.index.json"
    if what == "format":
        settings["format"] = 99
    elif what == "bits":
        settings["tensors"][MATRIX]["bits"] = 8
    elif what == "columns":
        settings["tensors"][MATRIX]["columns"] = 10**9
    elif what == "outside":
        index.write_text(json.dumps({"weight_map": {"x": "../y.safetensors"}}))
    elif what == "cut":
        part = folder / "layer-001.safetensors"
        part.write_bytes(part.read_bytes()[:200])
    (folder / QUANTIZATION_FILE).write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("format", "format"),
        ("bits", MATRIX),
        ("columns", MATRIX),
        ("outside", "weight_map"),
        ("cut", "layer-001"),
    ],
)
def test_a_damaged_folder_is_refused_by_name(
    nearest: Made, tmp_path: Path, what: str, told: str
) -> None:
    shutil.copytree(nearest[0], tmp_path / "out")
    damage(tmp_path / "out", what)
    with pytest.raises(ExportError, match=told):
        QuantizedCheckpoint(tmp_path / "out")[MATRIX]


def test_missing_tensors_are_named(nearest: Made) -> None:
    checkpoint = QuantizedCheckpoint(nearest[0])
    assert MATRIX in checkpoint and "x" not in checkpoint
    with pytest.raises(ExportError, match="no tensor x"):
        checkpoint["x"]
