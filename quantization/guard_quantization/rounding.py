"""Layers' weights as 4-bit storage will keep them, while they are trained.

Straight-through (Bengio et al., 2013): the gradient at the rounded weights is applied to the
unrounded ones. The grid is that of `export.int4.quantize_blocks`, whose search for the best scale
of a block is repeated here in torch: a model that got used to another grid would have to get used
to the stored one. Searching costs about as much as a step, so scales are kept for some steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from guard_quantization.export.int4 import SHRINK, SMALLEST_SCALE

_LOW, _HIGH = -8, 7
_CHUNK = 1 << 16  # weights that are searched at once: they stay in the cache of a core


class StoredWeights:
    """The two-dimensional weights of a model's layers, rounded on demand.

    `every`: steps for which scales are kept.
    """

    def __init__(self, model: nn.Module, block: int = 32, every: int = 50) -> None:
        self._weights = [
            parameter
            for name, parameter in model.named_parameters()
            if parameter.dim() == 2 and "layers" in name
        ]
        self._block, self._every = block, every
        self._scales: list[Tensor] = []

    @contextmanager
    def rounded(self, step: int) -> Iterator[None]:
        """The model computes with rounded weights inside the context.

        Scales are searched at multiples of `every`, so that a run that went on from a checkpoint of
        such a step ends as if it had not been interrupted.
        """
        if not self._scales or step % self._every == 0:
            self._scales = [best_scales(weight.data, self._block) for weight in self._weights]
        kept = [weight.data for weight in self._weights]
        try:
            for weight, scales in zip(self._weights, self._scales, strict=True):
                weight.data = round_to(weight.data, scales)
            yield
        finally:
            for weight, data in zip(self._weights, kept, strict=True):
                weight.data = data


def round_to(weight: Tensor, scales: Tensor) -> Tensor:
    """The multiples, -8 to 7, of each block's scale [rows, blocks] that are next to the weights."""
    blocks = weight.view(*scales.shape, -1)
    wide = scales[..., None]
    return ((blocks / wide).round().clamp(_LOW, _HIGH) * wide).view_as(weight)


@torch.no_grad()
def best_scales(weight: Tensor, block: int) -> Tensor:
    """Scales [rows, blocks] that `quantize_blocks` stores for 4 bits and even importance."""
    blocks = weight.reshape(-1, block).float()
    found = [_search(part) for part in blocks.split(max(1, _CHUNK // block))]
    return torch.cat(found).view(len(weight), -1)


def _search(values: Tensor) -> Tensor:
    """Best scale [blocks, 1] of values [blocks, block]."""
    extreme = values.gather(-1, values.abs().argmax(-1, keepdim=True))
    best_error = torch.full_like(extreme, torch.inf)
    best_scale = torch.zeros_like(extreme)
    for end in (_LOW, _LOW + 1):
        for shrink in SHRINK.tolist():
            scale = _storable(extreme * shrink / end)
            for _ in range(2):
                codes = (values / scale).round_().clamp_(_LOW, _HIGH)
                error = (codes * scale - values).square_().sum(-1, keepdim=True)
                better = error < best_error
                best_error = torch.where(better, error, best_error)
                best_scale = torch.where(better, scale, best_scale)
                norm = codes.square().sum(-1, keepdim=True)
                fitted = (codes * values).sum(-1, keepdim=True) / norm.clamp(min=1)
                scale = _storable(torch.where(norm > 0, fitted, scale))
    return best_scale


def _storable(scale: Tensor) -> Tensor:
    size = scale.abs().clamp(min=float(SMALLEST_SCALE))
    return torch.where(scale < 0, -size, size).half().float()
