"""A Llama decoder for training guards: rows share one prefix, the head reads verdicts."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """Geometry, with the field names of a Hugging Face Llama config."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 64
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048

    def config(self) -> dict[str, Any]:
        """The config.json of a Hugging Face Llama of this geometry."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "rope_scaling": None,
            **asdict(self),
        }


class RMSNorm(nn.Module):
    """Root mean square norm with a learnt scale (Zhang and Sennrich, 2019)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


def rope_tables(shape: LlamaShape, positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions [positions, head_dim / 2] (RoFormer, Su, 2021)."""
    half = shape.head_dim // 2
    frequencies = shape.rope_theta ** (-torch.arange(half, dtype=torch.float32) / half)
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * frequencies[None]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x [batch, heads, length, head_dim] by cos, sin [length, head_dim / 2], halves paired."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def _gather(x: Tensor, read: Tensor) -> Tensor:
    """Positions read [B, R] of x [B, length, width]."""
    return x.gather(1, read[..., None].expand(-1, -1, x.shape[-1]))


class Attention(nn.Module):
    """Grouped-query attention; keys and values of a shared prefix stand before the row's own."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.shape = shape
        width, head = shape.hidden_size, shape.head_dim
        self.q_proj = nn.Linear(width, shape.num_attention_heads * head, bias=False)
        self.k_proj = nn.Linear(width, shape.num_key_value_heads * head, bias=False)
        self.v_proj = nn.Linear(width, shape.num_key_value_heads * head, bias=False)
        self.o_proj = nn.Linear(shape.num_attention_heads * head, width, bias=False)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor,
        past: tuple[Tensor, Tensor] | None,
        read: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        batch, length, _ = x.shape
        head = self.shape.head_dim
        k = rotate(self.k_proj(x).view(batch, length, -1, head).transpose(1, 2), cos, sin)
        asking = x if read is None else _gather(x, read)
        q = self.q_proj(asking).view(batch, asking.shape[1], -1, head).transpose(1, 2)
        if read is not None:  # [B, 1, R, ...]
            cos, sin, mask = cos[read][:, None], sin[read][:, None], mask[read][:, None]
        q = rotate(q, cos, sin)
        v = self.v_proj(x).view(batch, length, -1, head).transpose(1, 2)
        own = (k, v)
        if past is not None:
            k = torch.cat((past[0].expand(batch, -1, -1, -1), k), dim=2)
            v = torch.cat((past[1].expand(batch, -1, -1, -1), v), dim=2)
        groups = self.shape.num_attention_heads // self.shape.num_key_value_heads
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o_proj(out.transpose(1, 2).reshape(batch, asking.shape[1], -1)), own


class MLP(nn.Module):
    """SwiGLU (Shazeer, 2020)."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Block(nn.Module):
    """One decoder layer."""

    def __init__(self, shape: LlamaShape, dropout: float) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = MLP(shape)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor,
        past: tuple[Tensor, Tensor] | None,
        read: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """With `read` [B, R], only those positions ask and go on: [B, R, width]."""
        attended, own = self.self_attn(self.input_layernorm(x), cos, sin, mask, past, read)
        x = (x if read is None else _gather(x, read)) + self.dropout(attended)
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x))), own


class GuardLlama(nn.Module):
    """Llama whose output layer is cut to the verdict tokens, with the state dict of the original.

    `head_tokens` is how many rows the output layer keeps.
    """

    def __init__(self, shape: LlamaShape, head_tokens: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.shape = shape
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(shape.vocab_size, shape.hidden_size),
                "layers": nn.ModuleList(
                    Block(shape, dropout) for _ in range(shape.num_hidden_layers)
                ),
                "norm": RMSNorm(shape.hidden_size, shape.rms_norm_eps),
            }
        )
        self.lm_head = nn.Linear(shape.hidden_size, head_tokens, bias=False)
        self.embed_dropout = nn.Dropout(dropout)
        cos, sin = rope_tables(shape, shape.max_position_embeddings)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self._init()

    def _init(self) -> None:
        deep = 0.02 / math.sqrt(2 * self.shape.num_hidden_layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                scale = deep if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
                nn.init.normal_(parameter, std=scale)

    def pool_last(self) -> None:
        """Begin with a last layer whose attention adds twice the mean of all positions.

        A verdict is read at one position; to start from a bag of words costs nothing and saves the
        steps in which attention would learn to gather them. Needs as many value channels as the
        stream is wide; raises ValueError otherwise.
        """
        last = self.model["layers"][-1].self_attn  # type: ignore[index]
        if last.v_proj.weight.shape[0] != self.shape.hidden_size:
            raise ValueError("pooling needs num_key_value_heads * head_dim == hidden_size")
        nn.init.eye_(last.v_proj.weight)
        nn.init.eye_(last.o_proj.weight)
        last.o_proj.weight.data *= 2

    def _run(
        self,
        ids: Tensor,
        start: int,
        past: list[tuple[Tensor, Tensor]] | None,
        read: Tensor | None = None,
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        length = ids.shape[1]
        cos, sin = self.cos[start : start + length], self.sin[start : start + length]
        mask = torch.ones(length, start + length, dtype=torch.bool).tril(start)
        x = self.embed_dropout(self.model["embed_tokens"](ids))
        if torch.is_autocast_enabled("cpu"):
            x = x.to(torch.get_autocast_dtype("cpu"))
        kept = []
        for i, block in enumerate(self.model["layers"]):  # type: ignore[arg-type]
            last = i == self.shape.num_hidden_layers - 1
            x, own = block(x, cos, sin, mask, past[i] if past else None, read if last else None)
            kept.append(own)
        return x, kept

    def states(self, prefix: Tensor, rows: Tensor, read: Tensor) -> Tensor:
        """Normalised hidden states [B, R, width] in front of the output layer; see `forward`."""
        _, past = self._run(prefix[None], 0, None)
        hidden, _ = self._run(rows, prefix.shape[0], past, read)
        picked: Tensor = self.model["norm"](hidden)
        return picked

    def forward(self, prefix: Tensor, rows: Tensor, read: Tensor) -> Tensor:
        """Logits of the verdict tokens.

        prefix [P] tokens that all rows share; rows [B, L] right-padded (padding is never looked
        back at); read [B, R] positions within a row. Returns [B, R, head_tokens] in float32.
        """
        logits: Tensor = self.lm_head(self.states(prefix, rows, read)).float()
        return logits
