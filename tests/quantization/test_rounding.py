"""Weights rounded in training are those that are stored, and come back afterwards."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from guard_quantization.export.int4 import quantize_blocks
from guard_quantization.llama import GuardLlama, LlamaShape
from guard_quantization.rounding import StoredWeights, best_scales, round_to

NAME = "model.layers.1.mlp.down_proj.weight"


def llama() -> GuardLlama:
    torch.manual_seed(0)
    return GuardLlama(LlamaShape(40, 64, 96, 2, 2, 2, head_dim=32, max_position_embeddings=64), 5)


@pytest.mark.parametrize("block", [32, 64])
def test_training_sees_what_storage_keeps(block: int) -> None:
    torch.manual_seed(1)
    weight = torch.randn(48, 192) * torch.rand(48, 1)
    weight[3] = 0
    seen = round_to(weight, best_scales(weight, block))
    stored = torch.from_numpy(quantize_blocks(weight.numpy(), 4, block).dequantize())
    assert torch.allclose(seen, stored, atol=1e-6)
    extreme = weight.view(-1, block).abs().amax(-1) / 8
    plain = round_to(weight, extreme.clamp(min=1e-6).view(48, -1))
    assert (seen - weight).square().sum() < 0.9 * (plain - weight).square().sum()


def test_layers_are_rounded_inside_the_context_and_come_back() -> None:
    model = llama()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    with pytest.raises(RuntimeError), StoredWeights(model).rounded(0):
        now = dict(model.named_parameters())
        assert max(len(block.unique()) for block in now[NAME].detach().reshape(-1, 32)) <= 16
        assert not torch.equal(now[NAME], before[NAME])
        assert torch.equal(now["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
        raise RuntimeError
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_scales_are_kept_between_searches_and_a_resumed_run_searches_where_the_first_did() -> None:
    model = llama()
    weight = dict(model.named_parameters())[NAME]
    whole, resumed = (StoredWeights(model, every=4) for _ in range(2))
    seen = {}
    for step in range(3, 10):
        weight.data *= 1.01
        with whole.rounded(step):
            seen[step] = weight.detach().clone()
        if step >= 8:
            with resumed.rounded(step):
                assert torch.equal(weight, seen[step])
    grids = [np.abs(one.numpy()[0, :32]) for one in seen.values()]
    steps = [np.min(grid[grid > 0]) for grid in grids]
    assert len(set(steps)) == 3  # searched at 3, 4 and 8
