"""Weights of 2 and 3 bits: they take as many bits in the file, and are the same numbers as in the form of 4 bits."""

from __future__ import annotations

import math

import numpy as np
import pytest
from abstract import both, dequantize, lower, matmul, node, static
from equality import ops, stored
from onnx import ModelProto, TensorProto
from tiny import Tiny, bias, build, feeds, weight

from onnxcomp import runtime, targets
from onnxcomp.pipeline import Result, quantize
from onnxcomp.recipe import Bits, Recipe
from onnxcomp.targets.lowering import stored_bits

UNPACKED = ["QuantizeLinear", "DequantizeLinear", "Cast", "DequantizeLinear", "MatMul"]
PACKED = ["QuantizeLinear", "DequantizeLinear", "Cast", "GatherND", "Reshape", "DequantizeLinear", "MatMul"]
X = static("x", "a")


def product(codes: np.ndarray, bits: int) -> ModelProto:
    """Codes [4, n], whose values lie within `bits`, written with as many bits."""
    scale = np.linspace(0.5, 2, codes.shape[1]).astype(np.float32)
    body = X + dequantize("W", "ws", "w", bits) + "y = MatMul(a, w)"
    return matmul(body, f"float[N,{codes.shape[1]}] y", W=codes, ws=scale)


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("columns", [1, 3, 4])
def test_packed_codes_are_the_same_numbers_as_int4_ones(rng: np.random.Generator, bits: int, columns: int):
    codes = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), size=(4, columns)).astype(np.int8)
    codes.flat[:2] = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    x = rng.normal(size=(5, 4)).astype(np.float32)

    packed, plain = product(codes, bits), product(codes, 4)

    assert (ops(packed), ops(plain)) == (PACKED, UNPACKED)
    np.testing.assert_array_equal(both(packed, x), both(plain, x))


@pytest.mark.parametrize("bits", [2, 3])
def test_four_codes_are_as_many_digits_of_four_bits_as_they_have_bits(bits: int):
    model = product(np.zeros((4, 4), np.int8), bits)

    (weight,) = (i for i in model.graph.initializer if i.name == "W")
    assert (weight.data_type, tuple(weight.dims), len(weight.raw_data)) == (TensorProto.UINT4, (4, bits), 2 * bits)
    table = stored(model)[node(model, "GatherND").input[0]]
    assert (table.dtype, table.shape) == (np.int8, (16,) * bits + (4,))


@pytest.mark.parametrize("bits", [2, 3])
def test_a_number_of_codes_that_four_does_not_divide_is_stored_as_int4(rng: np.random.Generator, bits: int):
    codes = rng.integers(-2, 2, size=(3, 3)).astype(np.int8)
    body = X + dequantize("W", "ws", "w", bits) + "y = MatMul(a, w)"

    model = lower(f"(float[N,3] x) => (float[N,3] y) {{ {body} }}",
                  {"W": codes, "ws": np.ones(3, np.float32), "s": np.float32(0.5), "z": np.uint8(8)})  # fmt: skip

    assert ops(model) == UNPACKED
    x = rng.integers(-8, 8, size=(5, 3)).astype(np.float32) / 2
    np.testing.assert_array_equal(both(model, x), np.clip(x, -4, None) @ codes.astype(np.float32))


@pytest.mark.parametrize("bits", [2, 3])
def test_two_weights_share_the_table(bits: int):
    codes = np.zeros((4, 4), np.int8)
    body = (
        X
        + dequantize("W", "ws", "w", bits)
        + dequantize("V", "ws", "v", bits)
        + "h = MatMul(a, w) g = MatMul(a, v) y = Sum(g, h)"
    )

    model = matmul(body, W=codes, V=codes + 1)

    tables = {n.input[0] for n in model.graph.node if n.op_type == "GatherND"}
    assert tables == {f"onnxcomp/codes.i{bits}"}


@pytest.mark.parametrize(
    ("target", "bits", "size", "expected"),
    [
        ("ort-x86", 2, 8, 2), ("ort-x86", 3, 8, 3), ("ort-x86", 2, 9, 4), ("ort-x86", 4, 8, 4), ("ort-x86", 5, 8, 8),
        ("qnn", 2, 8, 4), ("portable", 3, 8, 4), ("tensorrt", 2, 8, 8), ("xnnpack", 4, 8, 8),
    ],
)  # fmt: skip
def test_the_room_of_a_code(target: str, bits: int, size: int, expected: int):
    assert stored_bits(bits, size, targets.find(target).encoding) == expected


# --- whole models ----------------------------------------------------------------------------------------------------


def wide(op: str) -> Tiny:
    """One layer that is large enough for its weight to be nearly all of the file."""
    rng = np.random.default_rng(0)
    if op == "MatMul":
        text, shape, w = "(float[N,256] x) => (float[N,512] y) { h = MatMul(x, w) y = Add(h, b) }", (256,), (256, 512)
    else:
        text = (
            "(float[N,64,4,4] x) => (float[N,256] y) { h = Conv(x, w, b) t = Relu(h) p = GlobalAveragePool(t) y = Flatten(p) }"
        )
        shape, w = (64, 4, 4), (256, 64, 3, 3)
    weights = {"w": weight(rng, *w, fan_in=math.prod(w) // max(w[0], w[-1])), "b": bias(rng, 512 if op == "MatMul" else 256)}
    return build("wide", f'<ir_version: 10, opset_import: ["" : 21]> wide {text}', weights, feeds(rng, *shape))


def narrow(tiny: Tiny, bits: int) -> Result:
    recipe = Recipe(
        target="ort-x86", bits=Bits(bits, 8), rounding="nearest", activations="static", compensate=(), rotation="none"
    )
    return quantize(tiny.model, tiny.samples, recipe)


@pytest.mark.parametrize("op", ["MatMul", "Conv"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_wide_model_takes_as_many_bits_and_runs_on_integers(op: str, bits: int):
    tiny = wide(op)
    float_bytes = next(len(i.raw_data) for i in tiny.model.graph.initializer if i.name == "w")

    report = narrow(tiny, bits).report

    site = next(site for site in report.sites if site.op == op)
    assert (site.integer, site.kernel) == (True, {"MatMul": "MatMulIntegerToFloat", "Conv": "QLinearConv"}[op])
    channels = {"MatMul": 512, "Conv": 256}[op]
    assert site.weight_bytes == float_bytes * bits // 32 + 5 * channels
    # The table of 3 bits is a constant of 16 kB; the rest are scales, zero points, biases and the account itself.
    table = 4 * 16**bits if bits < 4 else 0
    assert report.output_bytes - table - 9 * channels - 6000 <= 1.05 * float_bytes * bits / 32


@pytest.mark.parametrize("bits", [2, 3])
def test_the_packed_form_gives_the_outputs_of_its_codes(bits: int):
    tiny = wide("MatMul")
    model = narrow(tiny, bits).model
    kernels = [node.op_type for node in runtime.optimized(model.SerializeToString())]

    outputs = [runtime.Session(model.SerializeToString(), optimize=on).run(tiny.samples[0])["y"] for on in (True, False)]

    assert "GatherND" not in kernels  # folded when the file is loaded
    step = np.abs(outputs[1]).max() * 2.0**-20
    assert np.abs(outputs[0] - outputs[1]).max() <= step
