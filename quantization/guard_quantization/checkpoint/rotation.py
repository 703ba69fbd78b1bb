"""Outliers rotated away inside the weights: the same function of the same tokens, easier to round.

A Llama's residual stream may be multiplied by any orthogonal matrix R1 if whatever writes to it is
turned and whatever reads from it is turned back: RMSNorm does not notice once its scale has been
folded into the layers behind it (QuaRot, Ashkboos et al., 2024; R1 of SpinQuant, Liu et al., 2024).
A randomised Hadamard matrix spreads a channel that is far larger than the others over all of them.
A second rotation R2 does the same for the values of each key-value head, between v_proj and o_proj.
Both are in the weights afterwards: nothing is added at run time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from guard_quantization.checkpoint.tensors import EMBEDDING, HEAD, NORM
from guard_quantization.export.decoder import Shape

Floats = NDArray[np.float32]
_NORM_OF = {
    "q_proj": "input_layernorm",
    "k_proj": "input_layernorm",
    "v_proj": "input_layernorm",
    "gate_proj": "post_attention_layernorm",
    "up_proj": "post_attention_layernorm",
}
_ROWS = 8192  # of a table, in float64 at once


def hadamard(width: int) -> Tensor | None:
    """A matrix of +1 and -1 with orthogonal rows [width, width], None where none is known here.

    Sylvester's doubling of a core of size 1 or one that Paley's constructions give.
    """
    core, doublings = width, 0
    found = _core(core)
    while found is None and core % 2 == 0:
        core, doublings = core // 2, doublings + 1
        found = _core(core)
    if found is None:
        return None
    for _ in range(doublings):
        found = torch.cat((torch.cat((found, found), 1), torch.cat((found, -found), 1)))
    return found


def orthogonal(width: int, *seed: int) -> Tensor:
    """A random orthogonal matrix [width, width] in float64.

    Hadamard with random signs where there is one of that width, else uniform over all orthogonal
    matrices (QR of a normal matrix; Mezzadri, 2007).
    """
    rng = np.random.default_rng(seed)
    found = hadamard(width)
    if found is not None:
        signs = torch.from_numpy(rng.choice([-1.0, 1.0], width))
        return signs[:, None] * found / width**0.5
    q, r = torch.linalg.qr(torch.from_numpy(rng.standard_normal((width, width))))
    return q * r.diagonal().sign()


class FloatWeights(Protocol):
    """Tensors by their Hugging Face names, read one at a time."""

    def __getitem__(self, name: str, /) -> Floats: ...


class Rotated:
    """A checkpoint seen through rotations: tensors by name, computed in float64 when asked for.

    Norms are ones, and there is always a head of its own: the folded norm keeps it from being the
    embedding. `config` says so.
    """

    def __init__(self, weights: FloatWeights, config: Mapping[str, Any], seed: int) -> None:
        self._weights, self._shape, self._seed = weights, Shape.of(config), seed
        self._stream = orthogonal(self._shape.hidden, seed)
        self.config = {**config, "tie_word_embeddings": False}

    def __getitem__(self, name: str) -> Floats:
        if name == EMBEDDING:
            return turn_inputs(self._weights[name], None, self._stream)
        if name == HEAD:
            table = self._weights[EMBEDDING if self._shape.tied else HEAD]
            return turn_inputs(table, self._weights[NORM], self._stream)
        kind = name.removesuffix(".weight").rpartition(".")[2]
        weight = self._weights[name]
        if kind in ("norm", *_NORM_OF.values()):
            return np.ones_like(weight)
        layer = int(name.removeprefix("model.layers.").partition(".")[0])
        if kind == "o_proj":
            weight = turn_mixed(weight, self._heads(layer, self._shape.heads))
        if kind in ("o_proj", "down_proj"):
            return turn_outputs(weight, self._stream)
        norm = self._weights[f"model.layers.{layer}.{_NORM_OF[kind]}.weight"]
        turned = turn_inputs(weight, norm, self._stream)
        if kind == "v_proj":
            turned = turn_values(turned, self._heads(layer, self._shape.kv_heads))
        return turned

    def _heads(self, layer: int, count: int) -> Tensor:
        """R2 for each of `count` heads [count, d, d]; queries share that of their values."""
        s = self._shape
        own = [orthogonal(s.head_dim, self._seed, layer, head) for head in range(s.kv_heads)]
        return torch.stack(own).repeat_interleave(count // s.kv_heads, 0)


def turn_inputs(weight: Floats, norm: Floats | None, turn: Tensor) -> Floats:
    """weight [rows, width] reading x @ turn, with the scale of the norm before it folded in."""
    scale = 1.0 if norm is None else torch.from_numpy(norm).double()
    turned = np.empty_like(weight, np.float32)
    for at in range(0, len(weight), _ROWS):
        part = torch.from_numpy(weight[at : at + _ROWS]).double()
        turned[at : at + _ROWS] = ((part * scale) @ turn).numpy()
    return turned


def turn_outputs(weight: Floats, turn: Tensor) -> Floats:
    """weight [width, columns] writing y @ turn instead of y."""
    turned: Floats = (turn.T @ torch.from_numpy(weight).double()).float().numpy()
    return turned


def turn_values(weight: Floats, heads: Tensor) -> Floats:
    """v_proj [kv_heads * d, hidden] writing each head's values turned by heads [kv_heads, d, d]."""
    split = torch.from_numpy(weight).double().view(*heads.shape[:2], -1)
    turned: Floats = (heads.mT @ split).reshape(weight.shape).float().numpy()
    return turned


def turn_mixed(weight: Floats, heads: Tensor) -> Floats:
    """o_proj [hidden, heads * d] reading each head turned by heads [heads, d, d]."""
    split = torch.from_numpy(weight).double().view(len(weight), *heads.shape[:2])
    turned = torch.einsum("ohd,hde->ohe", split, heads).reshape(weight.shape)
    floats: Floats = turned.float().numpy()
    return floats


def _core(size: int) -> Tensor | None:
    """A Hadamard matrix of size 1, q + 1 (q = 3 mod 4) or 2 (q + 1) (q = 1 mod 4), q prime."""
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    q = size - 1
    if q % 4 == 3 and _prime(q):
        bordered = _bordered(q)
        bordered[1:, 0] = -1
        return bordered + torch.eye(size, dtype=torch.float64)
    q = size // 2 - 1
    if size % 4 == 0 and q % 4 == 1 and _prime(q):
        one = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        zero = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        eye = torch.eye(q + 1, dtype=torch.float64)
        return torch.kron(_bordered(q), one) + torch.kron(eye, zero)
    return None


def _bordered(q: int) -> Tensor:
    """Which differences are squares modulo q, with a row and a column of ones [q + 1, q + 1]."""
    symbol = torch.full((q,), -1.0, dtype=torch.float64)
    symbol[[i * i % q for i in range(1, q)]] = 1
    symbol[0] = 0
    index = torch.arange(q)
    whole = torch.ones(q + 1, q + 1, dtype=torch.float64)
    whole[0, 0] = 0
    whole[1:, 1:] = symbol[(index[:, None] - index[None]) % q]
    return whole


def _prime(number: int) -> bool:
    return number > 1 and all(number % k for k in range(2, int(number**0.5) + 1))
