"""What an artifact stores, read back: its config.json, and its weights by Hugging Face names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from guard_quantization.export.decoder import (
    EMBEDDING_WEIGHT,
    HEAD,
    ExportError,
    rotary_frequencies,
)
from guard_quantization.export.graph import DATA_FILE, ROTARY
from guard_quantization.export.int4 import Blocks, unpack
from guard_quantization.export.layers import Precision
from guard_quantization.llama import LlamaShape
from guard_service.artifact import Artifact

Floats = NDArray[np.float32]
_BITS = {"fp32": 32, "int8": 8, "int4": 4}
_LLAMA_3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_FACTORS = (8.0, 32.0)  # of Llama 3.1 and of Llama 3.2's small models


class StoredModel:
    """An artifact's weights, quantized ones as they are stored; what `make_artifact` takes.

    The output layer has the rows of the verdict's tokens only. Reads artifacts of every version.
    """

    def __init__(self, artifact: Artifact) -> None:
        """Raises ExportError for a graph that this project did not write."""
        self._artifact, g = artifact, artifact.manifest.geometry
        graph = onnx.load(artifact.model, load_external_data=False).graph
        self._protos = {_renamed(one.name): one for one in graph.initializer}
        norms = [one for one in graph.node if one.op_type == "SimplifiedLayerNormalization"]
        if not norms or ROTARY not in self._protos:
            raise ExportError(f"{artifact.model}: not a graph that guard-quantize wrote")
        scaled = any(one.op_type == "FusedMatMul" and _alpha(one) != 1.0 for one in graph.node)
        self._query_scale = 1.0 if scaled else math.sqrt(g.head_dim)
        self._data = np.memmap(artifact.folder / DATA_FILE, np.uint8, "r")
        self._parts = _parts(g.layers, g.heads * g.head_dim, g.kv_heads * g.head_dim, g.mlp)
        quantized = artifact.manifest.quantization
        self.precision = Precision(
            bits=_BITS[quantized.scheme],
            block=quantized.block or 32,
            embedding_bits=_BITS[quantized.embedding],
        )
        epsilon = helper.get_node_attr_value(norms[0], "epsilon")
        shape = LlamaShape(
            vocab_size=g.vocab,
            hidden_size=g.hidden,
            intermediate_size=g.mlp,
            num_hidden_layers=g.layers,
            num_attention_heads=g.heads,
            num_key_value_heads=g.kv_heads,
            head_dim=g.head_dim,
            rms_norm_eps=float(f"{epsilon:.6g}"),
            max_position_embeddings=g.max_positions,
        )
        rope = _rope(self._array(ROTARY).ravel().astype(np.float32), g.head_dim)
        self.config: dict[str, Any] = {**shape.config(), **rope}

    def __getitem__(self, name: str, /) -> Floats | Blocks:
        """A tensor by its Hugging Face name. Raises ExportError when there is none."""
        if name == "lm_head.weight":
            return np.ascontiguousarray(self._array(HEAD).T)
        if name in self._parts:
            found = self._matrix(*self._parts[name])
            return self._unfolded(found) if name.endswith("q_proj.weight") else found
        if name == EMBEDDING_WEIGHT and self.precision.embedding_bits != 32:
            return self._table()
        return self._array(name)

    def _matrix(self, name: str, rows: slice) -> Floats | Blocks:
        if self.precision.bits == 32:
            return np.ascontiguousarray(self._array(name).T[rows])
        codes, scales = self._array(f"{name}.codes")[rows], self._array(f"{name}.scales")[rows]
        g = self._artifact.manifest.geometry
        columns = {"o": g.heads * g.head_dim, "down": g.mlp}.get(name.split(".")[-1], g.hidden)
        return unpack(codes, scales, self.precision.bits, columns)

    def _unfolded(self, queries: Floats | Blocks) -> Floats | Blocks:
        """Query weights without the factor of attention, which earlier versions folded in."""
        if isinstance(queries, Blocks):
            scales = queries.scales.astype(np.float32) * self._query_scale
            return replace(queries, scales=scales.astype(np.float16))
        scaled: Floats = queries * np.float32(self._query_scale)
        return scaled

    def _table(self) -> Blocks:
        codes, scales = (self._array(f"{EMBEDDING_WEIGHT}.{part}") for part in ("codes", "scales"))
        bits, hidden = self.precision.embedding_bits, self._artifact.manifest.geometry.hidden
        if bits == 4:  # see layers.store_table
            codes = np.concatenate((codes & 15, codes >> 4), axis=1)
        return Blocks(codes.reshape(len(codes), scales.shape[1], -1), scales, bits, hidden)

    def _array(self, name: str) -> NDArray[Any]:
        if name not in self._protos:
            raise ExportError(f"{self._artifact.model}: no tensor {name}")
        proto = self._protos[name]
        kind, shape = helper.tensor_dtype_to_np_dtype(proto.data_type), tuple(proto.dims)
        if proto.data_location != TensorProto.EXTERNAL:
            return np.frombuffer(proto.raw_data, kind).reshape(shape)
        place = {entry.key: entry.value for entry in proto.external_data}
        begin, length = int(place["offset"]), int(place["length"])
        found: NDArray[Any] = np.array(self._data[begin : begin + length]).view(kind)
        return found.reshape(shape)


def _alpha(node: onnx.NodeProto) -> float:
    return next((float(one.f) for one in node.attribute if one.name == "alpha"), 1.0)


def _renamed(name: str) -> str:
    """The name that this version gives a tensor of earlier ones."""
    for stack in ("self_attn.qkv", "self_attn.q", "self_attn.kv", "mlp.gate_up", "mlp.down"):
        for part in ("codes", "scales"):
            name = name.replace(f".{stack}.{part}", f".{stack.split('.')[1]}.{part}")
    return name


def _parts(layers: int, wide: int, narrow: int, mlp: int) -> Mapping[str, tuple[str, slice]]:
    """Which rows of which stored matrix a Hugging Face matrix is."""
    found: dict[str, tuple[str, slice]] = {}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        q, kv = ("q", "kv") if layer == layers - 1 else ("qkv", "qkv")
        first = 0 if q == "q" else wide
        for name, stack, begin, rows in (
            ("self_attn.q_proj", q, 0, wide),
            ("self_attn.k_proj", kv, first, narrow),
            ("self_attn.v_proj", kv, first + narrow, narrow),
            ("self_attn.o_proj", "o", 0, None),
            ("mlp.gate_proj", "gate_up", 0, mlp),
            ("mlp.up_proj", "gate_up", mlp, mlp),
            ("mlp.down_proj", "down", 0, None),
        ):
            end = None if rows is None else begin + rows
            found[f"{at}.{name}.weight"] = (f"{at}.{stack}", slice(begin, end))
    return found


def _rope(frequencies: Floats, head_dim: int) -> dict[str, Any]:
    """The settings of config.json that make these rotary frequencies."""
    theta = float(f"{float(frequencies[1]) ** (-head_dim / 2):.5g}")
    scalings = (None, *({**_LLAMA_3, "factor": factor} for factor in _FACTORS))
    for scaling in scalings:
        found = {"rope_theta": theta, "rope_scaling": scaling}
        if np.allclose(rotary_frequencies(found, head_dim), frequencies, rtol=1e-4):
            return found
    raise ExportError("the graph's rotary positions are of no kind that is known")
