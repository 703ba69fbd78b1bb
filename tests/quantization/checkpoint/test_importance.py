"""Importance equals what float64 arithmetic over whole activations says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from guard_quantization.checkpoint.importance import Importance, batched, measure
from tests.quantization.tiny_llama import random_rows, tiny_llama

ROWS = random_rows(7, 300)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(scope="module")
def measured(model: LlamaForCausalLM) -> Importance:
    found: Importance = measure(model, batched(ROWS, 64))
    return found


class Kept:
    """Activations of each row, alone and in float64."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        double = tiny_llama().double()
        double.load_state_dict(model.double().state_dict())
        model.float()
        self.seen: list[dict[str, tuple[Tensor, Tensor]]] = []
        for name, module in double.named_modules():
            module.register_forward_hook(self._keep(name))
        with torch.no_grad():
            for row in ROWS:
                self.seen.append({})
                double(torch.tensor([row]))

    def _keep(self, name: str):  # type: ignore[no-untyped-def]
        def hook(module: object, inputs: tuple[Tensor, ...], output: object) -> None:
            if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
                self.seen[-1][name] = inputs[0][0], output[0]

        return hook

    def mean_then_norm(self, values: list[Tensor]) -> Tensor:
        """Mean over a row's tokens, L2 norm over rows: [tokens, n] each, to [n]."""
        return torch.stack([value.mean(0) for value in values]).square().sum(0).sqrt()


@pytest.fixture(scope="module")
def kept(model: LlamaForCausalLM) -> Kept:
    return Kept(model)


def test_blocks_are_one_minus_the_mean_cosine_over_all_tokens(
    measured: Importance, kept: Kept
) -> None:
    for layer in range(4):
        pairs = [seen[f"model.layers.{layer}"] for seen in kept.seen]
        cosines = torch.cat([
            (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt() for a, b in pairs
        ])  # fmt: skip
        assert measured.blocks[layer].item() == pytest.approx(1 - cosines.mean().item(), abs=1e-6)
    assert measured.blocks.std() > 0.01


def test_neurons_are_the_norm_over_rows_of_mean_activations(
    measured: Importance, kept: Kept
) -> None:
    for layer in range(4):
        inputs = [seen[f"model.layers.{layer}.mlp.down_proj"][0].abs() for seen in kept.seen]
        torch.testing.assert_close(
            measured.neurons[layer], kept.mean_then_norm(inputs), rtol=1e-4, atol=1e-7
        )


def test_groups_are_the_norm_of_their_heads_outputs(measured: Importance, kept: Kept) -> None:
    for layer in range(4):
        outputs = [seen[f"model.layers.{layer}.self_attn.o_proj"][0] for seen in kept.seen]
        norms = [
            torch.stack([out[:, at : at + 32].square().sum(-1).sqrt() for at in (0, 32, 64)], -1)
            for out in outputs
        ]
        torch.testing.assert_close(
            measured.groups[layer], kept.mean_then_norm(norms), rtol=1e-4, atol=1e-7
        )


def test_channels_are_summed_over_every_norm(measured: Importance, kept: Kept) -> None:
    names = [name for name in kept.seen[0] if name.endswith("norm")]
    assert len(names) == 9
    wanted = sum(
        (kept.mean_then_norm([seen[name][1].abs() for seen in kept.seen]) for name in names),
        torch.zeros(64, dtype=torch.float64),
    )
    torch.testing.assert_close(measured.channels, wanted, rtol=1e-4, atol=1e-7)


def test_energy_is_each_channels_share_of_what_a_norm_divides_by(
    measured: Importance, kept: Kept
) -> None:
    inputs = [seen["model.layers.2.post_attention_layernorm"][0].square() for seen in kept.seen]
    shares = torch.stack([(x / x.sum(-1, keepdim=True)).mean(0) for x in inputs]).mean(0)
    torch.testing.assert_close(measured.energy[5], shares, rtol=1e-4, atol=1e-7)


def test_batches_change_nothing(model: LlamaForCausalLM, measured: Importance) -> None:
    alone = measure(model, batched(ROWS, 1))
    for name in ("blocks", "neurons", "groups", "channels", "energy"):
        torch.testing.assert_close(
            getattr(alone, name), getattr(measured, name), rtol=1e-4, atol=1e-6
        )


def test_a_measured_model_keeps_no_hooks(model: LlamaForCausalLM, measured: Importance) -> None:
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_progress_counts_batches(model: LlamaForCausalLM) -> None:
    told: list[int] = []
    measure(model, batched(ROWS[:3], 1), told.append)
    assert told == [1, 2, 3]
