"""ONNX graphs under construction: nodes in memory, weights streamed to one data file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

DATA_FILE = "model.onnx.data"
ROTARY = "rotary"  # name of the angles of positions
_INLINE_BYTES = 1024  # smaller tensors stay in the graph
_ALIGNMENT = 64


class Tensors:
    """Named weights in a data file, which any number of graphs may use."""

    def __init__(self, data: BinaryIO) -> None:
        self.data = data
        self.protos: dict[str, onnx.TensorProto] = {}

    def add(self, name: str, value: NDArray[Any]) -> str:
        """Store a tensor; small ones go into the graphs that use them. A name is used once."""
        value = np.ascontiguousarray(value)
        tensor = described(name, value.dtype, value.shape)
        if value.nbytes < _INLINE_BYTES:
            tensor.raw_data = value.tobytes()
        else:
            self.data.write(b"\0" * (-self.data.tell() % _ALIGNMENT))
            _place(tensor, DATA_FILE, self.data.tell(), value.nbytes)
            self.data.write(value.data)
        if name in self.protos:
            raise ValueError(f"{name} is stored already")
        self.protos[name] = tensor
        return name


def described(name: str, kind: Any, dims: tuple[int, ...]) -> onnx.TensorProto:
    """A tensor of numpy's `kind` and these dims, without values yet."""
    code = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    return TensorProto(name=name, data_type=code, dims=dims)


def _place(tensor: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    tensor.data_location = TensorProto.EXTERNAL
    for key, entry in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(entry))


class Graph:
    """Nodes and initializers of one graph; values are named by strings."""

    def __init__(self, stored: Mapping[str, onnx.TensorProto]) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._stored = stored
        self._names = 0
        self._used: set[str] = set()

    def op(
        self, kind: str, *inputs: str, out: str = "", domain: str = "", **attributes: Any
    ) -> str:
        """Append a node of one output and return the output's name."""
        return self.ops(kind, 1, *inputs, out=out, domain=domain, **attributes)[0]

    def ops(
        self, kind: str, count: int, *inputs: str, out: str = "", domain: str = "", **attrs: Any
    ) -> list[str]:
        """Append a node of `count` outputs."""
        self._names += 1
        names = [out] if out else [f"{kind}_{self._names}_{i}" for i in range(count)]
        self.nodes.append(helper.make_node(kind, inputs, names, domain=domain, **attrs))
        return names

    def weight(self, name: str) -> str:
        """A stored tensor as a constant of this graph."""
        return self._once(self._stored[name])

    def made_at_load(
        self, name: str, kind: type[np.generic], dims: tuple[int, ...], location: str
    ) -> str:
        """A constant that is in no file: whoever loads the graph makes it."""
        tensor = described(name, kind, dims)
        _place(tensor, location, 0, int(np.prod(dims)) * np.dtype(kind).itemsize)
        return self._once(tensor)

    def ints(self, *values: int) -> str:
        """A constant vector of int64."""
        return self._small("ints_" + "_".join(map(str, values)), np.array(values, np.int64))

    def scalar(self, value: float, kind: type[np.generic] = np.float32) -> str:
        """A constant without dimensions."""
        return self._small(f"{kind.__name__}_{value}", np.array(value, kind))

    def floats(self, name: str, values: Sequence[Sequence[float]]) -> str:
        """A small constant matrix."""
        return self._small(name, np.array(values, np.float32))

    def _small(self, name: str, value: NDArray[Any]) -> str:
        tensor = described(name, value.dtype, value.shape)
        tensor.raw_data = value.tobytes()
        return self._once(tensor)

    def _once(self, tensor: onnx.TensorProto) -> str:
        if tensor.name not in self._used:
            self._used.add(tensor.name)
            self.initializers.append(tensor)
        return str(tensor.name)
