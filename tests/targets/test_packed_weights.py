"""Weights of 2, 3, 5 and 6 bits: they take as many bits in the file, and are the same numbers as in 4 or 8."""

from __future__ import annotations

import math

import numpy as np
import pytest
from abstract import both, dequantize, matmul, static
from equality import ops
from onnx import ModelProto
from tiny import Tiny, bias, build, feeds, weight

from onnxcomp import runtime, targets
from onnxcomp.graph.weights import tensor_bytes
from onnxcomp.numerics.planes import planes
from onnxcomp.pipeline import Result, quantize
from onnxcomp.recipe import Bits, Recipe
from onnxcomp.targets.nbits import stored_bits

X = static("x", "a")
WIDE = 4096
"""Columns from which on the tables are smaller than what they save."""


def product(codes: np.ndarray, bits: int) -> ModelProto:
    """Codes [4, n], whose values lie within `bits`, written with as many bits."""
    body = X + dequantize("W", "ws", "w", bits) + "y = MatMul(a, w)"
    return matmul(body, f"float[N,{codes.shape[1]}] y", W=codes, ws=scales(codes.shape[1]))


def scales(columns: int) -> np.ndarray:
    """Powers of two, so that every product is exact."""
    return np.resize(np.float32([0.5, 1, 2, 4]), columns)


def random_codes(rng: np.random.Generator, bits: int, columns: int) -> np.ndarray:
    ends = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes = rng.integers(ends[0], ends[1] + 1, size=(4, columns)).astype(np.int8)
    codes.flat[:2] = ends
    return codes


def weight_bytes(model: ModelProto) -> int:
    """What is stored of the weight W."""
    return sum(tensor_bytes(i) for i in model.graph.initializer if i.name.partition(".")[0] == "W")


@pytest.mark.parametrize("bits", [2, 3, 5, 6])
def test_packed_codes_take_their_bits_and_are_the_same_numbers_as_whole_ones(rng: np.random.Generator, bits: int):
    codes = random_codes(rng, bits, WIDE)
    x = rng.normal(size=(5, 4)).astype(np.float32)

    packed, whole = product(codes, bits), product(codes, 4 if bits < 4 else 8)

    assert "Gather" in ops(packed)
    assert "Gather" not in ops(whole)
    assert weight_bytes(packed) == codes.size * bits // 8
    np.testing.assert_array_equal(both(packed, x), both(whole, x))


@pytest.mark.parametrize("bits", [2, 3, 5, 6])
@pytest.mark.parametrize("columns", [4, WIDE + 1])
def test_few_codes_and_a_number_that_eight_does_not_divide_are_stored_whole(rng: np.random.Generator, bits: int, columns: int):
    codes = random_codes(rng, bits, columns)
    x = rng.integers(-8, 8, size=(5, 4)).astype(np.float32) / 2

    model = product(codes, bits)

    assert "Gather" not in ops(model)
    assert weight_bytes(model) == codes.size // (2 if bits < 4 else 1)
    np.testing.assert_array_equal(both(model, x), np.clip(x, -4, None) @ (codes * scales(columns)))


def test_two_weights_share_the_tables(rng: np.random.Generator):
    w, v = random_codes(rng, 3, WIDE), random_codes(rng, 3, WIDE)
    body = X + dequantize("W", "ws", "w", 3) + dequantize("V", "ws", "v", 3) + "h = MatMul(a, w) g = MatMul(a, v) y = Sum(g, h)"

    model = matmul(body, f"float[N,{WIDE}] y", W=w, V=v, ws=np.ones(WIDE, np.float32))

    tables = [n.input[0] for n in model.graph.node if n.op_type == "Gather"]
    assert (len(tables), len(set(tables))) == (4, 2)


@pytest.mark.parametrize(
    ("target", "bits", "expected"),
    [
        ("ort-x86", 2, 2), ("ort-x86", 3, 3), ("ort-x86", 4, 4), ("ort-x86", 5, 5), ("ort-x86", 7, 8), ("ort-arm", 6, 6),
        ("qnn", 2, 4), ("portable", 3, 4), ("portable", 5, 8), ("tensorrt", 2, 8), ("xnnpack", 4, 8),
    ],
)  # fmt: skip
def test_the_room_of_a_code(target: str, bits: int, expected: int):
    assert stored_bits(bits, 4 * WIDE, targets.find(target).encoding) == expected


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
        target="ort-x86",
        bits=Bits(bits, 8),
        rounding="nearest",
        activations="static",
        compensate=(),
        rotation="none",
        equalization="none",
        moments="none",
    )
    return quantize(tiny.model, tiny.samples, recipe)


@pytest.mark.parametrize("op", ["MatMul", "Conv"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_a_wide_model_takes_as_many_bits_and_runs_on_integers(op: str, bits: int):
    tiny = wide(op)
    float_bytes = next(len(i.raw_data) for i in tiny.model.graph.initializer if i.name == "w")

    report = narrow(tiny, bits).report

    site = next(site for site in report.sites if site.op == op)
    assert (site.integer, site.kernel) == (True, {"MatMul": "MatMulIntegerToFloat", "Conv": "QLinearConv"}[op])
    channels = {"MatMul": 512, "Conv": 256}[op]
    assert site.weight_bytes == float_bytes * bits // 32 + 5 * channels
    # Beside it lie tables of 2 kB, scales, zero points, biases and the account itself.
    table = 2048 * len(planes(bits)) if bits != 4 else 0
    assert report.output_bytes - table - 9 * channels - 6000 <= 1.05 * float_bytes * bits / 32


@pytest.mark.parametrize("bits", [2, 3])
def test_the_packed_form_gives_the_outputs_of_its_codes(bits: int):
    tiny = wide("MatMul")
    model = narrow(tiny, bits).model
    kernels = [node.op_type for node in runtime.optimized(model.SerializeToString())]

    outputs = [runtime.Session(model.SerializeToString(), optimize=on).run(tiny.samples[0])["y"] for on in (True, False)]

    assert "Gather" not in kernels  # folded when the file is loaded
    step = np.abs(outputs[1]).max() * 2.0**-20
    assert np.abs(outputs[0] - outputs[1]).max() <= step
