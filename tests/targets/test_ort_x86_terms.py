"""How the further terms of a series are written down for ONNX Runtime on x86: what they compute, and what is shared."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from abstract import ONES, both, dequantize, lower, matmul, measured, static
from equality import ops
from onnx import ModelProto
from tiny import models

from onnxcomp import runtime
from onnxcomp.methods.xint import XInt
from onnxcomp.numerics.affine import QParams, Scheme
from onnxcomp.pipeline import quantize
from onnxcomp.recipe import Bits, Recipe

Array = np.ndarray
LAYER = "y = MatMul(b, w)"
WEIGHT = dequantize("W", "ws", "w")


def residual(before: str, y: str, bits: int = 4, finer: float = 1 / 8, ranges: str = "") -> str:
    """The term behind `before` of a series of x; a `finer` of a power of two is exact."""
    options = f'bits = {bits}, signed = 0, granularity = "residual", finer = {finer}'
    return f" {y} = onnxcomp.FakeQuantize<{options}>(x, {before}{ranges}) "


def kernels(model: ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in runtime.optimized(model.SerializeToString()))


def digits(x: Array, scale: Array | float, bits: int) -> Array:
    """Symmetric codes, as a Clip of unsigned ones leaves them."""
    return np.clip(np.rint(x / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


# --- activations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 7])
def test_a_term_behind_a_dynamic_one_quantizes_what_it_left(bits: int):
    top = 2 ** (bits - 1) - 1
    x = np.linspace(-1, 1, 64, dtype=np.float32).reshape(-1, 4) * np.float32(top)  # so that the scale is 1

    model = matmul(
        measured("x", "a", "dynamic", bits) + residual("a", "b", bits) + residual("b", "c", bits, 0.25) + "y = Neg(c)"
    )

    rest = x - digits(x, 1.0, bits)
    rest = rest - digits(rest, 1 / 8, bits) / 8
    np.testing.assert_array_equal(both(model, x), -digits(rest, 1 / 32, bits) / 32)


def test_a_term_behind_the_runtimes_own_range_uses_its_scale(rng: np.random.Generator):
    x = rng.integers(0, 1021, size=(8, 4)).astype(np.float32) / 4
    x[0, :2] = 0, 255  # so that the scale is 1

    model = matmul(measured("x", "a", "dynamic") + residual("a", "b", 8) + "y = Neg(b)")

    np.testing.assert_array_equal(both(model, x), np.rint(x) - x)


def test_a_clip_ratio_of_eight_bits_makes_the_dynamic_range_symmetric(rng: np.random.Generator):
    x = rng.integers(-105, 106, size=(8, 4)).astype(np.float32)
    x[0, 0] = -105

    model = matmul(measured("x", "y", "dynamic", 8, 127 / 105))

    assert "DynamicQuantizeLinear" not in ops(model)
    np.testing.assert_allclose(both(model, x), x, rtol=3 * 2.0**-24)  # the scale is 1 up to three roundings


def test_a_term_per_token_is_scaled_behind_the_product(rng: np.random.Generator):
    x = rng.normal(size=(3, 5, 4)).astype(np.float32) * np.float32(8.0) ** np.arange(-2, 3).astype(np.float32)[:, None]
    x[..., 0] = 7 * np.float32(8.0) ** np.arange(-2, 3)  # scales are powers of two
    codes = rng.integers(-8, 8, size=(4, 4)).astype(np.int8)
    body = measured("x", "a", "token", 4) + residual("a", "b") + WEIGHT + LAYER

    model = lower(f"(float[N,5,4] x) => (float[N,5,4] y) {{ {body} }}", {"W": codes, "ws": ONES})

    scale = np.abs(x).max(axis=-1, keepdims=True) / 7
    unit = x / scale
    expected = digits(unit - digits(unit, 1.0, 4), 1 / 8, 4) / 8 @ codes.astype(np.float32) * scale
    found = both(model, x)
    # Of sums of four products below 64, each a multiple of 1/8: the factor 1/7 is rounded, and so is the scale.
    np.testing.assert_allclose(found, expected, rtol=4 * 2.0**-24)


def test_a_term_of_a_static_range_has_a_range_of_its_own(rng: np.random.Generator):
    x = rng.normal(size=(16, 4)).astype(np.float32) * 4
    own = {"s2": np.float32(1 / 16), "z2": np.uint8(3)}

    model = matmul(static("x", "a", 4) + residual("a", "b", 4, ranges=", s2, z2") + "y = Neg(b)", **own)

    rest = x - QParams(Scheme(4), np.asarray(np.float32(0.5)), np.asarray(np.uint8(8))).fake(x)
    expected = QParams(Scheme(4), np.asarray(own["s2"]), np.asarray(own["z2"])).fake(rest)
    np.testing.assert_array_equal(both(model, x), -expected)


def test_a_relu_that_a_further_term_reads_behind_is_not_absorbed():
    body = "h = Relu(x)" + static("h", "a", 4) + residual("a", "b", ranges=", s2, z2").replace("(x,", "(h,") + "y = Add(a, b)"

    assert ops(matmul(body, z=np.uint8(0), s2=np.float32(1 / 16), z2=np.uint8(0)))[0] == "Relu"


@pytest.mark.parametrize("first", [static("x", "a", 4), measured("x", "a", "dynamic", 4), measured("x", "a", "token", 4)])
def test_every_branch_is_an_integer_kernel_on_codes_that_are_made_once(rng: np.random.Generator, first: str):
    ranges = ", s2, z2" if "static" in first else ""
    other = residual("a", "c", ranges=", s3, z3" if ranges else "")  # as another layer on the same input has it
    body = first + residual("a", "b", ranges=ranges) + other + WEIGHT + dequantize("V", "vs", "v")
    body += (
        "p = MatMul(a, w) q = MatMul(a, v) r = MatMul(b, w) t = MatMul(b, v) h = Sum(p, q, r, t) m = MatMul(c, w) y = Sum(h, m)"
    )
    same = {name: value for i in (2, 3) for name, value in ((f"s{i}", np.float32(1 / 16)), (f"z{i}", np.uint8(8)))}

    model = matmul(body, V=np.eye(4, dtype=np.int8), vs=ONES, **same)

    found = kernels(model)
    assert found["MatMulIntegerToFloat"] == 5
    assert found["QuantizeLinear"] == 2
    assert found["MatMul"] == found["FusedMatMul"] == 0
    both(model, rng.integers(-4, 4, size=(3, 4)).astype(np.float32))


def test_the_scale_per_token_stands_once_behind_the_sum_of_branches():
    body = measured("x", "a", "token", 4) + residual("a", "b") + WEIGHT + "p = MatMul(a, w) q = MatMul(b, w) h = Sum(p, q)"

    model = matmul(body + "y = Tanh(h)")

    assert ops(model)[-5:] == ["MatMul", "MatMul", "Sum", "Mul", "Tanh"]


def test_the_sum_of_terms_per_token_is_scaled_once(rng: np.random.Generator):
    x = rng.normal(size=(6, 4)).astype(np.float32)
    x[:, 0] = 7

    model = matmul(
        measured("x", "a", "token", 4) + residual("a", "b") + "h = Sum(a, b) y = MatMul(h, F)", F=np.eye(4, dtype="f")
    )

    assert [op for op in ops(model) if op in ("Sum", "MatMul")] == ["Sum", "MatMul"]
    # Scales are 1 but for the rounding of 1/7.
    rest = x - digits(x, 1.0, 4)
    np.testing.assert_allclose(both(model, x), digits(x, 1.0, 4) + digits(rest, 1 / 8, 4) / 8, rtol=4 * 2.0**-24)


def test_a_quantizer_that_nothing_reads_is_left_out():
    body = measured("x", "a", "token", 4) + measured("x", "b", "dynamic", 4) + dequantize("V", "vs", "v") + WEIGHT + LAYER

    model = matmul(body, V=np.eye(4, dtype=np.int8), vs=ONES)

    assert ops(model).count("QuantizeLinear") == 1
    assert ops(model).count("Div") == 0
    assert "V" not in {i.name for i in model.graph.initializer}


# --- what stands around branches -------------------------------------------------------------------------------------

BRANCHES = static("x", "a", 4) + WEIGHT + dequantize("V", "vs", "v") + "p = MatMul(a, w) q = MatMul(a, v) s1 = Sum(p, q)"
SECOND = {"V": np.eye(4, dtype=np.int8), "vs": ONES, "b": np.array([1, 2, 3, 4], np.float32)}


def test_behind_branches_and_their_bias_an_add_stays_an_add(rng: np.random.Generator):
    model = matmul(BRANCHES + "h = Add(s1, b) r = Add(h, x) y = Tanh(r)", **SECOND)

    assert ops(model)[-5:] == ["MatMul", "Sum", "Sum", "Add", "Tanh"]
    assert kernels(model)["MatMulIntegerToFloat"] == 2


def test_the_gemm_of_a_series_keeps_its_bias(rng: np.random.Generator):
    body = BRANCHES.replace("p = MatMul(a, w)", "p = Gemm(a, w, b)")

    model = matmul(body + "y = Neg(s1)", **SECOND)

    assert kernels(model)["MatMulIntegerToFloat"] == 2
    x = rng.integers(-4, 4, size=(3, 4)).astype(np.float32)
    np.testing.assert_array_equal(both(model, x), -(3 * np.minimum(x, 3.5) + SECOND["b"]))  # codes reach to 7 / 2


# --- weights ---------------------------------------------------------------------------------------------------------


def test_the_terms_of_a_weight_in_front_of_a_float_conv_are_added_when_the_file_is_loaded(rng: np.random.Generator):
    first, second = (rng.integers(-7, 8, size=(4, 4, 1, 1)).astype(np.int8) for _ in range(2))
    body = dequantize("W", "ws", "w", 4, 0) + dequantize("V", "vs", "v", 4, 0) + "u = Sum(w, v) y = Conv(x, u)"
    scale = {"ws": ONES, "vs": ONES / 16}

    model = lower(f"(float[N,4,3,3] x) => (float[N,4,3,3] y) {{ {body} }}", {"W": first, "V": second} | scale)

    x = rng.integers(-8, 8, size=(2, 4, 3, 3)).astype(np.float32)
    np.testing.assert_array_equal(both(model, x), np.einsum("nchw,ocij->nohw", x, first + second / np.float32(16)))
    assert kernels(model) == {"Conv": 1}


# --- terms in one weight ---------------------------------------------------------------------------------------------


def test_a_gemm_whose_terms_are_added_up_in_float_takes_ranges_per_token():
    tiny, method = models()["gemm"], XInt(weight_terms=3, activation_terms=2, granularity="tensor")
    recipe = Recipe(bits=Bits(4, 4), activations="token", compensate=(method,))

    result = quantize(tiny.model, tiny.samples, recipe)

    assert all(site.activations == "token" for site in result.report.sites)
    assert result.report.verification.sqnr_db > 20


def test_where_products_of_8_bits_may_saturate_two_terms_are_no_one_weight():
    """Its codes would go up to 98, and two products of 7-bit weights are all that fits."""
    tiny, recipe = models()["residual"], Recipe(bits=Bits(4, 8), compensate=(XInt(keep="always"),))

    kept = {
        target: [
            d.site for d in quantize(tiny.model, tiny.samples, replace(recipe, target=target)).report.decisions if d.adopted
        ]
        for target in ("ort-x86", "ort-x86-avx2")
    }

    assert kept["ort-x86"]
    assert kept["ort-x86-avx2"] == []
