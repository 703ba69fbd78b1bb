"""Kernel plans: the ways in which an artifact's stored weights can be multiplied.

`model.onnx` multiplies the weights as they are stored. The graphs of the other plans share its data
file and want their matrices expanded when they are loaded (`expand`): `int8` has one scale per
output channel and per token, `fp32` none.
"""

from __future__ import annotations

STORED, INT8, FP32 = "stored", "int8", "fp32"
PLANS = (STORED, INT8, FP32)
AUTO = "auto"
EXPANDED = "expanded"  # where tensors are said to lie that are made when a graph is loaded


def graph_file(plan: str) -> str:
    """The plan's graph in an artifact folder."""
    return "model.onnx" if plan == STORED else f"model.{plan}.onnx"
