"""A grown model computes what it grew from, and every part of it learns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from guard_quantization.llama import GuardLlama, LlamaShape
from guard_quantization.starter.grow import grown

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
    made.load_state_dict(grown(small().state_dict(), SMALL, LARGE, seed))
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


@pytest.mark.parametrize(
    ("after", "told"),
    [
        (replace(LARGE, num_hidden_layers=1), "fewer layers or neurons"),
        (replace(LARGE, intermediate_size=64), "fewer layers or neurons"),
        (replace(LARGE, hidden_size=96), "layers and neurons only"),
    ],
)
def test_what_cannot_grow_is_told(after: LlamaShape, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        grown(small().state_dict(), SMALL, after, 0)
