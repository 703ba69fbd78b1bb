"""How fast a torch device multiplies matrices and moves memory: what a model is held against."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_CPU = (1024, 2048, 4096)  # rows, inner, columns of the product
_CUDA = (8192, 8192, 8192)
_COPIED = {"cpu": 2**28, "cuda": 2**31}  # bytes of a buffer, more than caches hold
_TIMES = 5


@dataclass(frozen=True, slots=True)
class Rates:
    """The best of some runs."""

    flops: float  # of matrix products in the model's number type, per second
    bytes: float  # read and written by a copy, per second


def rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Measure; takes a second or two, and twice the copied buffer's memory."""
    rows, inner, columns = _CUDA if device.type == "cuda" else _CPU
    left = torch.ones((rows, inner), dtype=dtype, device=device)
    right = torch.ones((inner, columns), dtype=dtype, device=device)
    product_s = _fastest(device, lambda: left @ right)
    size = _COPIED["cuda" if device.type == "cuda" else "cpu"]
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = _fastest(device, lambda: target.copy_(source))
    return Rates(2 * rows * inner * columns / product_s, 2 * size / copy_s)


def _fastest(device: torch.device, run: Callable[[], object]) -> float:
    """Seconds of the fastest run, the first not counted."""
    found = []
    for _ in range(_TIMES + 1):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
    return min(found[1:])
