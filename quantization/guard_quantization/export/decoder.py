"""A Llama as ONNX graphs that read verdicts: written node by node, weights streamed to disk.

There is one graph for each kernel plan, and one file of weights for all. A graph scores a batch of
rows that share one prefix, whose keys and values come from an earlier run ("snapshot"). Inputs and
outputs, for B rows of L tokens, a prefix of P, R reads per row:

    ids         int64 [B, L]                right-padded; nothing looks at padding
    read        int64 [B, R]                positions in the row at which logits are wanted
    past_k.i    float [1, kv_heads, P, d]   keys of layer i; P may be 0
    past_v.i    float [1, kv_heads, P, d]
    logits      float [B, R, H]             for the H head tokens only
    present_k.i, present_v.i               of the rows, laid out as the past; free if not fetched

Tokens of all rows are one dimension, T = B * L, but in attention, which is plain operators with
the queries of a group folded into the length so that its keys are not repeated: as fast as
GroupQueryAttention, which takes no batch behind a past. A row's numbers do not depend on the other
rows. In the last layer only the positions that are read have queries and an MLP.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, TensorProto, helper

from guard_quantization.export.graph import DATA_FILE, ROTARY, Graph, Tensors
from guard_quantization.export.int4 import Blocks, floats, stack
from guard_quantization.export.layers import (
    Linear,
    Matrix,
    Precision,
    embedding,
    store_matrix,
    store_table,
)
from guard_service.engines.plans import STORED, graph_file

__all__ = ["MODEL_FILE", "ExportError", "Precision", "Shape", "Weights", "export_graphs"]

Floats = NDArray[np.float32]
MODEL_FILE = graph_file(STORED)
EMBEDDING, HEAD = "embedding", "lm_head"
EMBEDDING_WEIGHT = "model.embed_tokens.weight"
_OPSET = 18
_IR_VERSION = 9


class ExportError(ValueError):
    """A checkpoint that this exporter cannot turn into a graph; the text says why."""


class Weights(Protocol):
    """Tensors by their Hugging Face names, read one at a time; matrices may be quantized."""

    def __getitem__(self, name: str, /) -> Floats | Blocks: ...


@dataclass(frozen=True, slots=True)
class Shape:
    """What the graph needs of a Hugging Face Llama config."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    eps: float
    tied: bool
    frequencies: tuple[float, ...]  # rotary, [head_dim / 2]

    @property
    def wide(self) -> int:
        """Width of all queries side by side."""
        return self.heads * self.head_dim

    @property
    def narrow(self) -> int:
        """Width of all keys, or values, side by side."""
        return self.kv_heads * self.head_dim

    @property
    def group(self) -> int:
        """Queries that share a key."""
        return self.heads // self.kv_heads

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape:
        """Read config.json. Raises ExportError for what is not a plain Llama."""
        for key, wanted in (
            ("model_type", "llama"),
            ("hidden_act", "silu"),
            ("attention_bias", False),
            ("mlp_bias", False),
        ):
            if config.get(key, wanted) != wanted:
                raise ExportError(f"config.json: {key} is {config[key]!r}, must be {wanted!r}")
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        return cls(
            hidden=config["hidden_size"],
            mlp=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            vocab=config["vocab_size"],
            eps=config.get("rms_norm_eps", 1e-6),
            tied=bool(config.get("tie_word_embeddings", False)),
            frequencies=tuple(rotary_frequencies(config, head_dim).tolist()),
        )


def rotary_frequencies(config: Mapping[str, Any], head_dim: int) -> Floats:
    """Angle per position of each rotated pair, with Llama 3's scaling of long wavelengths.

    Wavelengths above original_max / low are stretched by `factor`, those below original_max / high
    are kept, and between them the two are blended (Llama 3.1's published rule).
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    theta = np.float32(config.get("rope_theta", 10000.0))
    plain: Floats = (1.0 / theta**exponents).astype(np.float32)
    scaling = config.get("rope_scaling")
    if not scaling:
        return plain
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind == "default":
        return plain
    if kind != "llama3":
        raise ExportError(f"config.json: rope_scaling type {kind!r} is not supported")
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * plain / (2 * math.pi)
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    scaled: Floats = ((1 - blend) * plain / scaling["factor"] + blend * plain).astype(np.float32)
    return scaled


def export_graphs(
    folder: Path,
    config: Mapping[str, Any],
    weights: Weights,
    head: Sequence[int] | None,
    precision: Precision,
) -> int:
    """Write a graph for each kernel plan and model.onnx.data into `folder`.

    Returns how many parameters they hold. `head` are the token ids whose logits are wanted, in
    order; None when the checkpoint's output layer is already cut to them. Holds one layer of float
    weights at a time. Raises ExportError for weights that do not fit the config, FileExistsError
    when there is a model already.
    """
    shape = Shape.of(config)
    if (folder / MODEL_FILE).exists() or (folder / DATA_FILE).exists():
        raise FileExistsError(f"{folder} already holds a model")
    with (folder / DATA_FILE).open("wb") as data:
        tensors = Tensors(data)
        stored = _Store(shape, weights, precision, tensors)
        stored.all(head)
    for plan in precision.plans:
        graph = Graph(tensors.protos)
        linear = Linear(graph, plan, precision.accuracy_level)
        model = helper.make_model(
            _Decoder(shape, stored.matrices, graph, linear).build(),
            producer_name="guard_quantization",
            ir_version=_IR_VERSION,
            opset_imports=[
                helper.make_opsetid("", _OPSET),
                helper.make_opsetid("com.microsoft", 1),
            ],
        )
        (folder / graph_file(plan)).write_bytes(model.SerializeToString())
    return stored.parameters


class _Store:
    """Reads all weights of a Llama in the order of their use, and stores them."""

    def __init__(
        self, shape: Shape, weights: Weights, precision: Precision, tensors: Tensors
    ) -> None:
        self.shape, self.weights = shape, weights
        self.precision, self.tensors = precision, tensors
        self.parameters = 0
        self.matrices: dict[str, Matrix] = {}

    def all(self, head: Sequence[int] | None) -> None:
        """Every tensor that the graphs use."""
        s = self.shape
        name = EMBEDDING_WEIGHT
        table = self._take(name, s.vocab, s.hidden)
        self.matrices[EMBEDDING] = store_table(self.tensors, name, table, self.precision)
        del table  # the largest of all
        for layer in range(s.layers):
            self._layer(f"model.layers.{layer}", layer == s.layers - 1)
        self._vector("model.norm.weight")
        rows = self._head_rows(head)
        self.tensors.add(HEAD, rows.T)
        self.matrices[HEAD] = Matrix(HEAD, len(rows), s.hidden, 32, 0)

    def _layer(self, at: str, last: bool) -> None:
        """Matrices that read the same input lie in one, side by side."""
        s = self.shape
        qkv = [(f"{at}.self_attn.{kind}_proj", s.narrow) for kind in "qkv"]
        qkv[0] = (qkv[0][0], s.wide)
        self._vector(f"{at}.input_layernorm.weight")
        if last:
            self._matrix(f"{at}.q", s.hidden, *qkv[:1])
            self._matrix(f"{at}.kv", s.hidden, *qkv[1:])
        else:
            self._matrix(f"{at}.qkv", s.hidden, *qkv)
        self._matrix(f"{at}.o", s.wide, (f"{at}.self_attn.o_proj", s.hidden))
        self._vector(f"{at}.post_attention_layernorm.weight")
        both = [(f"{at}.mlp.{kind}_proj", s.mlp) for kind in ("gate", "up")]
        self._matrix(f"{at}.gate_up", s.hidden, *both)
        self._matrix(f"{at}.down", s.mlp, (f"{at}.mlp.down_proj", s.hidden))

    def _matrix(self, name: str, columns: int, *parts: tuple[str, int]) -> None:
        whole = _stacked([self._take(f"{part}.weight", rows, columns) for part, rows in parts])
        self.matrices[name] = store_matrix(self.tensors, name, whole, self.precision)

    def _vector(self, name: str) -> None:
        weight = self._take(name, self.shape.hidden)
        if isinstance(weight, Blocks):
            raise ExportError(f"{name} is quantized; it must be stored in float")
        self.tensors.add(name, weight)

    def _take(self, name: str, *shape: int) -> Floats | Blocks:
        weight = self.weights[name]
        if weight.shape != shape:
            raise ExportError(f"{name} is {weight.shape}, config.json makes it {shape}")
        self.parameters += math.prod(shape)
        return weight

    def _head_rows(self, head: Sequence[int] | None) -> Floats:
        name = EMBEDDING_WEIGHT if self.shape.tied else "lm_head.weight"
        matrix = floats(
            self.weights[name]
        )  # of a tied table the rows that are read are float again
        if matrix.ndim != 2 or matrix.shape[1] != self.shape.hidden:
            raise ExportError(f"{name} is {matrix.shape}, config.json wants {self.shape.hidden}")
        if head is None:
            rows = matrix
        elif max(head) < len(matrix):
            rows = matrix[np.array(head)]
        else:
            raise ExportError(f"{name} has no row {max(head)}")
        self.parameters += rows.size
        return rows


class _Decoder:
    """Writes the nodes of one Llama into a graph."""

    def __init__(
        self, shape: Shape, matrices: Mapping[str, Matrix], graph: Graph, linear: Linear
    ) -> None:
        self.shape, self.matrices, self.g, self.linear = shape, matrices, graph, linear

    def build(self) -> GraphProto:
        """All nodes, from ids to logits."""
        g, s = self.g, self.shape
        self._geometry()
        x = embedding(g, g.op("Reshape", "ids", g.ints(-1)), self.matrices[EMBEDDING])
        outputs = []
        inputs = [
            _value("ids", ["B", "L"], TensorProto.INT64),
            _value("read", ["B", "R"], TensorProto.INT64),
        ]
        for layer in range(s.layers):
            x = self._layer(layer, x, layer == s.layers - 1)
            for kind in "kv":
                inputs.append(_value(f"past_{kind}.{layer}", [1, s.kv_heads, "P", s.head_dim]))
                outputs.append(
                    _value(f"present_{kind}.{layer}", ["B", s.kv_heads, "L", s.head_dim])
                )
        head = g.op("MatMul", self._norm(x, "model.norm.weight"), g.weight(HEAD))
        columns = self.matrices[HEAD].rows
        g.op("Reshape", head, self._sizes(self.reads, columns), out="logits")
        logits = _value("logits", ["B", "R", columns])
        return helper.make_graph(g.nodes, "guard", inputs, [logits, *outputs], g.initializers)

    def _geometry(self) -> None:
        """Rotary tables of this run's positions, the causal mask and the mask of the reads."""
        g = self.g
        shape = g.op("Shape", "ids")
        self.row_count = g.op("Slice", shape, g.ints(0), g.ints(1))
        self.row_length = g.op("Slice", shape, g.ints(1), g.ints(2))
        self.reads = g.op("Slice", g.op("Shape", "read"), g.ints(1), g.ints(2))
        self.rows = g.op("Concat", self.row_count, g.ints(1, 1, 1), axis=0)
        length = g.op("Gather", shape, g.scalar(1, np.int64))
        past = g.op("Gather", g.op("Shape", "past_v.0"), g.scalar(2, np.int64))
        zero, one = g.scalar(0, np.int64), g.scalar(1, np.int64)
        own = g.op("Range", past, g.op("Add", past, length), one)  # positions: [L]
        place = g.op("Unsqueeze", g.op("Cast", own, to=TensorProto.FLOAT), g.ints(1))
        angles = g.op("Mul", place, g.floats(ROTARY, [self.shape.frequencies]))  # [L, d/2]
        self.cos, self.sin = g.op("Cos", angles), g.op("Sin", angles)
        seen = g.op("Range", zero, g.op("Add", past, length), one)  # [P + L]
        self.mask = self._masked(seen, own, 1)  # [group * L, P + L]
        self.read_mask = self._masked(
            seen, g.op("Add", "read", past), 1, 3
        )  # [B, 1, group * R, ...]
        count = g.op("Squeeze", self.row_count, g.ints(0))
        starts = g.op("Mul", g.op("Range", zero, count, one), length)
        starts = g.op("Unsqueeze", starts, g.ints(1))
        self.read_at = g.op("Reshape", g.op("Add", "read", starts), g.ints(-1))  # [B * R], of T

    def _masked(self, seen: str, positions: str, *axes: int) -> str:
        """0 where a position may look, far below elsewhere; once for each query of a group."""
        g = self.g
        columns = g.op("Unsqueeze", positions, g.ints(*axes))
        allowed = g.op("LessOrEqual", seen, columns)
        mask = g.op("Where", allowed, g.scalar(0), g.scalar(-1e9))
        return g.op("Concat", *[mask] * self.shape.group, axis=-2) if self.shape.group > 1 else mask

    def _sizes(self, length: str, *others: int) -> str:
        """A shape: rows, the length that is given, others."""
        return self.g.op("Concat", self.row_count, length, self.g.ints(*others), axis=0)

    def _norm(self, x: str, name: str) -> str:
        scale = self.g.weight(name)
        return self.g.op("SimplifiedLayerNormalization", x, scale, epsilon=self.shape.eps, axis=-1)

    def _layer(self, layer: int, x: str, last: bool) -> str:
        """One decoder layer; the last one only continues the positions that are read."""
        g, m, at = self.g, self.matrices, f"model.layers.{layer}"
        normed = self._norm(x, f"{at}.input_layernorm.weight")
        query, key, value = self._query_key_value(layer, normed, last)
        mask = self.read_mask if last else self.mask
        attended = self._attend(layer, query, key, value, mask)
        if last:
            x = g.op("Gather", x, self.read_at)
        x = g.op("Add", x, self.linear(attended, m[f"{at}.o"]))
        normed = self._norm(x, f"{at}.post_attention_layernorm.weight")
        both = self.linear(normed, m[f"{at}.gate_up"])
        gate, up = g.ops("Split", 2, both, axis=-1, num_outputs=2)
        gated = g.op("Mul", g.op("Mul", gate, g.op("Sigmoid", gate)), up)
        return g.op("Add", x, self.linear(gated, m[f"{at}.down"]))

    def _query_key_value(self, layer: int, x: str, last: bool) -> tuple[str, str, str]:
        """Rotated query [B, kv, group * Q, d], rotated key and value [B, kv, L, d]."""
        g, s, m, at = self.g, self.shape, self.matrices, f"model.layers.{layer}"
        own = g.ints(0)
        if last:
            query = self.linear(g.op("Gather", x, self.read_at), m[f"{at}.q"])
            query = self._rotate(self._by_row(query, self.reads, s.wide), "read")
            both = self._by_row(self.linear(x, m[f"{at}.kv"]), self.row_length, 2 * s.narrow)
            key, value = g.ops("Split", 2, both, g.ints(s.narrow, s.narrow), axis=-1)
            key = self._rotate(key, own)
        else:
            all_three = self.linear(x, m[f"{at}.qkv"])
            all_three = self._by_row(all_three, self.row_length, s.wide + 2 * s.narrow)
            parts = g.ints(s.wide + s.narrow, s.narrow)
            turned, value = g.ops("Split", 2, all_three, parts, axis=-1)
            turned = self._rotate(turned, own)
            query, key = g.ops("Split", 2, turned, g.ints(s.wide, s.narrow), axis=-1)
        query = g.op("Reshape", query, g.ints(0, 0, s.kv_heads, s.group, s.head_dim))
        key = g.op("Reshape", key, g.ints(0, 0, s.kv_heads, s.head_dim))
        value = g.op("Reshape", value, g.ints(0, 0, s.kv_heads, s.head_dim))
        query = g.op("Transpose", query, perm=[0, 2, 3, 1, 4])
        return (
            g.op("Reshape", query, g.ints(0, 0, -1, s.head_dim)),
            g.op("Transpose", key, perm=[0, 2, 1, 3], out=f"present_k.{layer}"),
            g.op("Transpose", value, perm=[0, 2, 1, 3], out=f"present_v.{layer}"),
        )

    def _by_row(self, x: str, length: str, width: int) -> str:
        return self.g.op("Reshape", x, self._sizes(length, width))

    def _rotate(self, x: str, positions: str) -> str:
        return self.g.op(
            "RotaryEmbedding", x, positions, self.cos, self.sin, domain="com.microsoft"
        )

    def _attend(self, layer: int, query: str, key: str, value: str, mask: str) -> str:
        """Softmax attention over the prefix and the row's own positions: [B * Q, heads * d]."""
        g, s = self.g, self.shape
        past = [g.op("Expand", f"past_{kind}.{layer}", self.rows) for kind in "kv"]
        keys = g.op("Concat", past[0], key, axis=2)  # [B, kv, P + L, d]
        values = g.op("Concat", past[1], value, axis=2)
        scores = g.op(
            "FusedMatMul",
            query,
            keys,
            domain="com.microsoft",
            transB=1,
            alpha=s.head_dim**-0.5,
        )
        scores = g.op("Add", scores, mask)  # [B, kv, group * Q, P + L]
        mixed = g.op("MatMul", g.op("Softmax", scores, axis=-1), values)
        mixed = g.op("Reshape", mixed, g.ints(0, 0, s.group, -1, s.head_dim))
        mixed = g.op("Transpose", mixed, perm=[0, 3, 1, 2, 4])
        return g.op("Reshape", mixed, g.ints(-1, s.wide))


def _stacked(matrices: Sequence[Floats | Blocks]) -> Floats | Blocks:
    """Matrices one above the other."""
    blocks = [matrix for matrix in matrices if isinstance(matrix, Blocks)]
    if not blocks:
        return np.concatenate([matrix for matrix in matrices if not isinstance(matrix, Blocks)])
    if len(blocks) < len(matrices) or len({(b.bits, b.codes.shape[1:]) for b in blocks}) > 1:
        raise ExportError("matrices that read the same input must be quantized alike")
    return stack(blocks)


def _value(name: str, dims: list[int | str], kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, dims)
