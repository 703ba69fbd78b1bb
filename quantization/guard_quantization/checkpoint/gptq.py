"""GPTQ (Frantar et al., 2022): weights rounded one input channel at a time, errors carried on.

For inputs X the error of a quantized row q of a weight row w is (w - q) H (w - q)^T with H = X^T X.
When a channel has been rounded, the channels that are still floats are moved so that they make up
for its error as well as they can; with H^-1 = U^T U, U upper triangular, the move is
-(w_j - q_j) / U_jj * U_j. What a channel's rounding costs in the end is ((w_j - q_j) / U_jj)^2, so
the scale of a block is searched with 1 / U_jj^2 as weights, when the block is reached.

All in float64: the factor is the delicate part, and the loop is bound by memory anyway.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from guard_quantization.export.int4 import Blocks, quantize_blocks


class Hessian:
    """The running second moment X^T X of inputs X, in float64."""

    def __init__(self, columns: int) -> None:
        self.total = torch.zeros(columns, columns, dtype=torch.float64)  # [columns, columns]
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Add inputs x [..., columns]; products in float32, sums over calls in float64."""
        flat = x.reshape(-1, x.shape[-1]).float()
        self.total += flat.T @ flat
        self.tokens += len(flat)


@dataclass(frozen=True, slots=True)
class Fit:
    """A quantized matrix and its error |X(W - Q)| / |XW| beside that of round-to-nearest."""

    blocks: Blocks
    error: float
    nearest: float


def fit_nearest(weight: Tensor, hessian: Tensor | None, bits: int, block: int) -> Fit:
    """Round weight [rows, columns] to the nearest codes; without a Hessian, errors are of W."""
    blocks = quantize_blocks(weight.numpy(), bits, block)
    error = _relative(weight, row_errors(weight, blocks, hessian), hessian)
    return Fit(blocks, error, error)


def fit_gptq(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    block: int,
    damping: float = 0.01,
    *,
    ordered: bool = False,
) -> Fit:
    """Quantize weight [rows, columns] for inputs whose second moment is `hessian`.

    A row keeps round-to-nearest where that is better, so no row is worse than it. `damping` is the
    share of the mean of H's diagonal that is added to it. `ordered` takes the channels of the
    strongest inputs first; blocks are contiguous all the same, so their scales are then those of
    round-to-nearest. Raises ValueError for weights or a Hessian that are not finite.
    """
    if hessian.shape != (weight.shape[1],) * 2:
        raise ValueError(f"weight {tuple(weight.shape)}, Hessian {tuple(hessian.shape)}")
    if not torch.isfinite(hessian).all():
        raise ValueError("the inputs are not finite")
    nearest = quantize_blocks(weight.numpy(), bits, block)
    order = torch.arange(len(hessian))
    if ordered:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    factor = inverse_factor(hessian[order][:, order], damping)
    found = _carry(weight[:, order], factor, nearest, order if ordered else None)
    errors = row_errors(weight, found, hessian)
    plain = row_errors(weight, nearest, hessian)
    worse = (errors > plain).numpy()
    codes = np.where(worse[:, None, None], nearest.codes, found.codes)
    scales = np.where(worse[:, None], nearest.scales, found.scales)
    best = torch.minimum(errors, plain)
    return Fit(
        replace(found, codes=codes, scales=scales),
        _relative(weight, best, hessian),
        _relative(weight, plain, hessian),
    )


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper triangular U with U^T U the inverse of the damped H.

    H = V V^T with V upper triangular is a Cholesky factorisation from the last channel to the
    first; U is the inverse of V. Half the work of inverting H and factoring the inverse.
    """
    damped = hessian.double().clone()
    diagonal = damped.diagonal()
    added = damping * float(diagonal.mean())
    diagonal += added if added > 0 else 1.0  # inputs that were all zero say nothing
    upper = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1).contiguous()
    eye = torch.eye(len(upper), dtype=torch.float64)
    return torch.linalg.solve_triangular(upper, eye, upper=True)


def row_errors(weight: Tensor, blocks: Blocks, hessian: Tensor | None) -> Tensor:
    """(w - q) H (w - q)^T of each row [rows]; H is the identity when there is none."""
    return _energy(torch.from_numpy(blocks.dequantize()).double() - weight.double(), hessian)


def _energy(rows: Tensor, hessian: Tensor | None) -> Tensor:
    seen = rows if hessian is None else rows @ hessian
    return (seen * rows).sum(1).clamp(min=0)


def _relative(weight: Tensor, errors: Tensor, hessian: Tensor | None) -> float:
    whole = float(_energy(weight.double(), hessian).sum())
    return (float(errors.sum()) / whole) ** 0.5 if whole > 0 else 0.0


def _carry(weight: Tensor, factor: Tensor, nearest: Blocks, order: Tensor | None) -> Blocks:
    """Quantize from the first column to the last, with errors carried to the columns behind.

    Columns within a block are moved at once, those behind it after the block. `order` says which
    columns of `nearest` these are; codes go to their places there, and scales are kept.
    """
    rows, columns = weight.shape
    bits, block = nearest.bits, nearest.codes.shape[2]
    low = -(2 ** (bits - 1))
    left = weight.T.double().contiguous().clone()  # [columns, rows]
    codes = np.full((nearest.codes.shape[1] * block, rows), -low, np.uint8)
    scales = nearest.scales.copy()
    importance = factor.diagonal() ** -2
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        now, inner = left[start:stop], factor[start:stop, start:stop]
        if order is None:
            places = np.arange(start, stop)
            shares = importance[start:stop] / importance[start:stop].mean()
            group = now.T.float().contiguous().numpy()
            fitted = quantize_blocks(group, bits, block, shares.float().numpy())
            scales[:, start // block] = fitted.scales[:, 0]
        else:
            places = order[start:stop].numpy()
        scale = torch.from_numpy(scales[:, places // block].T.astype(np.float64))  # [width, rows]
        errors = torch.empty_like(now)
        for j in range(stop - start):
            code = (now[j] / scale[j]).round_().clamp_(low, -low - 1)
            codes[places[j]] = (code - low).to(torch.uint8).numpy()
            errors[j] = (now[j] - code * scale[j]) / inner[j, j]
            now[j + 1 :].addr_(inner[j, j + 1 :], errors[j], alpha=-1)
        left[stop:] -= factor[start:stop, stop:].T @ errors
    placed = np.ascontiguousarray(codes.T).reshape(nearest.codes.shape)
    return Blocks(placed, scales, bits, columns)
