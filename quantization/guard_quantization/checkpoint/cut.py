"""Which rows and columns of a Llama's tensors are kept, applied to each tensor as it is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from guard_quantization.checkpoint.importance import Importance
from guard_quantization.checkpoint.tensors import EMBEDDING, HEAD, Tensors, shape_of

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")


@dataclass(frozen=True, slots=True)
class Cut:
    """A smaller Llama inside a checkpoint. Indices are the checkpoint's own, ascending.

    `neurons` and `groups` are by position among the kept layers; empty or None keeps all. `norms`
    are factors on the weights of norms, two for each kept layer and one for the last.
    """

    source: Mapping[str, Any]  # config.json of the checkpoint
    layers: tuple[int, ...]
    neurons: Tensor | None = None  # [kept layers, n]
    groups: Tensor | None = None  # [kept layers, n]
    channels: Tensor | None = None  # [n]
    norms: tuple[float, ...] = ()
    head: tuple[int, ...] = ()  # token ids, in the order of the rows; none: as it was

    @classmethod
    def nothing(cls, config: Mapping[str, Any]) -> Cut:
        """The checkpoint as it is."""
        return cls(config, tuple(range(shape_of(config).layers)))

    def state(self) -> dict[str, Any]:
        """As JSON takes it, without the checkpoint's config; see `of_state`."""
        indices = {name: getattr(self, name) for name in ("neurons", "groups", "channels")}
        return {
            "layers": list(self.layers),
            "norms": list(self.norms),
            **{name: kept.tolist() for name, kept in indices.items() if kept is not None},
        }

    @classmethod
    def of_state(cls, config: Mapping[str, Any], state: Mapping[str, Any]) -> Cut:
        """The cut whose `state` this is, of the checkpoint with this config.json."""
        indices = {name: torch.tensor(kept) for name, kept in state.items()
                   if name in ("neurons", "groups", "channels")}  # fmt: skip
        return cls(config, tuple(state["layers"]), norms=tuple(state["norms"]), **indices)

    def config(self) -> dict[str, Any]:
        """config.json of the smaller Llama; code that a config could name is left behind."""
        old = shape_of(self.source)
        kept = {name: value for name, value in self.source.items() if name != "auto_map"}
        groups = old.kv_heads if self.groups is None else self.groups.shape[1]
        sizes = {
            "num_hidden_layers": len(self.layers),
            "intermediate_size": old.mlp if self.neurons is None else self.neurons.shape[1],
            "num_key_value_heads": groups,
            "num_attention_heads": groups * (old.heads // old.kv_heads),
            "head_dim": old.head_dim,
            "hidden_size": old.hidden if self.channels is None else len(self.channels),
        }
        if self.head:
            sizes |= {"tie_word_embeddings": False, "verdict_head": list(self.head)}
        return {**kept, **sizes}

    def origin(self, name: str) -> str:
        """What the checkpoint calls the tensor that the smaller Llama calls `name`."""
        if name == HEAD and shape_of(self.source).tied:
            return EMBEDDING
        if match := _LAYER.fullmatch(name):
            return f"model.layers.{self.layers[int(match[1])]}.{match[2]}.weight"
        return name

    def read(self, tensors: Tensors, name: str) -> Tensor:
        """The tensor that the smaller Llama calls `name`, in the dtype it is stored in."""
        tensor = tensors.read(self.origin(name))
        match = _LAYER.fullmatch(name)
        if tensor.dim() == 1:
            at = -1 if not match else 2 * int(match[1]) + (match[2] != "input_layernorm")
            return self._norm(tensor, at)
        if not match:
            rows = torch.tensor(self.head) if self.head and name == HEAD else None
            return _taken(tensor, rows, self.channels)
        own = self._own(int(match[1]), match[2])
        if match[2] in ("self_attn.o_proj", "mlp.down_proj"):
            return _taken(tensor, self.channels, own)
        return _taken(tensor, own, self.channels)

    def _norm(self, weight: Tensor, at: int) -> Tensor:
        if not self.norms:
            return weight
        scaled: Tensor = _taken(weight, self.channels).float() * self.norms[at]
        return scaled.to(weight.dtype)

    def _own(self, at: int, part: str) -> Tensor | None:
        """Kept indices of a matrix's own side, which is not the stream's."""
        if part.startswith("mlp."):
            return None if self.neurons is None else self.neurons[at]
        if self.groups is None:
            return None
        old = shape_of(self.source)
        width = old.head_dim
        if part in ("self_attn.q_proj", "self_attn.o_proj"):
            width *= old.heads // old.kv_heads
        return (self.groups[at][:, None] * width + torch.arange(width)).flatten()


def _taken(tensor: Tensor, rows: Tensor | None, columns: Tensor | None = None) -> Tensor:
    if rows is not None:
        tensor = tensor.index_select(0, rows)
    if columns is not None:
        tensor = tensor.index_select(1, columns)
    return tensor


def kept_layers(blocks: Tensor, count: int, first: int, last: int) -> tuple[int, ...]:
    """Drop the layers that change the stream least, but none of the `first` and `last`.

    Raises ValueError when fewer than `count` can stay so.
    """
    total = len(blocks)
    free = range(first, total - last)
    if total - count > len(free):
        raise ValueError(
            f"{count} of {total} layers cannot be kept with {first} and {last} protected"
        )
    order = torch.argsort(blocks[free.start : free.stop], stable=True).tolist()
    dropped = {free[at] for at in order[: total - count]}
    return tuple(at for at in range(total) if at not in dropped)


def largest(values: Tensor, count: int) -> Tensor:
    """Ascending indices of the `count` largest of the last axis; ties keep the earlier."""
    order = torch.argsort(values, dim=-1, descending=True, stable=True)
    return order[..., :count].sort(dim=-1).values


def norm_factors(measured: Importance, channels: Tensor) -> tuple[float, ...]:
    """What makes a norm over fewer channels give those channels what it gave them before.

    A norm divides by the root of the mean square; with a share e of the energy in the kept n of N
    channels that root is sqrt(e * N / n) of what it was.
    """
    share = measured.energy[:, channels].sum(-1) / measured.energy.sum(-1)
    wider = measured.energy.shape[1] / len(channels)
    return tuple((share * wider).sqrt().tolist())


def rounded(width: int, most: int, step: int = 32) -> int:
    """The multiple of `step` at or above `width`, but never more than there is."""
    return min(-(-width // step) * step, most)
