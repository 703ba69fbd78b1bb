"""GPTQ: never worse than rounding, better on correlated inputs, equal to a naive float64 form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from guard_quantization.checkpoint.gptq import (
    Hessian,
    fit_gptq,
    fit_nearest,
    inverse_factor,
    row_errors,
)
from guard_quantization.export.int4 import Blocks, quantize_blocks

Doubles = NDArray[np.float64]


def inputs(tokens: int, columns: int, rank: int, seed: int = 0) -> Doubles:
    """Correlated inputs: `rank` causes seen through every channel, and a little noise."""
    rng = np.random.default_rng(seed)
    causes = rng.standard_normal((tokens, rank)) @ rng.standard_normal((rank, columns))
    return np.asarray(causes + 0.1 * rng.standard_normal((tokens, columns)))


def moment(x: Doubles) -> Tensor:
    return torch.from_numpy(x.T @ x)


def weights(rows: int, columns: int, seed: int = 1) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, columns))).float()


def objective(x: Doubles, weight: Tensor, blocks: Blocks) -> Doubles:
    """|X(w - q)|^2 of each row, as the definition says."""
    difference = weight.double().numpy() - blocks.dequantize().astype(np.float64)
    return np.asarray(((x @ difference.T) ** 2).sum(0))


def naive(weight: Tensor, hessian: Doubles, bits: int, block: int, damping: float) -> Blocks:
    """Optimal brain quantization in a fixed order: the inverse itself, one channel struck out
    after the other, every column behind moved at once."""
    left = weight.double().numpy().copy()
    rows, columns = left.shape
    low, damp = -(2 ** (bits - 1)), damping * np.diag(hessian).mean()
    inverse = np.linalg.inv(hessian + damp * np.eye(columns))

    def strike(matrix: Doubles, j: int) -> Doubles:
        return np.asarray(matrix - np.outer(matrix[:, j], matrix[j]) / matrix[j, j])

    codes = np.full((rows, -(-columns // block) * block), -low, np.uint8)
    scales: list[NDArray[Any]] = []
    for j in range(columns):
        if j % block == 0:
            ahead, shares = inverse, []
            for k in range(j, min(j + block, columns)):
                shares.append(1 / ahead[k, k])
                ahead = strike(ahead, k)
            group = left[:, j : j + block].astype(np.float32)
            share = (np.array(shares) / np.mean(shares)).astype(np.float32)
            scales.append(quantize_blocks(group, bits, block, share).scales[:, 0])
        scale = scales[-1].astype(np.float64)
        code = np.clip(np.rint(left[:, j] / scale), low, -low - 1)
        codes[:, j] = code - low
        error = (left[:, j] - code * scale) / inverse[j, j]
        left[:, j:] -= np.outer(error, inverse[j, j:])
        inverse = strike(inverse, j)
    return Blocks(codes.reshape(rows, -1, block), np.stack(scales, 1), bits, columns)


def test_the_running_hessian_is_the_second_moment_of_all_inputs() -> None:
    x = np.random.default_rng(0).standard_normal((90, 24))
    hessian = Hessian(24)
    for part in np.split(x, 3):
        hessian.add(torch.from_numpy(part).float().view(2, 15, 24))
    np.testing.assert_allclose(hessian.total.numpy(), x.T @ x, rtol=1e-5, atol=1e-4)
    assert hessian.tokens == 90


def test_the_factor_is_that_of_the_inverse() -> None:
    hessian = moment(inputs(50, 40, 8))
    damped = hessian + 0.02 * hessian.diagonal().mean() * torch.eye(40, dtype=torch.float64)
    wanted = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    torch.testing.assert_close(inverse_factor(hessian, 0.02), wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("columns", "block"), [(96, 32), (80, 32), (64, 64)])
@pytest.mark.parametrize("bits", [4, 8])
def test_it_equals_the_naive_form_in_float64(columns: int, block: int, bits: int) -> None:
    x, weight = inputs(300, columns, 6), weights(12, columns)
    found = fit_gptq(weight, moment(x), bits, block, 0.01).blocks
    wanted = naive(weight, x.T @ x, bits, block, 0.01)
    np.testing.assert_array_equal(found.codes, wanted.codes)
    np.testing.assert_array_equal(found.scales, wanted.scales)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rank=st.integers(1, 40),
    tokens=st.integers(1, 80),
    columns=st.sampled_from([32, 45, 64]),
    ordered=st.booleans(),
)
def test_no_row_is_worse_than_rounding(
    seed: int, rank: int, tokens: int, columns: int, ordered: bool
) -> None:
    x, weight = inputs(tokens, columns, rank, seed), weights(6, columns, seed + 1)
    fit = fit_gptq(weight, moment(x), 4, 32, ordered=ordered)
    plain = quantize_blocks(weight.numpy(), 4, 32)
    most = objective(x, weight, plain)
    assert (objective(x, weight, fit.blocks) <= most * (1 + 1e-6) + 1e-6).all()
    assert fit.error <= fit.nearest


@pytest.mark.parametrize("ordered", [False, True])
def test_it_is_clearly_better_on_correlated_inputs(ordered: bool) -> None:
    x, weight = inputs(2000, 128, 16), weights(32, 128)
    fit = fit_gptq(weight, moment(x), 4, 32, ordered=ordered)
    plain = objective(x, weight, quantize_blocks(weight.numpy(), 4, 32)).sum()
    found = objective(x, weight, fit.blocks).sum()
    assert found < 0.25 * plain
    whole = ((x @ weight.double().numpy().T) ** 2).sum()
    assert fit.error == pytest.approx((found / whole) ** 0.5, rel=1e-4)
    assert fit.nearest == pytest.approx((plain / whole) ** 0.5, rel=1e-4)


def test_weights_on_the_grid_stay_as_they_are() -> None:
    rng = np.random.default_rng(2)
    codes = rng.integers(0, 16, (8, 3, 32)).astype(np.uint8)
    codes[..., 5] = 0  # every block uses its range
    scales = rng.uniform(0.01, 0.1, (8, 3)).astype(np.float16)
    wanted = Blocks(codes, scales, 4, 96).dequantize()
    fit = fit_gptq(torch.from_numpy(wanted), moment(inputs(200, 96, 5)), 4, 32)
    np.testing.assert_array_equal(fit.blocks.dequantize(), wanted)
    assert fit.error == 0


def test_inputs_that_are_all_zero_leave_rounding() -> None:
    weight = weights(4, 64)
    fit = fit_gptq(weight, torch.zeros(64, 64, dtype=torch.float64), 4, 32)
    np.testing.assert_array_equal(fit.blocks.codes, quantize_blocks(weight.numpy(), 4, 32).codes)
    assert fit.error == 0


def test_a_channel_that_never_spoke_is_rounded_and_moves_nothing() -> None:
    x, weight = inputs(200, 64, 8), weights(4, 64)
    x[:, 7] = 0
    found = fit_gptq(weight, moment(x), 4, 32).blocks.dequantize()
    assert np.abs(found[:, 7] - weight.numpy()[:, 7]).max() < 0.5


def test_errors_of_rounding_without_inputs_are_those_of_the_weights() -> None:
    weight = weights(16, 64)
    fit = fit_nearest(weight, None, 4, 32)
    difference = fit.blocks.dequantize() - weight.numpy()
    assert fit.error == pytest.approx(np.linalg.norm(difference) / weight.norm().item(), rel=1e-5)
    assert fit.error == fit.nearest
    energy = row_errors(weight, fit.blocks, None).numpy()
    np.testing.assert_allclose(energy, (difference**2).sum(1), rtol=1e-4)


def test_inputs_that_are_not_finite_are_refused() -> None:
    hessian = torch.full((64, 64), torch.nan, dtype=torch.float64)
    with pytest.raises(ValueError, match="inputs are not finite"):
        fit_gptq(weights(4, 64), hessian, 4, 32)
    with pytest.raises(ValueError, match="Hessian"):
        fit_gptq(weights(4, 64), hessian[:32, :32], 4, 32)
