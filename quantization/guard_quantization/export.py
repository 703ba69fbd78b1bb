"""A Llama as an ONNX graph that reads verdicts: written node by node, weights streamed to disk.

The graph scores a batch of rows that share one prefix, whose keys and values come from an earlier
run ("snapshot"). Inputs and outputs, for B rows of L tokens, a prefix of P, R reads per row:

    ids         int64 [B, L]                   right-padded; nothing looks at padding
    read        int64 [B, R]                   positions in the row at which logits are wanted
    past_k.i    float [1, kv_heads, 1, d, P]   keys of layer i, transposed; P may be 0
    past_v.i    float [1, kv_heads, 1, P, d]
    logits      float [B, R, H]                for the H head tokens only
    present_k.i, present_v.i               of the rows, laid out as the past; free if not fetched

Attention is plain operators that broadcast: neither the keys of a group nor those of the prefix are
copied per row, and a row's numbers do not depend on the other rows. In the last layer only the positions that are
read have queries and an MLP.
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

from guard_quantization.graph import DATA_FILE, Graph
from guard_quantization.int4 import quantize_blocks

Floats = NDArray[np.float32]
MODEL_FILE = "model.onnx"
_OPSET = 18
_IR_VERSION = 9


class ExportError(ValueError):
    """A checkpoint that this exporter cannot turn into a graph; the text says why."""


class Weights(Protocol):
    """Tensors by their Hugging Face names, read one at a time."""

    def __getitem__(self, name: str, /) -> Floats: ...


@dataclass(frozen=True, slots=True)
class Precision:
    """How weights are stored: bits 32 (float), 8 or 4, in blocks of input channels."""

    bits: int = 4
    block: int = 32
    embedding_bits: int = 4
    accuracy_level: int = 4  # of MatMulNBits: 4 computes with int8 activations, 0 and 1 with float


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
    plain: Floats = (1.0 / np.float32(config.get("rope_theta", 10000.0)) ** exponents).astype("f4")
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
    return ((1 - blend) * plain / scaling["factor"] + blend * plain).astype(np.float32)


def export_graph(
    folder: Path,
    config: Mapping[str, Any],
    weights: Weights,
    head: Sequence[int] | None,
    precision: Precision,
) -> int:
    """Write model.onnx and model.onnx.data into `folder`; returns how many parameters they hold.

    `head` are the token ids whose logits are wanted, in order; None when the checkpoint's output
    layer is already cut to them. Holds one layer of float weights at a time. Raises ExportError for
    weights that do not fit the config, FileExistsError when there is a model already.
    """
    shape = Shape.of(config)
    if (folder / MODEL_FILE).exists() or (folder / DATA_FILE).exists():
        raise FileExistsError(f"{folder} already holds a model")
    with (folder / DATA_FILE).open("wb") as data:
        decoder = _Decoder(shape, weights, precision, Graph(data))
        graph = decoder.build(head)
    model = helper.make_model(
        graph,
        producer_name="guard_quantization",
        ir_version=_IR_VERSION,
        opset_imports=[
            helper.make_opsetid("", _OPSET),
            helper.make_opsetid("com.microsoft", 1),
        ],
    )
    (folder / MODEL_FILE).write_bytes(model.SerializeToString())
    return decoder.parameters


class _Decoder:
    """Writes the nodes of one Llama into a graph."""

    def __init__(self, shape: Shape, weights: Weights, precision: Precision, graph: Graph) -> None:
        self.shape, self.weights, self.precision, self.g = shape, weights, precision, graph
        self.parameters = 0

    def build(self, head: Sequence[int] | None) -> GraphProto:
        """All nodes, from ids to logits."""
        g, s = self.g, self.shape
        self._geometry()
        x = self._embed()
        outputs = []
        for layer in range(s.layers):
            last = layer == s.layers - 1
            x = self._layer(layer, x, last)
            outputs += [
                _value(f"present_k.{layer}", ["B", s.kv_heads, 1, s.head_dim, "L"]),
                _value(f"present_v.{layer}", ["B", s.kv_heads, 1, "L", s.head_dim]),
            ]
        rows = self._head_rows(head)
        matrix = g.constant("lm_head", rows.T)
        g.op("MatMul", self._norm(x, "model.norm.weight"), matrix, out="logits")
        inputs = [
            _value("ids", ["B", "L"], TensorProto.INT64),
            _value("read", ["B", "R"], TensorProto.INT64),
        ]
        for layer in range(s.layers):
            inputs.append(_value(f"past_k.{layer}", [1, s.kv_heads, 1, s.head_dim, "P"]))
            inputs.append(_value(f"past_v.{layer}", [1, s.kv_heads, 1, "P", s.head_dim]))
        logits = _value("logits", ["B", "R", len(rows)])
        return helper.make_graph(g.nodes, "guard", inputs, [logits, *outputs], g.initializers)

    def _take(self, name: str, *shape: int) -> Floats:
        weight = self.weights[name]
        if weight.shape != shape:
            raise ExportError(f"{name} is {weight.shape}, config.json makes it {shape}")
        self.parameters += weight.size
        return weight

    def _head_rows(self, head: Sequence[int] | None) -> Floats:
        name = "model.embed_tokens.weight" if self.shape.tied else "lm_head.weight"
        matrix = self.weights[name]
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

    def _geometry(self) -> None:
        """Rotary tables of this run's positions, the causal mask and the mask of the reads."""
        g = self.g
        past_1, length_1 = g.op("Shape", "past_v.0", start=3, end=4), g.op("Shape", "ids", start=1)
        self.lengths = g.op("Concat", past_1, length_1, axis=0)
        length, past = g.op("Squeeze", length_1), g.op("Squeeze", past_1)
        own = g.op("Range", g.number(0), length, g.number(1))  # [L]
        place = g.op("Cast", g.op("Add", own, past), to=TensorProto.FLOAT)
        frequencies = g.constant("rotary", np.array([self.shape.frequencies], np.float32))
        angles = g.op("Mul", g.op("Unsqueeze", place, g.ints(1)), frequencies)  # [L, d/2]
        self.cos, self.sin = g.op("Cos", angles), g.op("Sin", angles)
        self.own = own
        seen = g.constant("seen", np.array(0, np.float32))
        hidden = g.constant("hidden", np.array(-1e9, np.float32))
        causal = g.op("LessOrEqual", own, g.op("Unsqueeze", own, g.ints(1)))
        self.mask = g.op("Where", causal, seen, hidden)  # [L, L]
        upto = g.op("Unsqueeze", "read", g.ints(1, 2, 4))  # [B, 1, 1, R, 1]
        self.read_mask = g.op("Where", g.op("LessOrEqual", own, upto), seen, hidden)
        self.read_index = g.op("Unsqueeze", "read", g.ints(2))

    def _embed(self) -> str:
        """Rows of the embedding table, dequantized after they are gathered."""
        g, name, bits = self.g, "model.embed_tokens.weight", self.precision.embedding_bits
        table = self._take(name, self.shape.vocab, self.shape.hidden)
        if bits == 32:
            return g.op("Gather", g.constant(name, table), "ids")
        block = self.precision.block if bits == 4 else self.shape.hidden
        blocks = quantize_blocks(table, bits, block)
        codes = blocks.codes.reshape(len(table), -1)
        low, high = np.split(codes, 2, axis=1) if bits == 4 else (codes, codes)
        packed = low | (high << 4) if bits == 4 else codes  # first half of the row in low nibbles
        rows = g.op("Gather", g.constant(f"{name}.codes", packed), "ids")
        if bits == 4:
            nibble = g.constant("nibble", np.array(15, np.uint8))
            shift = g.constant("shift", np.array(4, np.uint8))
            low_half = g.op("BitwiseAnd", rows, nibble)
            high_half = g.op("BitShift", rows, shift, direction="RIGHT")
            rows = g.op("Concat", low_half, high_half, axis=-1)
        middle = g.constant("middle", np.array(2 ** (bits - 1), np.float32))
        centred = g.op("Sub", g.op("Cast", rows, to=TensorProto.FLOAT), middle)
        scales = g.op("Gather", g.constant(f"{name}.scales", blocks.scales), "ids")
        scales = g.op("Cast", scales, to=TensorProto.FLOAT)
        if bits == 8:
            return g.op("Mul", centred, scales)
        split = g.op("Reshape", centred, g.ints(0, 0, -1, block))
        scaled = g.op("Mul", split, g.op("Unsqueeze", scales, g.ints(3)))
        return g.op("Reshape", scaled, g.ints(0, 0, -1))

    def _norm(self, x: str, name: str) -> str:
        scale = self.g.constant(name, self._take(name, self.shape.hidden))
        return self.g.op("SimplifiedLayerNormalization", x, scale, epsilon=self.shape.eps, axis=-1)

    def _linear(self, x: str, name: str, *parts: str, scale: float = 1.0) -> str:
        """x times the transposes of the named weights, side by side; `scale` is for the first."""
        g, p = self.g, self.precision
        matrices = [self._take(f"{part}.weight", *self._sizes(part)) for part in parts]
        matrices[0] = matrices[0] * np.float32(scale)
        weight = np.concatenate(matrices)  # [N, K]
        if p.bits == 32:
            return g.op("MatMul", x, g.constant(name, weight.T))
        blocks = quantize_blocks(weight, p.bits, p.block)
        # MatMulNBits wants float32 scales; onnxruntime folds this cast when it loads.
        scales = g.constant(f"{name}.scales", blocks.scales)
        return g.op(
            "MatMulNBits",
            x,
            g.constant(f"{name}.codes", blocks.packed()),
            g.op("Cast", scales, to=TensorProto.FLOAT),
            domain="com.microsoft",
            K=weight.shape[1],
            N=weight.shape[0],
            bits=p.bits,
            block_size=p.block,
            accuracy_level=p.accuracy_level,
        )

    def _sizes(self, part: str) -> tuple[int, int]:
        s = self.shape
        wide, narrow = s.heads * s.head_dim, s.kv_heads * s.head_dim
        return {
            "q_proj": (wide, s.hidden),
            "k_proj": (narrow, s.hidden),
            "v_proj": (narrow, s.hidden),
            "o_proj": (s.hidden, wide),
            "gate_proj": (s.mlp, s.hidden),
            "up_proj": (s.mlp, s.hidden),
            "down_proj": (s.hidden, s.mlp),
        }[part.rpartition(".")[2]]

    def _layer(self, layer: int, x: str, last: bool) -> str:
        """One decoder layer; the last one only continues the positions that are read."""
        g, at = self.g, f"model.layers.{layer}"
        normed = self._norm(x, f"{at}.input_layernorm.weight")
        query, key, value = self._query_key_value(layer, normed, last)
        mask = self.read_mask if last else self.mask
        attended = self._attend(layer, query, key, value, mask)
        if last:
            x = g.op("GatherND", x, self.read_index, batch_dims=1)
        x = g.op("Add", x, self._linear(attended, f"{at}.o", f"{at}.self_attn.o_proj"))
        normed = self._norm(x, f"{at}.post_attention_layernorm.weight")
        mlp = f"{at}.mlp"
        both = self._linear(normed, f"{mlp}.gate_up", f"{mlp}.gate_proj", f"{mlp}.up_proj")
        gate, up = g.ops("Split", 2, both, axis=-1, num_outputs=2)
        gated = g.op("Mul", g.op("Mul", gate, g.op("Sigmoid", gate)), up)
        return g.op("Add", x, self._linear(gated, f"{mlp}.down", f"{mlp}.down_proj"))

    def _query_key_value(self, layer: int, x: str, last: bool) -> tuple[str, str, str]:
        """Rotated query [B, kv, group, Q, d], rotated key [B, kv, 1, d, L], value."""
        g, s, at = self.g, self.shape, f"model.layers.{layer}.self_attn"
        wide, narrow = s.heads * s.head_dim, s.kv_heads * s.head_dim
        scale = s.head_dim**-0.5
        names = [f"{at}.{kind}_proj" for kind in "qkv"]
        if last:
            read = g.op("GatherND", x, self.read_index, batch_dims=1)
            query = self._rotate(self._linear(read, f"{at}.q", names[0], scale=scale), "read")
            both = self._linear(x, f"{at}.kv", *names[1:])
            key, value = g.ops("Split", 2, both, g.ints(narrow, narrow), axis=-1)
            key = self._rotate(key, g.ints(0))
        else:
            all_three = self._linear(x, f"{at}.qkv", *names, scale=scale)
            turned, value = g.ops("Split", 2, all_three, g.ints(wide + narrow, narrow), axis=-1)
            turned = self._rotate(turned, g.ints(0))
            query, key = g.ops("Split", 2, turned, g.ints(wide, narrow), axis=-1)
        group = s.heads // s.kv_heads
        query = g.op("Reshape", query, g.ints(0, 0, s.kv_heads, group, s.head_dim))
        key = g.op("Reshape", key, g.ints(0, 0, s.kv_heads, 1, s.head_dim))
        value = g.op("Reshape", value, g.ints(0, 0, s.kv_heads, 1, s.head_dim))
        return (
            g.op("Transpose", query, perm=[0, 2, 3, 1, 4]),
            g.op("Transpose", key, perm=[0, 2, 3, 4, 1], out=f"present_k.{layer}"),
            g.op("Transpose", value, perm=[0, 2, 3, 1, 4], out=f"present_v.{layer}"),
        )

    def _rotate(self, x: str, positions: str) -> str:
        return self.g.op(
            "RotaryEmbedding", x, positions, self.cos, self.sin, domain="com.microsoft"
        )

    def _attend(self, layer: int, query: str, key: str, value: str, mask: str) -> str:
        """Softmax attention over the prefix and the row's own positions: [B, Q, heads * d]."""
        g = self.g
        own = g.op("Add", g.op("MatMul", query, key), mask)
        scores = g.op("Concat", g.op("MatMul", query, f"past_k.{layer}"), own, axis=-1)
        shares = g.op("Softmax", scores, axis=-1)
        of_prefix, of_own = g.ops("Split", 2, shares, self.lengths, axis=-1)
        prefix = g.op("MatMul", of_prefix, f"past_v.{layer}")
        mixed = g.op("Add", prefix, g.op("MatMul", of_own, value))  # [B, kv, group, Q, d]
        mixed = g.op("Transpose", mixed, perm=[0, 3, 1, 2, 4])
        return g.op("Reshape", mixed, g.ints(0, 0, -1))


def _value(name: str, dims: list[int | str], kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, dims)
