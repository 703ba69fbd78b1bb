"""Weights in a graph: the embedding table and linear layers, as stored and by kernel plan."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from guard_quantization.export.graph import Graph, Tensors
from guard_quantization.export.int4 import Blocks, floats, quantize_blocks
from guard_service.engines.plans import EXPANDED, FP32, INT8, PLANS, STORED

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Precision:
    """How weights are stored: `bits` is 32 (float), 8 or 4, in blocks of input channels."""

    bits: int = 4
    block: int = 32
    embedding_bits: int = 4
    accuracy_level: int = 4  # of MatMulNBits: 4 computes with int8 activations, 0 and 1 with float

    def __post_init__(self) -> None:
        if not {self.bits, self.embedding_bits} <= {4, 8, 32}:
            raise ValueError("weights have 4, 8 or 32 bits")
        if self.block not in (16, 32, 64, 128, 256):
            raise ValueError("block must be 16 to 256, a power of two")

    @property
    def plans(self) -> tuple[str, ...]:
        """Kernel plans that weights so stored can be multiplied by."""
        return (STORED,) if self.bits == 32 else PLANS


@dataclass(frozen=True, slots=True)
class Matrix:
    """A stored matrix [rows, columns], under `name`; an embedding table too."""

    name: str
    rows: int
    columns: int
    bits: int
    block: int


def store_table(
    tensors: Tensors, name: str, table: Floats | Blocks, precision: Precision
) -> Matrix:
    """Store an embedding table [vocab, hidden]. Raises ValueError when it cannot be so stored."""
    bits = precision.embedding_bits
    if bits == 32:
        rows = floats(table)
        tensors.add(name, rows)
        return Matrix(name, len(rows), rows.shape[1], bits, 0)
    blocks = _embedded(table, precision)
    hidden, block = blocks.columns, blocks.codes.shape[-1]
    codes = blocks.codes.reshape(len(blocks.codes), hidden)
    if bits == 4:  # the first half of a row in the low nibbles: nothing to interleave
        codes = codes[:, : hidden // 2] | (codes[:, hidden // 2 :] * np.uint8(16))
    tensors.add(f"{name}.codes", codes)
    tensors.add(f"{name}.scales", blocks.scales)
    return Matrix(name, len(codes), hidden, bits, block)


def embedding(g: Graph, ids: str, table: Matrix) -> str:
    """Rows [T, hidden] of a table for ids [T], dequantized after they are gathered."""
    if table.bits == 32:
        return g.op("Gather", g.weight(table.name), ids)
    rows = g.op("Gather", g.weight(f"{table.name}.codes"), ids)
    if table.bits == 4:
        low = g.op("BitwiseAnd", rows, g.scalar(15, np.uint8))
        high = g.op("BitShift", rows, g.scalar(4, np.uint8), direction="RIGHT")
        rows = g.op("Concat", low, high, axis=-1)
    middle = g.scalar(2 ** (table.bits - 1))
    centred = g.op("Sub", g.op("Cast", rows, to=TensorProto.FLOAT), middle)
    scales = g.op("Gather", g.weight(f"{table.name}.scales"), ids)
    scales = g.op("Cast", scales, to=TensorProto.FLOAT)
    if table.block == table.columns:
        return g.op("Mul", centred, scales)
    split = g.op("Reshape", centred, g.ints(0, -1, table.block))
    scaled = g.op("Mul", split, g.op("Unsqueeze", scales, g.ints(2)))
    return g.op("Reshape", scaled, g.ints(0, -1))


def store_matrix(
    tensors: Tensors, name: str, weight: Floats | Blocks, precision: Precision
) -> Matrix:
    """Store the weight [N, K] of a linear layer; codes of one that is quantized stay as they are.

    Raises ValueError when they are not of this precision.
    """
    p = precision
    if p.bits == 32:
        rows = floats(weight)
        tensors.add(name, rows.T)
        return Matrix(name, len(rows), rows.shape[1], 32, 0)
    if isinstance(weight, Blocks):
        blocks = _checked(weight, p.bits, p.block)
    else:
        blocks = quantize_blocks(weight, p.bits, p.block)
    tensors.add(f"{name}.codes", blocks.packed())
    tensors.add(f"{name}.scales", blocks.scales)
    return Matrix(name, *blocks.shape, p.bits, p.block)


class Linear:
    """Products of activations [T, K] with stored matrices, by one kernel plan."""

    def __init__(self, g: Graph, plan: str, accuracy_level: int) -> None:
        self.g, self.plan, self.accuracy_level = g, plan, accuracy_level

    def __call__(self, x: str, matrix: Matrix) -> str:
        """x times the transpose of the matrix: [T, N]."""
        if self.plan == INT8:
            return self._by_rows(x, matrix)
        if matrix.bits == 32:
            return self.g.op("MatMul", x, self.g.weight(matrix.name))
        if self.plan == FP32:
            shape = matrix.columns, matrix.rows
            name = f"{matrix.name}.fp32"
            return self.g.op("MatMul", x, self.g.made_at_load(name, np.float32, shape, EXPANDED))
        return self._by_blocks(x, matrix)

    def _by_blocks(self, x: str, matrix: Matrix) -> str:
        g = self.g
        # float16 on disk, float32 in use; onnxruntime folds what is constant when it loads.
        scales = g.op("Cast", g.weight(f"{matrix.name}.scales"), to=TensorProto.FLOAT)
        return g.op(
            "MatMulNBits",
            x,
            g.weight(f"{matrix.name}.codes"),
            scales,
            domain="com.microsoft",
            K=matrix.columns,
            N=matrix.rows,
            bits=matrix.bits,
            block_size=matrix.block,
            accuracy_level=self.accuracy_level,
        )

    def _by_rows(self, x: str, matrix: Matrix) -> str:
        """x, quantized by one scale per token, times int8 weight [K, N] of one scale per row."""
        g, shape = self.g, (matrix.columns, matrix.rows)
        weight = g.made_at_load(f"{matrix.name}.int8", np.int8, shape, EXPANDED)
        scales = g.made_at_load(f"{matrix.name}.int8_scales", np.float32, shape[1:], EXPANDED)
        middle = g.scalar(128, np.uint8)
        largest = g.op("ReduceMax", g.op("Abs", x), g.ints(-1), keepdims=0)  # [T]
        # A token of zeros stays zeros.
        scale = g.op("Max", g.op("Mul", largest, g.scalar(1 / 127)), g.scalar(1e-9))
        zeros = g.op("Expand", middle, g.op("Shape", scale))
        codes = g.op("QuantizeLinear", x, scale, zeros, axis=0)
        inputs = (codes, weight, g.scalar(1), scales, middle)
        product = g.op("MatMulIntegerToFloat", *inputs, domain="com.microsoft")
        return g.op("Mul", product, g.op("Unsqueeze", scale, g.ints(1)))


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
