"""Calibration rows on their way through a Llama, whose weights are settled layer by layer.

The forward is our own rather than transformers' LlamaDecoderLayer: a layer's four groups of linear
layers must be settled one after the other, each from the inputs that the settled ones before it
give. Written as four steps over chunks of tokens that takes one pass and no hooks, no padding and
no copy of the activations; with modules it takes a pass for each group. The rotary frequencies are
the exporter's, so that calibration sees what is served.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from guard_quantization.export.decoder import Shape
from guard_quantization.llama import rotate

# Linear layers that read the same inputs, in the order in which data meets them.
GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
NORMS = ("input_layernorm", "post_attention_layernorm")
_CHUNK_TOKENS = 4096

# Given a group and the inputs it reads, chunk by chunk, the float weights to go on with.
Settle = Callable[[tuple[str, ...], Iterable[Tensor]], Sequence[Tensor]]


@dataclass(slots=True)
class Chunk:
    """Some rows, one behind the other without padding: states [tokens, hidden] in float32."""

    states: Tensor
    lengths: tuple[int, ...]


def chunks(rows: Sequence[Sequence[int]]) -> Iterator[tuple[NDArray[np.int64], tuple[int, ...]]]:
    """Token ids and lengths of chunks of whole rows, about 4,096 tokens each."""
    held: list[Sequence[int]] = []
    for at, row in enumerate(rows):
        held.append(row)
        if sum(map(len, held)) >= _CHUNK_TOKENS or at == len(rows) - 1:
            yield np.concatenate([np.array(one, np.int64) for one in held]), tuple(map(len, held))
            held = []


class Passage:
    """Takes chunks through layers; what a layer makes of them replaces what it was given."""

    def __init__(self, shape: Shape, longest: int) -> None:
        self.shape = shape
        angles = torch.arange(longest)[:, None] * torch.tensor(shape.frequencies)[None]
        self._cos, self._sin = angles.cos(), angles.sin()  # [longest, head_dim / 2]

    @torch.inference_mode()
    def through(self, rows: Sequence[Chunk], norms: tuple[Tensor, Tensor], settle: Settle) -> None:
        """One decoder layer with the scales of its two norms and the weights that `settle` gives.

        Inputs of a group are computed when `settle` asks for them, and again to go on.
        """

        def normed(chunk: Chunk, which: int) -> Tensor:
            return F.rms_norm(chunk.states, norms[which].shape, norms[which], self.shape.eps)

        q, k, v = settle(GROUPS[0], (normed(chunk, 0) for chunk in rows))

        def mixed(chunk: Chunk) -> Tensor:
            x = normed(chunk, 0)
            return self._attend(x @ q.T, x @ k.T, x @ v.T, chunk.lengths)

        (o,) = settle(GROUPS[1], map(mixed, rows))
        for chunk in rows:
            chunk.states = chunk.states + mixed(chunk) @ o.T
        gate, up = settle(GROUPS[2], (normed(chunk, 1) for chunk in rows))

        def gated(chunk: Chunk) -> Tensor:
            x = normed(chunk, 1)
            return F.silu(x @ gate.T) * (x @ up.T)

        (down,) = settle(GROUPS[3], map(gated, rows))
        for chunk in rows:
            chunk.states = chunk.states + gated(chunk) @ down.T

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
        """Causal attention within each row: [tokens, heads * head_dim]."""
        out = [
            self._attend_row(*parts)
            for parts in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
        ]
        return torch.cat(out)

    def _attend_row(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cos, sin = self._cos[: len(q)], self._sin[: len(q)]

        def heads(x: Tensor) -> Tensor:  # [1, heads, length, head_dim]
            return x.view(1, len(x), -1, self.shape.head_dim).transpose(1, 2)

        out = F.scaled_dot_product_attention(
            rotate(heads(q), cos, sin),
            rotate(heads(k), cos, sin),
            heads(v),
            is_causal=True,
            enable_gqa=True,
        )
        return out.transpose(1, 2).reshape(len(q), -1)
