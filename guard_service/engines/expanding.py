"""Stored blocks of 4-bit and 8-bit codes expanded for kernels that want whole matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from guard_service.engines.graph_files import Tensor, UnreadableGraph

Floats = NDArray[np.float32]
# The largest code of a weight; of 63, sums of two products with bytes fit in 16 bits.
SEVEN_BITS, EIGHT_BITS = 63, 127
_CHUNK = 1 << 22  # weights expanded at a time: bounds memory


def matrices(
    folder: Path, stored: Mapping[str, Tensor], wanted: list[Tensor], bits: int, largest: int
) -> dict[str, NDArray[Any]]:
    """Values of the tensors that a plan's graph wants, by name, from those of the stored graph.

    `NAME.fp32` [K, N] is the matrix that NAME.codes [N, blocks, block * bits / 8] and NAME.scales
    [N, blocks] stand for; `NAME.int8` [K, N] and `NAME.int8_scales` [N] are that matrix rounded to
    one scale per output channel, codes up to `largest`. Raises UnreadableGraph for tensors that do
    not fit.
    """
    made: dict[str, NDArray[Any]] = {}
    for tensor in wanted:
        name, _, kind = tensor.name.rpartition(".")
        if kind == "int8_scales":
            continue  # made with its codes
        if kind not in ("int8", "fp32") or len(tensor.dims) != 2:
            raise UnreadableGraph("it wants a tensor that nobody can make")
        codes = _read(folder, stored, f"{name}.codes", np.uint8)
        scales = _read(folder, stored, f"{name}.scales", np.float16)
        rows = _rows(codes, scales, bits, *tensor.dims)
        if kind == "int8":
            made[tensor.name], made[f"{name}.int8_scales"] = _int8(rows, tensor.dims, largest)
        else:
            made[tensor.name] = _fp32(rows, tensor.dims)
    return made


def _read(
    folder: Path, stored: Mapping[str, Tensor], name: str, kind: type[np.generic]
) -> NDArray[Any]:
    tensor = stored.get(name)
    if tensor is None:
        raise UnreadableGraph("it lacks the weights that another plan's graph is made of")
    count = int(np.prod(tensor.dims))
    held = tensor.length if tensor.location else len(tensor.raw)
    if held != count * np.dtype(kind).itemsize:
        raise UnreadableGraph("a tensor's size is not that of its dimensions")
    if not tensor.location:
        return np.frombuffer(tensor.raw, kind).reshape(tensor.dims)
    try:
        flat = np.memmap(folder / tensor.location, kind, "r", tensor.offset, (count,))
    except (OSError, ValueError) as error:
        raise UnreadableGraph("its weights cannot be read") from error
    return flat.reshape(tensor.dims)


def _rows(
    codes: NDArray[np.uint8], scales: NDArray[np.float16], bits: int, columns: int, rows: int
) -> Callable[[], Iterator[tuple[slice, Floats]]]:
    """A walk over the matrix [rows, columns] in chunks of rows."""
    if codes.ndim != 3 or codes.shape[:2] != scales.shape or len(codes) != rows:
        raise UnreadableGraph("codes and scales do not fit")
    blocks, block = codes.shape[1], codes.shape[2] * 8 // bits
    if not block or -(-columns // block) != blocks:
        raise UnreadableGraph("codes and scales do not fit")
    step = max(1, _CHUNK // (blocks * block))

    def walk() -> Iterator[tuple[slice, Floats]]:
        for at in range(0, rows, step):
            part = slice(at, min(at + step, rows))
            packed = codes[part]
            values = np.empty((len(packed), blocks, block), np.float32)
            if bits == 8:
                np.subtract(packed, np.float32(128), out=values)
            else:
                np.subtract(packed & 15, np.float32(8), out=values[..., 0::2])
                np.subtract(packed >> 4, np.float32(8), out=values[..., 1::2])
            values *= scales[part].astype(np.float32)[..., None]
            yield part, values.reshape(len(packed), -1)[:, :columns]

    return walk


def _int8(
    rows: Callable[[], Iterator[tuple[slice, Floats]]], dims: tuple[int, ...], largest: int
) -> tuple[NDArray[np.int8], Floats]:
    columns, count = dims
    codes = np.empty((columns, count), np.int8)
    scales = np.empty(count, np.float32)
    for part, values in rows():
        found = np.abs(values).max(1)
        np.maximum(found, np.float32(1e-9), out=found)
        scales[part] = found / largest
        codes[:, part] = np.rint(values / scales[part, None]).astype(np.int8).T
    return codes, scales


def _fp32(rows: Callable[[], Iterator[tuple[slice, Floats]]], dims: tuple[int, ...]) -> Floats:
    whole = np.empty(dims, np.float32)
    for part, values in rows():
        whole[:, part] = values.T
    return whole
