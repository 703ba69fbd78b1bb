"""How fast this machine multiplies matrices: what an engine's speed is held against.

The graphs are a few nodes around constant weights; they are written as protobuf here, since what
serves has no onnx package.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from guard_service.manifest import Geometry

INT8 = ("int8", "int4")  # those that multiply 8-bit integers
_BLOCK = 32
_DRAWN = 2**16 + 1  # random numbers, repeated: a matrix of them is what costs time otherwise
_MICROSOFT = "com.microsoft"
# Numbers of onnx.proto: element types, and the fields that are written.
_FLOAT, _UINT8, _INT8 = 1, 2, 3
_TYPES = {np.dtype(np.float32): _FLOAT, np.dtype(np.uint8): _UINT8, np.dtype(np.int8): _INT8}


class Machine:
    """The same product in three ways, each run when asked for: [rows, inner] by [inner, columns].

    The sizes are those of the largest matrices of a 1B guard and of a long prompt.
    """

    def __init__(
        self, threads: int, rows: int = 256, inner: int = 2048, columns: int = 8192
    ) -> None:
        rng = np.random.default_rng(0)
        codes = rng.integers(0, 256, (rows, inner), np.uint8)
        floats = rng.standard_normal((rows, inner), np.float32)
        self._multiply_adds = rows * inner * columns
        self._runs = {
            "fp32": (_session(_fp32(rng, rows, inner, columns), threads), floats),
            "int8": (_session(_int8(rng, rows, inner, columns), threads), codes),
            "int4": (_session(_int4(rng, rows, inner, columns), threads), floats),
        }
        self._fastest_s = dict.fromkeys(self._runs, float("inf"))

    def run(self, times: int = 2) -> None:
        """Measure each once more; the fastest run of all counts."""
        for name, (graph, x) in self._runs.items():
            for _ in range(times):
                start = time.perf_counter()
                graph.run(None, {"x": x})
                took_s = time.perf_counter() - start
                self._fastest_s[name] = min(self._fastest_s[name], took_s)

    def rates(self) -> dict[str, float]:
        """Multiply-adds per second of each; run first.

        `int8` is MatMulIntegerToFloat, `int4` is MatMulNBits at accuracy level 4 and quantizes its
        input itself.
        """
        return {name: self._multiply_adds / took_s for name, took_s in self._fastest_s.items()}


def multiply_adds_per_token(geometry: Geometry) -> int:
    """Of the matrices that a token of a long prompt goes through.

    The last layer needs only keys and values. Attention itself, and what is computed for the few
    positions that are read, are left out.
    """
    g = geometry
    wide, narrow = g.heads * g.head_dim, 2 * g.kv_heads * g.head_dim
    layer = g.hidden * (2 * wide + narrow + 3 * g.mlp)
    return (g.layers - 1) * layer + g.hidden * narrow


def _session(model: bytes, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _fp32(rng: np.random.Generator, rows: int, inner: int, columns: int) -> bytes:
    weight = np.resize(rng.standard_normal(_DRAWN, np.float32), (inner, columns))
    return _model(_FLOAT, (rows, inner, columns), _node("MatMul", ("x", "w"), ""), w=weight)


def _int8(rng: np.random.Generator, rows: int, inner: int, columns: int) -> bytes:
    return _model(
        _UINT8,
        (rows, inner, columns),
        _node("MatMulIntegerToFloat", ("x", "w", "one", "scales", "middle"), _MICROSOFT),
        # 7 bits: 16-bit sums of products cannot saturate
        w=np.resize(rng.integers(-63, 64, _DRAWN, np.int8), (inner, columns)),
        one=np.array(1, np.float32),
        scales=np.full(columns, 0.01, np.float32),
        middle=np.array(128, np.uint8),
    )


def _int4(rng: np.random.Generator, rows: int, inner: int, columns: int) -> bytes:
    settings = {"K": inner, "N": columns, "bits": 4, "block_size": _BLOCK, "accuracy_level": 4}
    blocks = inner // _BLOCK
    return _model(
        _FLOAT,
        (rows, inner, columns),
        _node("MatMulNBits", ("x", "w", "scales"), _MICROSOFT, settings),
        w=np.resize(rng.integers(0, 256, _DRAWN, np.uint8), (columns, blocks, _BLOCK // 2)),
        scales=np.full(columns * blocks, 0.01, np.float32),
    )


def _model(
    input_type: int, sizes: tuple[int, int, int], node: bytes, **weights: NDArray[Any]
) -> bytes:
    """A ModelProto of one node from x [rows, inner] to y [rows, columns]."""
    rows, inner, columns = sizes
    graph = [_bytes(1, node), _bytes(2, b"product")]
    graph += [_bytes(5, _tensor(name, value)) for name, value in weights.items()]
    graph += [_bytes(11, _value("x", input_type, (rows, inner)))]
    graph += [_bytes(12, _value("y", _FLOAT, (rows, columns)))]
    opsets = [_bytes(8, _bytes(1, name) + _int(2, number))
              for name, number in ((b"", 18), (_MICROSOFT.encode(), 1))]  # fmt: skip
    return _int(1, 9) + b"".join(opsets) + _bytes(7, b"".join(graph))


def _node(
    kind: str, inputs: Sequence[str], domain: str, settings: dict[str, int] | None = None
) -> bytes:
    parts = [_bytes(1, name.encode()) for name in inputs]
    parts += [_bytes(2, b"y"), _bytes(4, kind.encode()), _bytes(7, domain.encode())]
    for name, value in (settings or {}).items():
        parts.append(_bytes(5, _bytes(1, name.encode()) + _int(3, value) + _int(20, 2)))
    return b"".join(parts)


def _tensor(name: str, value: NDArray[Any]) -> bytes:
    dims = b"".join(_int(1, size) for size in value.shape)
    kind = _int(2, _TYPES[value.dtype])
    return dims + kind + _bytes(8, name.encode()) + _bytes(9, value.tobytes())


def _value(name: str, kind: int, shape: Iterable[int]) -> bytes:
    dims = b"".join(_bytes(1, _int(1, size)) for size in shape)
    return _bytes(1, name.encode()) + _bytes(2, _bytes(1, _int(1, kind) + _bytes(2, dims)))


def _int(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*found, value))
