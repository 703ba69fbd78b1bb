"""Transformers' model as the engine runs it: rows behind what is known of them, in one pass."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from guard_service.engines.snapshots import Past, Snapshot
from guard_service.engines.torch.pixels import Tiles


class TensorSnapshot(Snapshot):
    """A Snapshot of tensors."""

    @staticmethod
    def _joined(pieces: Sequence[Any]) -> Any:
        return torch.cat(list(pieces), dim=2)


@dataclass(frozen=True, slots=True)
class Sight:
    """What a model keeps of an image: all that prompts with it need, whatever their policy.

    `cross` has the keys and values that text attends to, of the tiles that are used. `start` is the
    state behind the image's own token: the few tokens before it are every prompt's.
    """

    cross: Past
    tiles: int  # that are used
    start: Snapshot

    @property
    def size(self) -> int:
        """Bytes held."""
        return self.start.size + sum(int(tensor.nbytes) for tensor in self.cross.values())


class Decoder:
    """Runs rows of tokens. For one thread at a time.

    Rows of a run are padded at their ends: no token looks at what stands behind it, so padding
    changes nothing, and positions are right as they are.
    """

    def __init__(self, model: Any) -> None:
        self._base, self._head = model.model, model.lm_head
        text = getattr(self._base, "language_model", self._base)
        # Transformers 5.24 renamed the argument.
        known = inspect.signature(type(self._base).forward).parameters
        self._cache_argument = "cache" if "cache" in known else "past_key_values"
        self._device = text.embed_tokens.weight.device
        self._cross = frozenset(getattr(text, "cross_attention_layers", ()))
        layers = {at: layer for at, layer in enumerate(text.layers) if at not in self._cross}
        config, dtype = text.config, text.norm.weight.dtype
        heads = config.num_key_value_heads
        width = getattr(config, "head_dim", 0) or config.hidden_size // config.num_attention_heads
        self.nothing: Past = {
            f"{kind}.{at}": torch.empty(
                (1, heads, 0, width), dtype=dtype, device=layer.input_layernorm.weight.device
            )
            for at, layer in layers.items()
            for kind in "kv"
        }

    def rows_of_head(self, tokens: Sequence[int]) -> Tensor:
        """The output layer's rows of these tokens [tokens, hidden], in float32."""
        return self._head.weight[list(tokens)].float()

    def run(
        self, rows: Sequence[Sequence[int]], past: Past, sight: Sight | None = None
    ) -> tuple[Tensor, DynamicCache]:
        """Hidden states [rows, longest, hidden] before the output layer, and the cache behind them.

        `past` stands before every row; with `sight`, it reaches behind the image.
        """
        count, cache, seen = len(rows), DynamicCache(), {}
        for held in (past, sight.cross if sight is not None else {}):
            for name in held:
                kind, layer = name.split(".")
                if kind == "k" and held[name].shape[2]:
                    keys, values = (held[f"{k}.{layer}"].expand(count, -1, -1, -1) for k in "kv")
                    cache.update(keys, values, int(layer))
        if sight is not None:  # all see all of it; without a mask transformers takes a causal one
            shape = (1, max(map(len, rows)), 1, sight.tiles)
            seen["cross_attention_mask"] = torch.ones(shape, dtype=torch.int64).to(self._device)
        return self._forward(rows, cache, seen)

    def look(self, row: Sequence[int], tiles: Tiles, image_at: int) -> tuple[Tensor, DynamicCache]:
        """As `run`, of one whole row, with an image that its token at `image_at` stands for."""
        sees = torch.zeros((1, len(row), 1, tiles.mask.shape[-1]), dtype=torch.int64)
        sees[:, image_at:, :, : tiles.count] = 1
        seen = {name: tensor.to(self._device) for name, tensor in tiles.inputs().items()}
        seen["cross_attention_mask"] = sees.to(self._device)
        return self._forward([row], DynamicCache(), seen)

    def present(self, cache: DynamicCache, start: int, end: int) -> Past:
        """Keys and values of text in a cache of one row, from position `start` to `end`; copies."""
        own = [at for at in range(len(cache.layers)) if at not in self._cross]
        return self._taken(cache, slice(start, end), own)

    def cross(self, cache: DynamicCache, tiles: Tiles) -> Past:
        """Keys and values of an image in a cache that `look` gave, of the tiles that are used.

        The others are masked for all text but what stands before the image's token.
        """
        any_layer = cache.layers[min(self._cross)].keys
        used = any_layer.shape[2] // tiles.mask.shape[-1] * tiles.count
        return self._taken(cache, slice(used), sorted(self._cross))

    def logits(self, hidden: Tensor, head: Tensor) -> Tensor:
        """Logits of the head's rows, in float32, on the CPU."""
        return F.linear(hidden.to(head.device).float(), head).cpu()

    def all_logits(self, hidden: Tensor) -> Tensor:
        """Logits of every token, in float32, on the CPU."""
        return self._head(hidden).float().cpu()

    def _forward(
        self, rows: Sequence[Sequence[int]], cache: DynamicCache, seen: Mapping[str, Any]
    ) -> tuple[Tensor, DynamicCache]:
        ids = torch.zeros((len(rows), max(map(len, rows))), dtype=torch.int64)
        for at, row in enumerate(rows):
            ids[at, : len(row)] = torch.tensor(row)
        known = {self._cache_argument: cache, "use_cache": True, **seen}
        return self._base(input_ids=ids.to(self._device), **known).last_hidden_state, cache

    def _taken(self, cache: DynamicCache, part: slice, layers: Sequence[int]) -> Past:
        taken: dict[str, Any] = {}
        for at in layers:
            taken[f"k.{at}"] = cache.layers[at].keys[:, :, part].clone()
            taken[f"v.{at}"] = cache.layers[at].values[:, :, part].clone()
        return taken
