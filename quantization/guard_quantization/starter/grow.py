"""A trained Llama made deeper and wider without changing what it computes.

Layers: behind each layer stand copies of it that add nothing yet, as their output projections are
zero (block expansion, LLaMA Pro: Wu et al., 2024). Neurons: new ones read the stream at random and
write nothing yet (function-preserving widening after Net2Net: Chen et al., 2016). The gradient
reaches the zeros first and all else from the second step on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from guard_quantization.llama import LlamaShape

_WRITERS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
_READERS = ("mlp.gate_proj.weight", "mlp.up_proj.weight")


def grown(
    state: Mapping[str, Tensor], before: LlamaShape, after: LlamaShape, seed: int
) -> dict[str, Tensor]:
    """The state dict of a GuardLlama of shape `after` that computes what `state` computes.

    Layers and neurons may become more; copies spread evenly over the layers. Raises ValueError
    where anything else differs, or shrinks.
    """
    layers, width = after.num_hidden_layers, after.intermediate_size
    if layers < before.num_hidden_layers or width < before.intermediate_size:
        raise ValueError("a model cannot grow to fewer layers or neurons than it has")
    same = replace(before, num_hidden_layers=layers, intermediate_size=width)
    if same != after:
        raise ValueError("a model grows in layers and neurons only; the rest must be the source's")
    rng = torch.Generator().manual_seed(seed)
    made = {name: tensor for name, tensor in state.items() if ".layers." not in name}
    done = -1
    for at in range(layers):
        origin = at * before.num_hidden_layers // layers
        copied, done = origin == done, origin
        prefix = f"model.layers.{origin}."
        for name in (name for name in state if name.startswith(prefix)):
            short = name.removeprefix(prefix)
            tensor = torch.zeros_like(state[name]) if copied and short in _WRITERS else state[name]
            made[f"model.layers.{at}.{short}"] = _widened(short, tensor, width, rng)
    return made


def _widened(short: str, tensor: Tensor, width: int, rng: torch.Generator) -> Tensor:
    if short in _READERS:
        shape = (width - tensor.shape[0], tensor.shape[1])
        return torch.cat((tensor, torch.randn(shape, generator=rng) * tensor.std()))
    if short == _WRITERS[1]:
        return torch.cat((tensor, tensor.new_zeros(tensor.shape[0], width - tensor.shape[1])), 1)
    return tensor.clone()
