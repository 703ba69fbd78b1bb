"""Block-wise integer weights, int8 activations: the arithmetic of quantization, as pure functions.

A row of a weight matrix is cut into blocks of `block` input channels. A block holds integers q in
[0, 2^bits) and one scale; the weight it stands for is (q - 2^(bits-1)) * scale. This is the layout
of onnxruntime's MatMulNBits operator without zero points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

# Candidate clipping points of a block, as shares of its largest magnitude.
SHRINK = np.linspace(1.0, 0.7, 13, dtype=np.float32)
SMALLEST_SCALE = np.float32(6.2e-5)  # above float16's subnormals, where its precision fades
_LARGEST_WEIGHT = 7 * 65504.0  # a float16 scale times the largest code


@dataclass(frozen=True, slots=True)
class Blocks:
    """A quantized matrix of `columns` input channels; the last block may be part padding."""

    codes: Bytes  # [rows, blocks, block], in [0, 2^bits)
    scales: NDArray[np.float16]  # [rows, blocks]
    bits: int
    columns: int

    def dequantize(self) -> Floats:
        """The matrix [rows, columns] that the codes stand for."""
        middle = np.float32(2 ** (self.bits - 1))
        values = (self.codes - middle) * self.scales.astype(np.float32)[..., None]
        return values.reshape(len(values), -1)[:, : self.columns].astype(np.float32, copy=False)

    def packed(self) -> Bytes:
        """[rows, blocks, block * bits / 8]: two 4-bit codes per byte, the first in the low half."""
        if self.bits == 8:
            return self.codes
        packed: Bytes = self.codes[..., 0::2] | (self.codes[..., 1::2] * np.uint8(16))
        return packed

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix that the codes stand for."""
        return len(self.codes), self.columns

    @property
    def size(self) -> int:
        """How many weights the codes stand for, padding not counted."""
        return len(self.codes) * self.columns

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales as stored."""
        return self.codes.size * self.bits // 8 + self.scales.nbytes

    def take(self, rows: NDArray[np.integer]) -> Blocks:
        """These rows, in this order."""
        return replace(self, codes=self.codes[rows], scales=self.scales[rows])


def floats(weight: Floats | Blocks) -> Floats:
    """The matrix itself, or the one that codes stand for."""
    return weight.dequantize() if isinstance(weight, Blocks) else weight


def unpack(packed: Bytes, scales: NDArray[np.float16], bits: int, columns: int) -> Blocks:
    """The inverse of `Blocks.packed`. Raises ValueError for arrays that are not of that layout."""
    if bits not in (4, 8) or packed.dtype != np.uint8 or scales.dtype != np.float16:
        raise ValueError("codes must be uint8 of 4 or 8 bits, scales float16")
    if packed.ndim != 3 or packed.shape[:2] != scales.shape:
        raise ValueError(f"codes {packed.shape} and scales {scales.shape} do not fit")
    block = packed.shape[2] * 8 // bits
    if not scales.shape[1] * block - block < columns <= scales.shape[1] * block:
        raise ValueError(f"{scales.shape[1]} blocks of {block} do not make {columns} columns")
    if not np.isfinite(scales).all():
        raise ValueError("scales are not finite")
    if bits == 8:
        return Blocks(packed, scales, bits, columns)
    codes = np.empty((*packed.shape[:2], block), np.uint8)
    np.bitwise_and(packed, 15, out=codes[..., 0::2])
    np.right_shift(packed, 4, out=codes[..., 1::2])
    return Blocks(codes, scales, bits, columns)


def stack(parts: Sequence[Blocks]) -> Blocks:
    """The rows of all parts, one below the other. Raises ValueError when their layouts differ."""
    if len({(part.bits, part.columns, part.codes.shape[1:]) for part in parts}) != 1:
        raise ValueError("only matrices of one layout can be stacked")
    codes = np.concatenate([part.codes for part in parts])
    return replace(parts[0], codes=codes, scales=np.concatenate([part.scales for part in parts]))


def quantize_blocks(
    weight: Floats, bits: int, block: int, importance: Floats | None = None
) -> Blocks:
    """Quantize weight [rows, columns], minimising each block's squared error.

    For every block the clipping scale is searched over a grid and refitted by least squares to the
    codes it gives; the best of all wins, so the error is never above plain round-to-nearest.
    `importance` [columns] weighs the error of an input channel (the mean square of its activation,
    as in GPTQ's diagonal, Frantar et al., 2022). Scales are rounded to float16 before codes are
    chosen. Raises ValueError for weights that are not finite or beyond what a scale can hold.
    """
    if bits not in (4, 8) or block % 16:
        raise ValueError(f"cannot quantize to {bits} bits in blocks of {block}")
    if not np.isfinite(weight).all():
        raise ValueError("weights are not finite")
    if weight.size and max(weight.max(), -weight.min()) > _LARGEST_WEIGHT:
        raise ValueError(f"weights beyond {_LARGEST_WEIGHT:g} need scales that float16 lacks")
    rows, columns = weight.shape
    count = -(-columns // block)
    padding = ((0, 0), (0, count * block - columns))
    values = weight.astype(np.float32, copy=False)
    if columns % block:
        values = np.pad(values, padding)
    values = values.reshape(rows, count, block)
    shares = np.ones(columns, np.float32) if importance is None else importance
    shares = np.pad(shares.astype(np.float32), padding[1]).reshape(1, count, block)
    codes, scales = np.empty(values.shape, np.uint8), np.empty((rows, count), np.float16)
    step = max(1, (1 << 21) // (count * block))  # rows at a time: bounds the memory of the search
    for at in range(0, rows, step):
        part = slice(at, at + step)
        codes[part], scales[part] = _search(values[part], bits, shares)
    return Blocks(codes, scales, bits, columns)


def fake_quantize_rows(x: Floats) -> Floats:
    """What is left of activations [..., K] after int8 with one scale per row.

    As kernel plan int8 does it: scale max|x| / 127, zero point 128, halves to even.
    """
    scale = np.maximum(np.abs(x).max(-1, keepdims=True) * np.float32(1 / 127), np.float32(1e-9))
    codes = np.clip(np.rint(x / scale) + 128, 0, 255)
    left: Floats = ((codes - 128) * scale).astype(np.float32, copy=False)
    return left


def _search(values: Floats, bits: int, shares: Floats) -> tuple[Bytes, NDArray[np.float16]]:
    low = -(2 ** (bits - 1))
    extreme = np.take_along_axis(values, np.abs(values).argmax(-1)[..., None], -1)  # signed
    best_error = np.full(extreme.shape, np.inf, np.float32)
    best_scale = np.zeros_like(extreme)
    # The extreme value maps to the end of the range that has one more step, or to the other one.
    for end in (low, low + 1):
        for shrink in SHRINK if bits == 4 else SHRINK[:3]:
            scale = _storable(extreme * shrink / np.float32(end))
            for _ in range(2):
                codes = _round(values, scale, low)
                error = (shares * (codes * scale - values) ** 2).sum(-1, keepdims=True)
                better = error < best_error
                best_error = np.where(better, error, best_error)
                best_scale = np.where(better, scale, best_scale)
                scale = _storable(_least_squares(values, codes, shares, scale))
    codes = _round(values, best_scale, low)
    return (codes - low).astype(np.uint8), best_scale[..., 0].astype(np.float16)


def _round(values: Floats, scale: Floats, low: int) -> Floats:
    rounded: Floats = np.clip(np.rint(values / scale), low, -low - 1)
    return rounded


def _storable(scale: Floats) -> Floats:
    """The nearest scale that float16 holds well; never zero."""
    sign = np.where(scale < 0, np.float32(-1), np.float32(1))
    size = np.maximum(np.abs(scale), SMALLEST_SCALE)
    return (sign * size).astype(np.float16).astype(np.float32)


def _least_squares(values: Floats, codes: Floats, shares: Floats, otherwise: Floats) -> Floats:
    norm = (shares * codes * codes).sum(-1, keepdims=True)
    fitted = (shares * codes * values).sum(-1, keepdims=True) / np.where(norm > 0, norm, 1)
    return np.where(norm > 0, fitted, otherwise).astype(np.float32)
