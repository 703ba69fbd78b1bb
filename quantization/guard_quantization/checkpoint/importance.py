"""What the parts of a Llama do on calibration rows: blocks, neurons, groups of heads, channels.

Everything comes from one pass and is kept as running sums; no activations are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from guard_quantization.training import batches


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of token ids, right-padded: with causal attention nothing looks at the padding."""

    ids: Tensor  # int64 [B, L]
    lengths: Tensor  # int64 [B]
    rows: tuple[int, ...]  # which of the rows these are

    @property
    def mask(self) -> Tensor:
        """True where there is a token, [B, L]."""
        return torch.arange(self.ids.shape[1]) < self.lengths[:, None]


def batched(rows: Sequence[Sequence[int]], tokens: int) -> list[Batch]:
    """Batches of at most `tokens` padded tokens, in an order that depends on the rows alone."""
    made = []
    for chosen in batches(range(len(rows)), [len(row) for row in rows], tokens, seed=0):
        lengths = torch.tensor([len(rows[at]) for at in chosen])
        ids = torch.zeros(len(chosen), int(lengths.max()), dtype=torch.int64)
        for line, at in zip(ids, chosen, strict=True):
            line[: len(rows[at])] = torch.tensor(rows[at])
        made.append(Batch(ids, lengths, tuple(chosen)))
    return made


@dataclass(frozen=True, slots=True)
class Importance:
    """How much each part matters; float64, larger is more. Only ratios within a row mean anything.

    - blocks [layers]: 1 - mean cosine of what goes into a layer and what comes out, over all tokens
      (ShortGPT, Men et al., 2024, eq. 1).
    - neurons [layers, mlp]: activation silu(gate) * up; groups [layers, kv_heads]: norm of what the
      heads of a key-value group put out; channels [hidden]: output of RMSNorm, summed over all
      norms. Each is the mean of absolute values over a row's tokens, then the L2 norm over rows
      (Minitron, Muralidharan et al., 2024, section 2.2).
    - energy [2 * layers + 1, hidden]: each channel's mean share of the sum of squares that a norm
      divides by, for each layer's two norms in turn and for the last.
    """

    blocks: Tensor
    neurons: Tensor
    groups: Tensor
    channels: Tensor
    energy: Tensor


@torch.no_grad()
def measure(
    model: LlamaForCausalLM,
    rows: Sequence[Batch],
    done: Callable[[int], None] = lambda count: None,
) -> Importance:
    """Run the rows once; `done` is told how many batches are through. The head is not run."""
    sums = _Sums(model)
    with sums.watching(model):
        for count, batch in enumerate(rows, 1):
            sums.begin(batch)
            model.model(input_ids=batch.ids, use_cache=False)
            done(count)
    return sums.result()


class _Sums:
    """Running sums of one pass, filled by hooks."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        config = model.config
        layers, hidden = config.num_hidden_layers, config.hidden_size
        self.kv_heads = config.num_key_value_heads
        self.cosines = _zeros(layers)
        self.neurons = _zeros(layers, config.intermediate_size)
        self.groups = _zeros(layers, self.kv_heads)
        self.channels = _zeros(2 * layers + 1, hidden)
        self.energy = _zeros(2 * layers + 1, hidden)
        self.rows = self.tokens = 0

    def begin(self, batch: Batch) -> None:
        """Every hook until the next call is about this batch."""
        self.mask = batch.mask
        self.share = self.mask.float() / batch.lengths[:, None]  # a row's tokens sum to 1
        self.rows += len(batch.lengths)
        self.tokens += int(batch.lengths.sum())

    @contextmanager
    def watching(self, model: LlamaForCausalLM) -> Iterator[None]:
        """Hooks on every layer, taken off again at the end."""
        hooks = []
        for at, layer in enumerate(model.model.layers):
            hooks += [
                layer.register_forward_hook(self._block(at)),
                layer.mlp.down_proj.register_forward_pre_hook(self._neurons(at)),
                layer.self_attn.o_proj.register_forward_pre_hook(self._groups(at)),
                layer.input_layernorm.register_forward_hook(self._norm(2 * at)),
                layer.post_attention_layernorm.register_forward_hook(self._norm(2 * at + 1)),
            ]
        hooks.append(model.model.norm.register_forward_hook(self._norm(-1)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def result(self) -> Importance:
        """What was summed up."""
        return Importance(
            blocks=1 - self.cosines / self.tokens,
            neurons=self.neurons.sqrt(),
            groups=self.groups.sqrt(),
            channels=self.channels.sqrt().sum(0),
            energy=self.energy / self.rows,
        )

    def _means(self, values: Tensor) -> Tensor:
        """Mean over each row's tokens: [B, L, n] to [B, n]."""
        return torch.bmm(self.share[:, None], values.float())[:, 0].double()

    def _block(self, at: int) -> Callable[..., None]:
        def hook(module: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
            after = output[0] if isinstance(output, tuple) else output
            cosine = F.cosine_similarity(inputs[0].double(), after.double(), dim=-1)
            self.cosines[at] += (cosine * self.mask).sum()

        return hook

    def _neurons(self, at: int) -> Callable[..., None]:
        def hook(module: Any, inputs: tuple[Tensor, ...]) -> None:
            self.neurons[at] += self._means(inputs[0].abs()).square().sum(0)

        return hook

    def _groups(self, at: int) -> Callable[..., None]:
        def hook(module: Any, inputs: tuple[Tensor, ...]) -> None:
            grouped = inputs[0].float().unflatten(-1, (self.kv_heads, -1))
            self.groups[at] += self._means(grouped.norm(dim=-1)).square().sum(0)

        return hook

    def _norm(self, at: int) -> Callable[..., None]:
        def hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self.channels[at] += self._means(output.abs()).square().sum(0)
            squares = inputs[0].float().square()
            total = squares.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
            self.energy[at] += self._means(squares / total).sum(0)

        return hook


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.float64)
