"""How weights and biases are stored for ONNX Runtime on x86, and that they compute what their formulas say."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from abstract import attribute, both, dequantize, lower, matmul, measured, node, static
from equality import ops, stored
from onnx import ModelProto, TensorProto

from onnxcomp import runtime
from onnxcomp.numerics.affine import QParams, Scheme

HALF = np.float32(0.5)


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(4, 9))
def test_weights_of_four_bits_are_stored_as_int4_behind_a_cast(rng: np.random.Generator, bits: int):
    codes = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), size=(4, 4)).astype(np.int8)
    scale = np.array([0.5, 1, 2, 4], np.float32)
    x = rng.integers(-8, 8, size=(5, 4)).astype(np.float32) / 2

    model = matmul(static("x", "a") + dequantize("W", "ws", "w", bits) + "y = MatMul(a, w)", W=codes, ws=scale)

    (weight,) = (i for i in model.graph.initializer if i.name == "W")
    assert weight.data_type == (TensorProto.INT4 if bits <= 4 else TensorProto.INT8)
    cast = ["Cast"] if bits <= 4 else []
    assert ops(model) == ["QuantizeLinear", "DequantizeLinear", *cast, "DequantizeLinear", "MatMul"]
    if cast:
        assert attribute(node(model, "Cast"), "to") == TensorProto.INT8
    # Halves by integers by powers of two: exact.
    np.testing.assert_array_equal(both(model, x), np.clip(x, -4, 123.5) @ (codes * scale))


def test_a_weight_has_a_zero_point_per_channel_and_its_own_axis():
    model = matmul(static("x", "a") + dequantize("W", "ws", "w") + "y = MatMul(a, w)")

    last = [n for n in model.graph.node if n.op_type == "DequantizeLinear"][-1]
    assert attribute(last, "axis") == 1
    zero = stored(model)[last.input[2]]
    assert (zero.dtype, zero.tolist()) == (np.int8, [0, 0, 0, 0])


@pytest.mark.parametrize("bits", [4, 8])
def test_a_weight_of_integer_and_float_readers_is_stored_once_and_read_in_both_ways(rng: np.random.Generator, bits: int):
    codes = rng.integers(-8, 8, size=(4, 4)).astype(np.int8)
    scale = np.array([0.5, 1, 2, 4], np.float32)
    x = rng.integers(-8, 8, size=(5, 4)).astype(np.float32) / 4
    body = static("x", "a") + dequantize("W", "ws", "w", bits) + "b = MatMul(a, w) c = MatMul(x, w) y = Add(b, c)"

    model = matmul(body, W=codes, ws=scale)

    assert sum(i.name.startswith("W") for i in model.graph.initializer) == 1
    makers = {n.output[0]: n.op_type for n in model.graph.node}
    assert sorted(makers[n.input[1]] for n in model.graph.node if n.op_type == "MatMul") == ["DequantizeLinear", "Mul"]
    np.testing.assert_array_equal(both(model, x), (np.clip(np.rint(x * 2) / 2, -4, 123.5) + x) @ (codes * scale))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_weight_in_front_of_float_activations_is_cast_and_multiplied(rng: np.random.Generator, bits: int):
    codes = rng.integers(-8, 8, size=(4, 4)).astype(np.int8)
    scale = np.array([0.5, 1, 2, 4], np.float32)
    x = rng.integers(-8, 8, size=(5, 4)).astype(np.float32)

    model = matmul(dequantize("W", "ws", "w", bits) + "y = MatMul(x, w)", W=codes, ws=scale)

    assert ops(model) == ["Cast", "Mul", "MatMul"]
    assert attribute(node(model, "Cast"), "to") == TensorProto.FLOAT
    assert stored(model)["ws"].shape == (1, 4)
    np.testing.assert_array_equal(both(model, x), x @ (codes * scale))


def test_the_scale_of_a_float_convs_weight_runs_along_its_first_axis(rng: np.random.Generator):
    codes = rng.integers(-8, 8, size=(2, 3, 1, 1)).astype(np.int8)
    x = rng.integers(-8, 8, size=(1, 3, 2, 2)).astype(np.float32)
    body = dequantize("W", "ws", "w", 4, axis=0) + "y = Conv(x, w)"

    model = lower(f"(float[N,3,2,2] x) => (float[N,2,2,2] y) {{ {body} }}", {"W": codes, "ws": np.array([0.5, 2], np.float32)})

    assert stored(model)["ws"].shape == (2, 1, 1, 1)
    expected = np.einsum("nchw,oc->nohw", x, codes[:, :, 0, 0] * np.array([[0.5], [2]]))
    np.testing.assert_array_equal(both(model, x), expected.astype(np.float32))


# --- Conv: an int32 bias ---------------------------------------------------------------------------------------------


def conv(weights: Mapping[str, object], quantize: str | None = None) -> ModelProto:
    body = static("x", "a") if quantize is None else quantize
    body += dequantize("W", "ws", "w", axis=0) + "h = Conv(a, w, b)" + static("h", "y", scale="t")
    constants = {"s": HALF, "z": np.uint8(128), "t": np.float32(0.25)} | weights
    return lower(f"(float[N,2,3,3] x) => (float[N,2,3,3] y) {{ {body} }}", constants)


KERNEL = np.array([[3, -5], [7, 1]], np.int8).reshape(2, 2, 1, 1)


def test_the_bias_of_a_conv_is_stored_in_steps_of_input_scale_times_weight_scale():
    b, ws = np.array([0.7, -3.3], np.float32), np.array([0.25, 2.0], np.float32)

    model = conv({"W": KERNEL, "ws": ws, "b": b})

    (made,) = (n for n in model.graph.node if n.output[0] == node(model, "Conv").input[2])
    codes, scale, zero = (stored(model)[name] for name in made.input)
    assert scale.tolist() == [0.5 * 0.25, 0.5 * 2.0]
    assert (codes.dtype, codes.tolist()) == (np.int32, [round(0.7 / 0.125), round(-3.3 / 1.0)])
    assert (zero.dtype, zero.tolist()) == (np.int32, [0, 0])


def test_a_conv_between_quantizers_is_an_integer_kernel_that_computes_its_formula(rng: np.random.Generator):
    ws = np.array([0.25, 0.5], np.float32)
    model = conv({"W": KERNEL, "ws": ws, "b": np.array([0.5, -3], np.float32)})
    x = rng.integers(-30, 30, size=(2, 2, 3, 3)).astype(np.float32) / 2

    found = both(model, x)

    optimized = runtime.optimized(model.SerializeToString())
    assert [n.op_type for n in optimized] == ["QuantizeLinear", "QLinearConv", "DequantizeLinear"]
    # Everything is a multiple of 1/8 far below 2^24: exact up to the last quantizer.
    h = np.einsum("nchw,oc->nohw", x, KERNEL[:, :, 0, 0] * ws[:, None]) + np.array([0.5, -3])[:, None, None]
    expected = QParams(Scheme(8), np.asarray(np.float32(0.25)), np.asarray(np.uint8(128))).fake(h)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("bias", [1.0, -1e4])
def test_a_dead_channel_keeps_its_bias(bias: float):
    """A scale of 1e-12 would need a code of 2e12 for a bias of one, more than 32 bits hold."""
    dead = np.where(np.arange(2)[:, None, None, None] == 1, 0, KERNEL).astype(np.int8)
    b = np.array([0.5, bias], np.float32)

    model = conv({"W": dead, "ws": np.array([0.25, 1e-12], np.float32), "b": b, "t": np.float32(1e4)})

    name = node(model, "Conv").name
    codes, scale = stored(model)[f"{name}/int32-bias.i32"], stored(model)[f"{name}/int32-bias.scale"]
    assert abs(int(codes[1])) <= 2**30
    # A float32 scale makes the code half a step and the product three float32 roundings away from the bias.
    assert abs(codes[1] * np.float64(scale[1]) - bias) <= 4 * 2.0**-24 * abs(bias)
    assert codes[0] * scale[0] == 0.5
    assert stored(model)["W"][0].tolist() == dead[0].tolist()


def test_weights_too_small_for_their_bias_shrink_with_their_scale_raised():
    """ws = 2^-29 and b = 2^8 would need the code 2^8 / (0.5 2^-29) = 2^38, which becomes 2^30 at ws = 2^-21."""
    b, ws = np.array([0, 2.0**8], np.float32), np.array([1, 2.0**-29], np.float32)
    kernel = np.full((2, 2, 1, 1), 127, np.int8)

    model = conv({"W": kernel, "ws": ws, "b": b})

    name = node(model, "Conv").name
    assert stored(model)[f"{name}/int32-bias.i32"].tolist() == [0, 2**30]
    assert stored(model)["ws"].tolist() == [1, 2.0**-21]
    assert stored(model)["W"].reshape(2, 2).tolist() == [[127, 127], [0, 0]]  # rint(127 / 256) = 0


def test_the_bias_stays_float_where_the_range_is_measured_at_run_time():
    body = measured("x", "a", "dynamic") + dequantize("W", "ws", "w", axis=0) + "y = Conv(a, w, b)"

    model = lower(
        f"(float[N,2,3,3] x) => (float[N,2,3,3] y) {{ {body} }}",
        {"W": KERNEL, "ws": np.ones(2, np.float32), "b": np.ones(2, np.float32)},
    )

    assert node(model, "Conv").input[2] == "b"
