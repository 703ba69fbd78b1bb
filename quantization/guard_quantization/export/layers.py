"""Weights in a graph: the embedding table and linear layers, at each precision."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from guard_quantization.export.graph import Graph
from guard_quantization.export.int4 import CHANNEL_MOST, Blocks, quantize_blocks, quantize_channels

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Precision:
    """How weights are stored and multiplied.

    `bits` is 32 (float), 8 or 4. Kernel "blocks" is MatMulNBits: weights in blocks of input
    channels, activations in the same blocks. Kernel "rows" quantizes the activations of a token by
    one scale and multiplies by weights of one scale per output channel: about 1.6 times as fast,
    and coarser. 4-bit weights are expanded for it when the graph is loaded. Its weights take 7
    bits, so that AVX2's 16-bit sums of products cannot saturate.
    """

    bits: int = 4
    block: int = 32
    embedding_bits: int = 4
    accuracy_level: int = 4  # of MatMulNBits: 4 computes with int8 activations, 0 and 1 with float
    kernel: str = "blocks"

    def __post_init__(self) -> None:
        if not {self.bits, self.embedding_bits} <= {4, 8, 32}:
            raise ValueError("weights have 4, 8 or 32 bits")
        if self.block not in (16, 32, 64, 128, 256) or self.kernel not in ("blocks", "rows"):
            raise ValueError("block must be 16 to 256, a power of two; kernel blocks or rows")


def embedding(g: Graph, ids: str, name: str, table: Floats | Blocks, precision: Precision) -> str:
    """Rows [B, L, hidden] of a table [vocab, hidden], dequantized after they are gathered."""
    bits = precision.embedding_bits
    if bits == 32:
        return g.op("Gather", g.constant(name, _floats(table)), ids)
    blocks = _embedded(table, precision)
    hidden, block = blocks.columns, blocks.codes.shape[-1]
    codes = blocks.codes.reshape(len(blocks.codes), hidden)
    if bits == 4:  # the first half of a row in the low nibbles: nothing to interleave
        codes = codes[:, : hidden // 2] | (codes[:, hidden // 2 :] * np.uint8(16))
    rows = g.op("Gather", g.constant(f"{name}.codes", codes), ids)
    if bits == 4:
        rows = g.op("Concat", *_nibbles(g, rows), axis=-1)
    centred = g.op("Sub", g.op("Cast", rows, to=TensorProto.FLOAT), g.scalar(2 ** (bits - 1)))
    scales = g.op("Gather", g.constant(f"{name}.scales", blocks.scales), ids)
    scales = g.op("Cast", scales, to=TensorProto.FLOAT)
    if bits == 8:
        return g.op("Mul", centred, scales)
    split = g.op("Reshape", centred, g.ints(0, 0, -1, block))
    scaled = g.op("Mul", split, g.op("Unsqueeze", scales, g.ints(3)))
    return g.op("Reshape", scaled, g.ints(0, 0, -1))


def _embedded(table: Floats | Blocks, precision: Precision) -> Blocks:
    """Blocks of the table; of 8 bits, one for each row."""
    bits = precision.embedding_bits
    hidden = table.columns if isinstance(table, Blocks) else table.shape[1]
    block = precision.block if bits == 4 else hidden
    if isinstance(table, Blocks):
        return _checked(table, bits, block)
    if hidden % block:
        raise ValueError(f"the width {hidden} is not a multiple of the block {block}")
    return quantize_blocks(table, bits, block)


def _checked(blocks: Blocks, bits: int, block: int) -> Blocks:
    found = blocks.codes.shape[-1]
    if (blocks.bits, found) != (bits, block):
        raise ValueError(
            f"the checkpoint has {blocks.bits} bits in blocks of {found}, the export asks for "
            f"{bits} in blocks of {block}: make them the same"
        )
    return blocks


def _floats(weight: Floats | Blocks) -> Floats:
    return weight.dequantize() if isinstance(weight, Blocks) else weight


def linear(g: Graph, x: str, name: str, weight: Floats | Blocks, precision: Precision) -> str:
    """x [B, L, K] times the transpose of weight [N, K].

    A weight that is quantized already keeps its codes. Raises ValueError when they are not of this
    precision.
    """
    p = precision
    if p.bits == 32:
        return g.op("MatMul", x, g.constant(name, _floats(weight).T))
    if p.kernel == "rows" and p.bits == 8:
        channels, scale = quantize_channels(_floats(weight))
        names = g.constant(f"{name}.codes", channels), g.constant(f"{name}.scales", scale)
        return _by_rows(g, x, *names)
    if isinstance(weight, Blocks):
        blocks = _checked(weight, p.bits, p.block)
    else:
        blocks = quantize_blocks(weight, p.bits, p.block)
    # float16 on disk, float32 in use; onnxruntime folds what is constant when it loads.
    scales = g.op("Cast", g.constant(f"{name}.scales", blocks.scales), to=TensorProto.FLOAT)
    codes = g.constant(f"{name}.codes", blocks.packed())
    if p.kernel == "rows":
        return _by_rows(g, x, *_expanded(g, codes, scales, p.block, blocks.columns))
    return g.op(
        "MatMulNBits",
        x,
        codes,
        scales,
        domain="com.microsoft",
        K=blocks.columns,
        N=len(blocks.codes),
        bits=p.bits,
        block_size=p.block,
        accuracy_level=p.accuracy_level,
    )


def _by_rows(g: Graph, x: str, weight: str, scales: str) -> str:
    """x, quantized by one scale per token, times int8 weight [K, N] of scales [N]."""
    middle = g.scalar(128, np.uint8)
    largest = g.op("ReduceMax", g.op("Abs", x), g.ints(-1), keepdims=1)
    # [B, L, 1]; a row of zeros stays zeros
    scale = g.op("Max", g.op("Mul", largest, g.scalar(1 / 127)), g.scalar(1e-9))
    flat = g.op("Reshape", scale, g.ints(-1))
    rows = g.op("Reshape", x, g.op("Concat", g.op("Shape", flat), g.ints(-1), axis=0))
    zeros = g.op("Expand", middle, g.op("Shape", flat))
    codes = g.op("QuantizeLinear", rows, flat, zeros, axis=0)
    lead = g.op("Shape", x, start=0, end=2)
    codes = g.op("Reshape", codes, g.op("Concat", lead, g.ints(-1), axis=0))
    inputs = (codes, weight, g.scalar(1), scales, middle)
    product = g.op("MatMulIntegerToFloat", *inputs, domain="com.microsoft")
    return g.op("Mul", product, scale)


def _expanded(g: Graph, codes: str, scales: str, block: int, columns: int) -> tuple[str, str]:
    """int8 weight [K, N] and its scales [N] from 4-bit blocks: constants once loaded."""
    pairs = [g.op("Unsqueeze", half, g.ints(3)) for half in _nibbles(g, codes)]
    whole = g.op("Concat", *pairs, axis=3)  # [N, blocks, block / 2, 2]
    whole = g.op("Reshape", whole, g.ints(0, 0, block))
    centred = g.op("Sub", g.op("Cast", whole, to=TensorProto.FLOAT), g.scalar(8))
    floats = g.op("Mul", centred, g.op("Unsqueeze", scales, g.ints(2)))
    floats = g.op("Reshape", floats, g.ints(0, -1))
    floats = g.op("Slice", floats, g.ints(0), g.ints(columns), g.ints(1))
    largest = g.op("ReduceMax", g.op("Abs", floats), g.ints(1), keepdims=1)
    scale = g.op("Max", g.op("Div", largest, g.scalar(CHANNEL_MOST)), g.scalar(1e-9))
    rounded = g.op("Round", g.op("Div", floats, scale))
    weight = g.op("Transpose", g.op("Cast", rounded, to=TensorProto.INT8), perm=[1, 0])
    return weight, g.op("Reshape", scale, g.ints(-1))


def _nibbles(g: Graph, codes: str) -> tuple[str, str]:
    low = g.op("BitwiseAnd", codes, g.scalar(15, np.uint8))
    return low, g.op("BitShift", codes, g.scalar(4, np.uint8), direction="RIGHT")
