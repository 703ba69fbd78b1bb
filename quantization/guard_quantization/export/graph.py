"""An ONNX graph under construction: nodes in memory, weights streamed to a data file."""

from __future__ import annotations

from typing import Any, BinaryIO

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

DATA_FILE = "model.onnx.data"
_INLINE_BYTES = 1024  # smaller tensors stay in the graph
_ALIGNMENT = 64


class Graph:
    """Nodes and initializers under construction; tensors are named by strings."""

    def __init__(self, data: BinaryIO) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.data = data
        self._names = 0
        self._constants: set[str] = set()

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

    def constant(self, name: str, value: NDArray[Any]) -> str:
        """Add an initializer; large ones go to the data file. A name stands for one value."""
        if name in self._constants:
            return name
        self._constants.add(name)
        value = np.ascontiguousarray(value)
        tensor = TensorProto(
            name=name,
            data_type=helper.np_dtype_to_tensor_dtype(value.dtype),
            dims=value.shape,
        )
        if value.nbytes < _INLINE_BYTES:
            tensor.raw_data = value.tobytes()
        else:
            self.data.write(b"\0" * (-self.data.tell() % _ALIGNMENT))
            place = (
                ("location", DATA_FILE),
                ("offset", self.data.tell()),
                ("length", value.nbytes),
            )
            self.data.write(value.data)
            tensor.data_location = TensorProto.EXTERNAL
            for key, entry in place:
                tensor.external_data.add(key=key, value=str(entry))
        self.initializers.append(tensor)
        return name

    def ints(self, *values: int) -> str:
        """A constant vector of int64."""
        return self.constant("ints_" + "_".join(map(str, values)), np.array(values, np.int64))

    def scalar(self, value: float, kind: type[np.generic] = np.float32) -> str:
        """A constant without dimensions."""
        return self.constant(f"{kind.__name__}_{value}", np.array(value, kind))
