"""A BERT sentence encoder written anew as a Llama decoder, as a start for training a small guard.

Both are residual networks of attention and a gated or plain MLP; what differs is folded into weights:

- BERT normalises after each sublayer (post-LN), Llama before it (RMSNorm). Between norms BERT's state
  is an affine function of a purely additive stream if the standard deviations are taken as constant:
  h = M x with x = [z, c], z in the zero-mean subspace (one dimension less than the width) and c
  a constant channel in the freed dimension. Biases, and layer norm's beta, are columns for c.
- GELU(u) is about u * sigmoid(1.702 u) (Hendrycks and Gimpel, 2016), so SwiGLU with a constant `up`
  is BERT's MLP; neurons that matter least are pruned, their mean becomes a constant.
- Queries and keys are rewritten per head in the basis that orders their products by energy; the
  weakest pairs get the fastest rotations of RoPE, where position will scramble them.

What is lost (exact layer norm, position embeddings, sight of later tokens) training has to heal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertModel

from guard_quantization.llama import LlamaShape

GELU_SLOPE = 1.702
_CONSTANT = 1.0


@dataclass
class _Stream:
    """h = m @ x for x = [z, c]; `basis` [width, width - 1] spans the zero-mean subspace."""

    m: Tensor
    basis: Tensor

    def read(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The matrix that gives weight @ h + bias from x."""
        folded = weight @ self.m
        if bias is not None:
            folded[:, -1] += bias / _CONSTANT
        return folded

    def write(self, weight: Tensor) -> Tensor:
        """The matrix that adds weight @ v to h, by adding to x."""
        z = torch.linalg.solve(self.basis.T @ self.m[:, :-1], self.basis.T @ weight)
        return torch.cat((z, torch.zeros(1, weight.shape[1])))

    def add_constant(self, vector: Tensor) -> None:
        """h + vector from now on."""
        self.m[:, -1] += vector / _CONSTANT

    def normalise(self, std: float, gamma: Tensor, beta: Tensor) -> None:
        """h becomes layer_norm(h) with its standard deviation taken as `std`."""
        projected = self.basis @ (self.basis.T @ self.m)
        self.m = gamma[:, None] * projected / std
        self.add_constant(beta)


def _zero_mean_basis(width: int) -> Tensor:
    ones = torch.ones(width, 1)
    eye = torch.eye(width)[:, : width - 1]
    q, _ = torch.linalg.qr(torch.cat((ones, eye), 1))
    return q[:, 1:]


def token_streams(encoder: BertModel, vectors: Tensor) -> Tensor:
    """Embedding rows [N, width] of the decoder from word embeddings [N, width] of the encoder."""
    layer = encoder.embeddings
    constant = layer.position_embeddings.weight[1:33].mean(0) + layer.token_type_embeddings.weight[0]
    normed = F.layer_norm(vectors + constant, (vectors.shape[1],))
    z = normed @ _zero_mean_basis(vectors.shape[1])
    return torch.cat((z, torch.full((len(z), 1), _CONSTANT)), 1)


@torch.inference_mode()
def transplant(
    encoder: BertModel, ids: Tensor, mask: Tensor, shape: LlamaShape
) -> dict[str, Tensor]:
    """State dict of a GuardLlama (without embeddings and head) of `shape` from an encoder.

    ids, mask [B, L]: sample texts that stand for the encoder's inputs; statistics come from them.
    """
    width = shape.hidden_size
    states = encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    real = mask.bool()
    real[:, 0] = False  # [CLS] is the encoder's attention sink: an outlier in every statistic
    basis = _zero_mean_basis(width)
    embed = encoder.embeddings.LayerNorm
    stream = _Stream(embed.weight[:, None] * basis, basis)
    stream.m = torch.cat((stream.m, embed.bias[:, None] / _CONSTANT), 1)
    x = token_streams(encoder, encoder.embeddings.word_embeddings(ids[real]))
    result: dict[str, Tensor] = {}
    for n in range(shape.num_hidden_layers):
        layer, h = encoder.encoder.layer[n], states[n][real]
        name = f"model.layers.{n}"
        attended = layer.attention.self(states[n], _wide(mask, states[n]))[0][real]
        result |= _attention(layer, stream, x, h, shape, name)
        x = x + attended_write(result, name, layer, attended)
        out = layer.attention.output
        stream.add_constant(out.dense.weight @ layer.attention.self.value.bias + out.dense.bias)
        before = h + F.linear(attended, out.dense.weight, out.dense.bias)
        stream.normalise(_std(before), out.LayerNorm.weight, out.LayerNorm.bias)
        h = out.LayerNorm(before)
        mlp, x = _mlp(layer, stream, x, h, shape, name)
        result |= mlp
        before = h + layer.output.dense(layer.intermediate(h))
        stream.normalise(_std(before), layer.output.LayerNorm.weight, layer.output.LayerNorm.bias)
    result["model.norm.weight"] = torch.ones(width)
    result["readout"] = stream.m * _rms(x)
    return result


def attended_write(result: dict[str, Tensor], name: str, layer: torch.nn.Module, v: Tensor) -> Tensor:
    """What the attention of sample tokens adds to the stream; v [N, width] with the value bias."""
    bias = layer.attention.self.value.bias  # type: ignore[union-attr]
    return F.linear(v - bias, result[f"{name}.self_attn.o_proj.weight"])


def _wide(mask: Tensor, like: Tensor) -> Tensor:
    return (1 - mask[:, None, None, :].to(like.dtype)) * torch.finfo(like.dtype).min


def _std(h: Tensor) -> float:
    return float(h.std(-1, unbiased=False).median())


def _rms(x: Tensor) -> float:
    return float(x.square().mean(-1).sqrt().median())


def _normed(folded: list[Tensor], x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Split matrices that read x into an RMSNorm scale and balanced weights."""
    joint = torch.cat(folded) * _rms(x)
    scale = joint.norm(dim=0).clamp(min=1e-4)
    scale = scale / scale.mean()
    return scale, [matrix * _rms(x) / scale for matrix in folded]


def _attention(
    layer: torch.nn.Module, stream: _Stream, x: Tensor, h: Tensor, shape: LlamaShape, name: str
) -> dict[str, Tensor]:
    own = layer.attention.self  # type: ignore[union-attr]
    q = stream.read(own.query.weight, own.query.bias)
    k = stream.read(own.key.weight, own.key.bias)
    v = stream.read(own.value.weight, None)
    for head in range(shape.num_attention_heads):
        rows = slice(head * shape.head_dim, (head + 1) * shape.head_dim)
        q[rows], k[rows] = _ordered(q[rows], k[rows], x)
    scale, (q, k, v) = _normed([q, k, v], x)
    return {
        f"{name}.input_layernorm.weight": scale,
        f"{name}.self_attn.q_proj.weight": q,
        f"{name}.self_attn.k_proj.weight": k,
        f"{name}.self_attn.v_proj.weight": v,
        f"{name}.self_attn.o_proj.weight": stream.write(layer.attention.output.dense.weight),  # type: ignore[union-attr]
    }


def _ordered(q: Tensor, k: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The same products q.k, in a basis ordered by energy, weakest pair first in both halves."""
    size = len(q)

    def root(matrix: Tensor) -> Tensor:
        values = x @ matrix.T
        return torch.linalg.cholesky(values.T @ values / len(x) + 1e-6 * torch.eye(size))

    lq, lk = root(q), root(k)
    u, s, vt = torch.linalg.svd(lq.T @ lk)
    q = s.sqrt()[:, None] * (u.T @ torch.linalg.solve(lq, q))
    k = s.sqrt()[:, None] * (vt @ torch.linalg.solve(lk, k))
    weak_first = torch.arange(size - 1, -1, -1)
    order = torch.cat((weak_first[0::2], weak_first[1::2]))
    return q[order], k[order]


def _mlp(
    layer: torch.nn.Module, stream: _Stream, x: Tensor, h: Tensor, shape: LlamaShape, name: str
) -> tuple[dict[str, Tensor], Tensor]:
    inner, outer = layer.intermediate.dense, layer.output.dense  # type: ignore[union-attr]
    active = F.gelu(F.linear(h, inner.weight, inner.bias))
    weight = active.std(0) * outer.weight.norm(dim=0)
    keep = weight.argsort(descending=True)[: shape.intermediate_size].sort().values
    lost = torch.ones(len(weight), dtype=torch.bool)
    lost[keep] = False
    gate = stream.read(inner.weight[keep], inner.bias[keep]) * GELU_SLOPE
    up = torch.zeros_like(gate)
    up[:, -1] = 1 / GELU_SLOPE / _CONSTANT
    scale, (gate, up) = _normed([gate, up], x)
    down = stream.write(outer.weight[:, keep])
    moved = x + F.linear(active[:, keep], down)
    stream.add_constant(outer.bias + outer.weight[:, lost] @ active[:, lost].mean(0))
    return {
        f"{name}.post_attention_layernorm.weight": scale,
        f"{name}.mlp.gate_proj.weight": gate,
        f"{name}.mlp.up_proj.weight": up,
        f"{name}.mlp.down_proj.weight": down,
    }, moved
