"""Block-wise quantization: layout, error bounds, and agreement with onnxruntime."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from onnx import TensorProto, helper

from guard_quantization.export.graph import Graph
from guard_quantization.export.int4 import fake_quantize_rows, quantize_blocks, stack, unpack
from guard_quantization.export.layers import Linear, Matrix
from guard_service.engines.plans import INT8

Floats = NDArray[np.float32]


def matrix(rows: int = 48, columns: int = 200) -> Floats:
    return np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)


def nearest(weight: Floats, bits: int, block: int) -> Floats:
    """Plain symmetric round-to-nearest."""
    rows, columns = weight.shape
    padded = np.pad(weight, ((0, 0), (0, -columns % block))).reshape(rows, -1, block)
    scale = np.abs(padded).max(-1, keepdims=True) / (2 ** (bits - 1) - 1)
    found: Floats = (np.rint(padded / scale) * scale).reshape(rows, -1)[:, :columns]
    return found


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [32, 64, 128])
def test_the_search_beats_plain_rounding(bits: int, block: int) -> None:
    weight = matrix()
    found = quantize_blocks(weight, bits, block).dequantize()
    plain = ((nearest(weight, bits, block) - weight) ** 2).sum()
    assert ((found - weight) ** 2).sum() < (0.85 if bits == 4 else 1.0) * plain


@pytest.mark.parametrize(("bits", "most"), [(4, 0.09), (8, 0.0055)])
def test_relative_error_of_normal_weights(bits: int, most: float) -> None:
    weight = matrix()
    error = quantize_blocks(weight, bits, 32).dequantize() - weight
    assert np.sqrt((error**2).mean()) / weight.std() < most


@settings(max_examples=100, deadline=None)
@given(
    arrays(np.float32, (3, 37), elements=st.floats(-100, 100, width=32)),
    st.sampled_from([4, 8]),
)
def test_no_weight_is_off_by_more_than_its_block_allows(weight: Floats, bits: int) -> None:
    blocks = quantize_blocks(weight, bits, 32)
    assert blocks.codes.shape == (3, 2, 32)
    assert blocks.codes.max() < 2**bits
    extreme = np.abs(np.pad(weight, ((0, 0), (0, 27))).reshape(3, 2, 32)).max(-1)
    error = np.abs(np.pad(blocks.dequantize() - weight, ((0, 0), (0, 27)))).reshape(3, 2, 32)
    assert (error.max(-1) <= 0.45 * extreme + 1e-4).all()


def test_zeros_stay_zero_and_values_on_the_grid_are_exact() -> None:
    assert not quantize_blocks(np.zeros((2, 64), np.float32), 4, 32).dequantize().any()
    grid = (np.arange(-8, 8, dtype=np.float32) * np.float32(0.25))[None].repeat(2, axis=0)
    np.testing.assert_array_equal(quantize_blocks(grid, 4, 16).dequantize(), grid)


def test_important_channels_are_kept_closer() -> None:
    weight = matrix(64, 32)
    importance = np.ones(32, np.float32)
    importance[:4] = 100
    plain = quantize_blocks(weight, 4, 32).dequantize() - weight
    weighed = quantize_blocks(weight, 4, 32, importance).dequantize() - weight
    assert (weighed[:, :4] ** 2).sum() < 0.7 * (plain[:, :4] ** 2).sum()


def test_weights_that_are_not_finite_are_refused() -> None:
    weight = matrix()
    weight[3, 5] = np.inf
    with pytest.raises(ValueError, match="not finite"):
        quantize_blocks(weight, 4, 32)
    with pytest.raises(ValueError, match="3 bits"):
        quantize_blocks(matrix(), 3, 32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [64, 200])
def test_the_packing_is_what_onnxruntime_reads(bits: int, columns: int) -> None:
    weight = matrix(24, columns)
    blocks = quantize_blocks(weight, bits, 32)
    node = helper.make_node(
        "MatMulNBits",
        ["x", "codes", "scales"],
        ["y"],
        domain="com.microsoft",
        K=columns,
        N=24,
        bits=bits,
        block_size=32,
    )
    packed, scales = blocks.packed(), blocks.scales.astype(np.float32)
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 24])],
        [
            helper.make_tensor("codes", TensorProto.UINT8, packed.shape, packed.tobytes(), True),
            helper.make_tensor("scales", TensorProto.FLOAT, scales.shape, scales.tobytes(), True),
        ],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    x = np.random.default_rng(1).standard_normal((5, columns)).astype(np.float32)
    np.testing.assert_allclose(
        session.run(["y"], {"x": x})[0], x @ blocks.dequantize().T, atol=2e-4
    )


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [64, 75])
def test_what_was_packed_is_unpacked(bits: int, columns: int) -> None:
    blocks = quantize_blocks(matrix(8, columns), bits, 32)
    found = unpack(blocks.packed(), blocks.scales, bits, columns)
    np.testing.assert_array_equal(found.codes, blocks.codes)
    np.testing.assert_array_equal(found.dequantize(), blocks.dequantize())
    assert found.shape == (8, columns) and found.size == 8 * columns
    assert found.nbytes == blocks.packed().nbytes + blocks.scales.nbytes


@pytest.mark.parametrize(
    ("bits", "columns", "rows", "scale"),
    [(3, 64, 8, 1.0), (8, 64, 8, 1.0), (4, 65, 8, 1.0), (4, 32, 8, 1.0), (4, 64, 7, 1.0)]
    + [(4, 64, 8, np.inf)],
)
def test_what_no_matrix_packs_to_is_refused(
    bits: int, columns: int, rows: int, scale: float
) -> None:
    blocks = quantize_blocks(matrix(8, 64), 4, 32)
    scales = (blocks.scales * np.float16(scale))[:rows]
    with pytest.raises(ValueError):
        unpack(blocks.packed(), scales, bits, columns)


def test_stacked_rows_are_those_of_the_parts() -> None:
    weight = matrix(12, 64)
    parts = [quantize_blocks(weight[:5], 4, 32), quantize_blocks(weight[5:], 4, 32)]
    whole = quantize_blocks(weight, 4, 32)
    np.testing.assert_array_equal(stack(parts).packed(), whole.packed())
    some = np.array([7, 2])
    np.testing.assert_array_equal(stack(parts).take(some).dequantize(), whole.dequantize()[some])
    with pytest.raises(ValueError, match="one layout"):
        stack([parts[0], replace(parts[1], columns=60)])


@pytest.mark.parametrize("extreme", [np.nan, np.inf, 1e6, -1e30])
def test_weights_that_no_scale_holds_are_refused(extreme: float) -> None:
    weight = matrix()
    weight[3, 70] = extreme
    with pytest.raises(ValueError, match="finite|float16"):
        quantize_blocks(weight, 4, 32)


def test_the_largest_weights_that_are_taken_come_back() -> None:
    weight = matrix() * 0 + np.float32(7 * 65504)
    found = quantize_blocks(weight, 4, 32).dequantize()
    np.testing.assert_allclose(found, weight, rtol=0.07)


@settings(max_examples=100, deadline=None)
@given(arrays(np.float32, (2, 3, 7), elements=st.floats(-1000, 1000, width=32)))
def test_int8_rows_equal_their_definition_in_float64(x: Floats) -> None:
    wide = x.astype(np.float64)
    scale = np.maximum(np.abs(wide).max(-1, keepdims=True) / 127, 1e-9)
    found = fake_quantize_rows(x)
    assert found.dtype == np.float32
    assert (np.abs(found - wide) <= 0.5 * scale * (1 + 1e-3) + 1e-9).all()
    whole = np.rint(wide / scale)
    clear = np.abs(wide / scale - whole) < 0.499  # no tie that float32 may break otherwise
    np.testing.assert_allclose(found[clear], (whole * scale)[clear], rtol=1e-5, atol=1e-9)


def test_int8_rows_are_those_of_the_rows_kernel() -> None:
    rng = np.random.default_rng(3)
    x = (rng.standard_normal((10, 16)) * rng.uniform(0.01, 30, (10, 1))).astype(np.float32)
    x[7] = 0
    g = Graph({})
    y = Linear(g, INT8, 4)("x", Matrix("one", 16, 16, 8, 16))
    graph = helper.make_graph(
        [*g.nodes, helper.make_node("Identity", [y], ["y"])],
        "rows",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [10, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [10, 16])],
        g.initializers,
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    options = onnxruntime.SessionOptions()
    exact = {"one.int8": np.eye(16, dtype=np.int8), "one.int8_scales": np.ones(16, np.float32)}
    values = map(onnxruntime.OrtValue.ortvalue_from_numpy, exact.values())
    options.add_external_initializers(list(exact), list(values))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    np.testing.assert_allclose(session.run(["y"], {"x": x})[0], fake_quantize_rows(x), rtol=1e-5)
