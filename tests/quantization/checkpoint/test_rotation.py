"""Rotations: the same logits from weights and activations that are easier to round."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from guard_quantization.checkpoint.rotation import Rotated, hadamard, orthogonal
from guard_quantization.export.int4 import quantize_blocks

Floats = NDArray[np.float32]
VOCAB = 60


def build(width: int, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(width)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.rand_like(parameter) + 0.5)
    return model


def plant_outliers(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Two channels that are far larger than the others, as large Llamas have."""
    with torch.no_grad():
        model.model.embed_tokens.weight[:, [3, 17]] *= 40
    return model


def tensors(model: LlamaForCausalLM) -> dict[str, Floats]:
    return {name: value.float().numpy() for name, value in model.state_dict().items()}


def rotated(model: LlamaForCausalLM, seed: int) -> LlamaForCausalLM:
    view = Rotated(tensors(model), model.config.to_dict(), seed)
    turned = LlamaForCausalLM(LlamaConfig.from_dict(view.config)).eval()
    turned.load_state_dict({name: torch.from_numpy(view[name]) for name in turned.state_dict()})
    return turned


def logits(model: LlamaForCausalLM) -> Tensor:
    ids = torch.from_numpy(np.random.default_rng(4).integers(0, VOCAB, (3, 20)))
    with torch.no_grad():
        return model(ids).logits


def read_by(model: LlamaForCausalLM, part: str) -> Floats:
    """What a linear layer gets to see [tokens, width]."""
    seen: list[Tensor] = []

    def keep(module: Any, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].detach().flatten(0, -2))

    handle = model.get_submodule(part).register_forward_pre_hook(keep)
    logits(model)
    handle.remove()
    floats: Floats = seen[0].numpy()
    return floats


@pytest.mark.parametrize("width", [1, 2, 4, 8, 12, 20, 24, 28, 36, 40, 48, 64, 96, 320, 1536])
def test_hadamard_matrices_are_of_signs_and_orthogonal(width: int) -> None:
    found = hadamard(width)
    assert found is not None and found.shape == (width, width)
    assert found.abs().eq(1).all()
    assert (found @ found.T).equal(width * torch.eye(width, dtype=torch.float64))


@pytest.mark.parametrize("width", [3, 6, 50])
def test_there_is_none_of_some_widths(width: int) -> None:
    assert hadamard(width) is None


@pytest.mark.parametrize("width", [16, 48, 50])
def test_rotations_are_orthogonal_and_follow_their_seed(width: int) -> None:
    one, again, other = orthogonal(width, 1, 2), orthogonal(width, 1, 2), orthogonal(width, 1, 3)
    torch.testing.assert_close(one @ one.T, torch.eye(width, dtype=torch.float64))
    assert one.equal(again) and not one.equal(other)


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**63),
    width=st.sampled_from([32, 48, 50]),
    tied=st.booleans(),
)
def test_logits_do_not_change(seed: int, width: int, tied: bool) -> None:
    model = build(width, tied)
    wanted = logits(model)
    assert wanted.std() > 0.5
    torch.testing.assert_close(logits(rotated(model, seed)), wanted, atol=1e-4, rtol=1e-4)


def test_norms_are_folded_and_the_stream_is_turned() -> None:
    model = build(48)
    view = Rotated(tensors(model), model.config.to_dict(), 0)
    for name in ("model.norm.weight", "model.layers.1.input_layernorm.weight"):
        assert (view[name] == 1).all() and view[name].shape == (48,)
    before = model.model.embed_tokens.weight.detach().numpy()
    after = view["model.embed_tokens.weight"]
    np.testing.assert_allclose(after @ after.T, before @ before.T, atol=1e-5)
    assert np.abs(after - before).max() > 0.1


def test_a_rotated_checkpoint_has_a_head_of_its_own() -> None:
    model = build(48, tied=True)
    view = Rotated(tensors(model), model.config.to_dict(), 0)
    assert view.config["tie_word_embeddings"] is False
    assert not np.allclose(view["lm_head.weight"], view["model.embed_tokens.weight"])


def test_outliers_of_activations_are_spread() -> None:
    model = plant_outliers(build(48))
    plain = read_by(model, "model.layers.0.self_attn.q_proj")
    turned = read_by(rotated(model, 1), "model.layers.0.self_attn.q_proj")

    def peak(x: Floats) -> float:
        return float((np.abs(x).max(1) / np.sqrt((x**2).mean(1))).mean())

    def kurtosis(x: Floats) -> float:
        centred = x - x.mean()
        return float((centred**4).mean() / (centred**2).mean() ** 2)

    assert peak(turned) < 0.6 * peak(plain)
    assert kurtosis(turned) < 0.25 * kurtosis(plain)


def test_int8_activations_of_one_scale_lose_less() -> None:
    model = plant_outliers(build(48))

    def error(x: Floats) -> float:
        scale = np.abs(x).max() / 127
        return float(np.linalg.norm(np.rint(x / scale) * scale - x) / np.linalg.norm(x))

    name = "model.layers.0.self_attn.q_proj"
    assert error(read_by(rotated(model, 1), name)) < 0.7 * error(read_by(model, name))


@pytest.mark.parametrize("part", ["q_proj", "v_proj"])
def test_int4_weights_with_outliers_lose_less(part: str) -> None:
    model = build(64)
    with torch.no_grad():  # norms that make up for the channels that the stream makes large
        model.model.layers[0].input_layernorm.weight[[3, 17]] *= 30
    name = f"model.layers.0.self_attn.{part}.weight"
    norm = model.model.layers[0].input_layernorm.weight.detach().numpy()
    folded = tensors(model)[name] * norm
    turned = Rotated(tensors(model), model.config.to_dict(), 2)[name]

    def error(weight: Floats) -> float:
        difference = quantize_blocks(weight, 4, 32).dequantize() - weight
        return float(np.linalg.norm(difference) / np.linalg.norm(weight))

    assert error(turned) < 0.6 * error(folded)
