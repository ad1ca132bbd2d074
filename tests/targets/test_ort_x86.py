"""How activation quantizers are written down for ONNX Runtime on x86, and that they compute what their formulas say."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from abstract import ONES, both, dequantize, lower, matmul, measured, node, static
from equality import ops, parse, stored

from onnxcomp import runtime
from onnxcomp.graph.convert import to_model
from onnxcomp.graph.prepare import prepare
from onnxcomp.graph.sites import Site, find_sites
from onnxcomp.numerics.affine import QParams, Scheme
from onnxcomp.targets import find
from onnxcomp.targets.base import Plan, Settings

TARGET = find("ort-x86")

Array = np.ndarray

HALF, ZERO = np.float32(0.5), np.uint8(0)
W8A8 = Settings(8, 8, "static", "mse", 99.99, False)


# --- static activations ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_static_quantizer_computes_its_formula_at_every_width(rng: np.random.Generator, bits: int):
    zero = np.uint8(2 ** (bits - 1) - 1)
    x = (rng.normal(size=(64, 4)) * 2.0**bits / 4).astype(np.float32)

    model = matmul(static("x", "y", bits), z=zero)

    clip = ["Clip"] if bits < 8 else []
    assert ops(model) == ["QuantizeLinear", *clip, "DequantizeLinear"]
    expected = QParams(Scheme(bits), np.asarray(HALF), np.asarray(zero)).fake(x)
    np.testing.assert_array_equal(both(model, x), expected)


def test_the_clip_of_narrow_codes_is_one_of_integers():
    model = matmul(static("x", "y", 4))

    low, high = (stored(model)[name] for name in node(model, "Clip").input[1:])
    assert (low.dtype, low.tolist(), high.dtype, high.tolist()) == (np.uint8, 0, np.uint8, 15)


def test_the_bounds_of_clips_are_stored_once():
    model = matmul(static("x", "a", 4) + static("a", "b", 4) + static("b", "y", 6))

    assert sorted(stored(model)) == ["onnxcomp/max.u4", "onnxcomp/max.u6", "onnxcomp/zero.u8", "s", "z"]


# --- HardSwish, read from codes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "zero"), [(1, 1), (6, 6), (40, 100), (127, 255), (60, 250)])
def test_the_hard_swish_of_codes_is_a_product_of_codes_and_exact(steps: int, zero: int):
    scale = np.float32(3 / steps)
    codes = np.arange(256, dtype=np.int64)
    x = ((codes - zero) * scale).astype(np.float32).reshape(64, 4)

    model = matmul(static("x", "a") + "y = HardSwish(a)", s=scale, z=np.uint8(zero))

    assert ops(model) == ["QuantizeLinear", "DequantizeLinear", "Clip", "DequantizeLinear", "Mul"]
    wide = x.astype(np.float64)
    np.testing.assert_allclose(both(model, x), wide * np.clip(wide / 6 + 0.5, 0, 1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("scale", "zero"), [(3 / 40.5, 100), (3 / 40, 39), (3.2, 10)])
def test_a_hard_swish_whose_bend_is_no_code_stays(scale: float, zero: int):
    model = matmul(static("x", "a") + "y = HardSwish(a)", s=np.float32(scale), z=np.uint8(zero))

    assert ops(model) == ["QuantizeLinear", "DequantizeLinear", "HardSwish"]


# --- activation functions that a quantizer repeats -------------------------------------------------------------------

SIX = {"zero": np.float32(0), "six": np.float32(6)}


def test_a_relu_is_absorbed_where_zero_is_the_smallest_code(rng: np.random.Generator):
    x = rng.normal(size=(16, 4)).astype(np.float32)

    model = matmul("h = Relu(x)" + static("h", "a") + "y = Neg(a)", z=ZERO)

    assert ops(model) == ["QuantizeLinear", "DequantizeLinear", "Neg"]
    expected = QParams(Scheme(8), np.asarray(HALF), np.asarray(ZERO)).fake(np.maximum(x, 0))
    np.testing.assert_array_equal(both(model, x), -expected)


def test_a_relu_stays_where_codes_reach_below_zero():
    model = matmul("h = Relu(x)" + static("h", "y"), z=np.uint8(1))

    assert ops(model) == ["Relu", "QuantizeLinear", "DequantizeLinear"]


@pytest.mark.parametrize(
    ("scale", "bits", "absorbed"),
    [
        (6 / 255, 8, True),  # the largest code is 6, up to the rounding of its scale
        (5 / 255, 8, True),
        (6.001 / 255, 8, False),
        (6 / 255, 4, True),
        (6 / 15, 4, True),
        (7 / 15, 4, False),
    ],
)
def test_a_clip_is_absorbed_exactly_where_no_code_exceeds_its_bound(scale: float, bits: int, absorbed: bool):
    model = matmul("h = Clip(x, zero, six)" + static("h", "a", bits) + "y = Neg(a)", s=np.float32(scale), z=ZERO, **SIX)

    assert ("Clip" in [n.op_type for n in model.graph.node if "x" in n.input]) is not absorbed
    x = np.linspace(-8, 8, 512, dtype=np.float32).reshape(-1, 4)
    expected = QParams(Scheme(bits), np.asarray(np.float32(scale)), np.asarray(ZERO)).fake(np.clip(x, 0, 6))
    np.testing.assert_array_equal(both(model, x), -expected)


@pytest.mark.parametrize(("zero", "absorbed"), [(8, True), (9, False)])
def test_a_clip_below_zero_is_absorbed_where_the_smallest_code_is_not_below_it(zero: int, absorbed: bool):
    body = "h = Clip(x, low, high)" + static("h", "y", 4)

    model = matmul(body, low=np.float32(-4), high=np.float32(4), z=np.uint8(zero))  # -8 / 2 = -4, (15 - 8) / 2 < 4

    assert ("Clip" not in [n.op_type for n in model.graph.node if "x" in n.input]) is absorbed


def test_a_clip_to_bounds_that_are_computed_stays():
    body = "top = ReduceMax<keepdims = 0>(x)  h = Clip(x, , top)" + static("h", "y")

    assert "Clip" in ops(matmul(body, z=ZERO))


def test_a_clip_of_one_bound_is_judged_by_that_bound():
    assert "Clip" not in ops(matmul("h = Clip(x, zero)" + static("h", "y"), z=ZERO, **SIX))
    assert "Clip" in ops(matmul("h = Clip(x, , six)" + static("h", "y"), z=ZERO, **SIX))  # 255 / 2 > 6


def test_an_activation_function_that_others_read_stays():
    model = matmul("h = Relu(x)" + static("h", "y") + "y2 = Tanh(h)", z=ZERO, y="float[N,4] y, float[N,4] y2")

    assert ops(model) == ["Relu", "QuantizeLinear", "DequantizeLinear", "Tanh"]


def test_an_activation_function_that_is_an_output_stays():
    model = matmul("h = Relu(x)" + static("h", "y"), z=ZERO, y="float[N,4] y, float[N,4] h")

    assert ops(model) == ["Relu", "QuantizeLinear", "DequantizeLinear"]


def test_an_absorbed_tensor_goes_on_naming_its_best_approximation():
    model = matmul("h = Relu(x)" + static("h", "a") + "y = Tanh(a)", z=ZERO)

    assert [list(n.output) for n in model.graph.node] == [["a/codes"], ["h"], ["y"]]


# --- ranges at run time ----------------------------------------------------------------------------------------------


def fake_symmetric(x: Array, scale: Array, bits: int) -> Array:
    middle = 2 ** (bits - 1)
    return np.clip(np.rint(x / scale) + middle, 0, 2**bits - 1) - middle


@pytest.mark.parametrize(("bits", "ratio"), list(itertools.product((4, 6, 8), (1.0, 0.75))))
def test_a_range_per_token_computes_its_formula(rng: np.random.Generator, bits: int, ratio: float):
    x = rng.normal(size=(3, 5, 4)).astype(np.float32) * np.float32(10.0) ** np.arange(5).astype(np.float32)[:, None]
    x[1, 2] = 0
    codes = rng.integers(-8, 8, size=(4, 4)).astype(np.int8)
    body = measured("x", "a", "token", bits, ratio) + dequantize("W", "ws", "w") + "y = MatMul(a, w)"

    model = lower(f"(float[N,5,4] x) => (float[N,5,4] y) {{ {body} }}", {"W": codes, "ws": ONES})

    factor = np.float32(np.float32(ratio) / (2 ** (bits - 1) - 1))
    scale = np.maximum(np.abs(x).max(axis=-1, keepdims=True) * factor, np.float32(1e-12))
    # The products are of integers, so only the last multiplication rounds.
    expected = (fake_symmetric(x, scale, bits) @ codes.astype(np.float32)) * scale
    found = both(model, x)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)
    assert np.all(found[1, 2] == 0)


def test_the_scale_per_token_stands_behind_every_reader():
    body = measured("x", "a", "token") + dequantize("W", "ws", "w") + "h = MatMul(a, w) g = MatMul(a, w) y = Add(h, g)"

    model = matmul(body)

    assert ops(model).count("ReduceMax") == 1
    products = [n for n in model.graph.node if n.op_type == "MatMul"]
    assert [list(n.output) for n in products] == [["h/unscaled"], ["g/unscaled"]]
    assert [list(n.output) for n in model.graph.node if n.op_type == "Mul" and n.input[0].endswith("/unscaled")] == [
        ["h"],
        ["g"],
    ]


def test_a_dynamic_range_of_eight_bits_is_the_runtimes_own():
    model = matmul(measured("x", "y", "dynamic"))

    assert ops(model) == ["DynamicQuantizeLinear", "DequantizeLinear"]


@pytest.mark.parametrize("bits", [4, 7])
def test_a_narrow_dynamic_range_computes_its_formula(rng: np.random.Generator, bits: int):
    x = rng.normal(size=(6, 4)).astype(np.float32)

    model = matmul(measured("x", "y", "dynamic", bits))

    scale = np.abs(x).max() * np.float32(1 / (2 ** (bits - 1) - 1))
    np.testing.assert_array_equal(both(model, x), fake_symmetric(x, scale, bits) * scale)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_dynamic_range_of_zeros_gives_zeros(bits: int):
    assert not both(matmul(measured("x", "y", "dynamic", bits)), np.zeros((2, 4), np.float32)).any()


# --- Gemm and MatMul keep a float output behind an integer kernel ----------------------------------------------------

LAYER = static("x", "a") + dequantize("W", "ws", "w")
QUANTIZED = ["QuantizeLinear", "DequantizeLinear", "DequantizeLinear"]
BIAS = {"b": np.array([1, 2, 3, 4], np.float32)}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("y = Gemm(a, w, b)", ["MatMul", "Sum"]),
        ("y = Gemm(a, w)", ["MatMul"]),
        ("h = MatMul(a, w) y = Add(h, b)", ["MatMul", "Sum"]),
        ("h = MatMul(a, w) y = Add(b, h)", ["MatMul", "Sum"]),
        ("h = MatMul(a, w) y = Relu(h)", ["MatMul", "Sum", "Relu"]),
        ("h = MatMul(a, w) t = Tanh(h) y = Mul(t, h)", ["MatMul", "Sum", "Tanh", "Mul"]),
        ("h = MatMul(a, w) y = Tanh(h)", ["MatMul", "Tanh"]),
        ("h = MatMul(a, w) g = Add(h, b) y = Relu(g)", ["MatMul", "Sum", "Relu"]),
        ("g = MatMul(a, w) h = Sum(g, b) y = Add(h, x)", ["MatMul", "Sum", "Add"]),
        ("y = MatMul(a, w)", ["MatMul"]),
    ],
)
def test_what_would_make_a_product_float_is_kept_apart_by_a_sum(rng: np.random.Generator, body: str, expected: list[str]):
    model = matmul(LAYER + body, **BIAS)

    assert ops(model) == [*QUANTIZED, *expected]
    assert "MatMulIntegerToFloat" in [n.op_type for n in runtime.optimized(model.SerializeToString())]
    both(model, rng.integers(-4, 4, size=(3, 4)).astype(np.float32))


def test_a_float_gemm_stays_as_it_is():
    assert ops(matmul("y = Gemm(x, F, b)", F=np.eye(4, dtype=np.float32), **BIAS)) == ["Gemm"]


@pytest.mark.parametrize(
    "layer",
    [
        "r = Conv(a, F)",
        "c = Conv(a, F) r = Relu(c)",
        "F1 = Cast<to = 1>(W) F2 = Mul(F1, s) r = Conv(a, F2)",
        "p = MaxPool<kernel_shape = [1, 1]>(a) r = Conv(p, F)",
        "c = Conv(a, F) r = Transpose<perm = [0, 1, 3, 2]>(c)",
        "c = Conv(a, F) p = Relu(c) r = MaxPool<kernel_shape = [1, 1]>(p)",
        "r = ConvTranspose(a, F)",
    ],
)
def test_a_float_layer_between_integers_stays_float(rng: np.random.Generator, layer: str):
    """The runtime would quantize its weight on its own, with one scale for all channels."""
    body = static("x", "a") + layer + static("r", "q") + "y = Neg(q)"
    weight = rng.normal(size=(4, 4, 1, 1)).astype(np.float32)
    weights = {"F": weight, "W": (weight * 40).astype(np.int8), "s": np.float32(0.5), "z": np.uint8(0)}
    model = lower(f"(float[N,4,3,3] x) => (float[N,4,3,3] y) {{ {body} }}", weights)
    executed = [n.op_type for n in runtime.optimized(model.SerializeToString())]

    assert "QLinearConv" not in executed
    assert executed.count("DequantizeLinear") == 2
    both(model, rng.normal(size=(2, 4, 3, 3)).astype(np.float32))


@pytest.mark.parametrize("moves", ["q0 = Identity(m)", "q0 = Transpose<perm = [0, 1, 3, 2]>(m)"])
def test_a_float_pool_in_front_of_a_quantizer_stays_float(rng: np.random.Generator, moves: str):
    """The runtime would move the quantizer in front of it, and pool integers forty times as slowly."""
    layer = "w = DequantizeLinear<axis = 0>(W, ws) c = Conv(q, w)"
    body = (
        f"t = Tanh(x) m = MaxPool<kernel_shape = [2, 2]>(t) {moves} "
        + static("q0", "q")
        + layer
        + static("c", "d")
        + "y = Neg(d)"
    )
    weights = {"W": rng.integers(-99, 99, (4, 4, 1, 1)).astype(np.int8), "ws": np.full(4, 0.01, np.float32)}
    model = lower(
        f"(float[N,4,5,5] x) => (float[N,4,4,4] y) {{ {body} }}", weights | {"s": np.float32(0.02), "z": np.uint8(128)}
    )

    pools = [n for n in runtime.optimized(model.SerializeToString()) if "MaxPool" in n.op_type]

    assert [pool.input[0] for pool in pools] == ["t"]
    assert "QLinearConv" in [n.op_type for n in runtime.optimized(model.SerializeToString())]
    both(model, rng.normal(size=(2, 4, 5, 5)).astype(np.float32))


def test_a_pool_of_codes_is_left_alone():
    body = static("x", "a") + "m = MaxPool<kernel_shape = [2, 2]>(a) " + static("m", "q") + "y = Neg(q)"
    model = lower(f"(float[N,4,5,5] x) => (float[N,4,4,4] y) {{ {body} }}", {"s": np.float32(0.02), "z": np.uint8(128)})

    assert "Sum" not in ops(model)


def test_a_shape_is_that_of_the_codes(rng: np.random.Generator):
    body = static("x", "a") + "s0 = Shape(a) g = Relu(a) y = Reshape(g, s0)"
    model = lower(f"(float[N,4] x) => (float[N,4] y) {{ {body} }}", {"s": np.float32(0.5), "z": np.uint8(8)})

    made = {output: n.op_type for n in model.graph.node for output in n.output}
    assert made[node(model, "Shape").input[0]] == "QuantizeLinear"
    both(model, rng.normal(size=(3, 4)).astype(np.float32))


# --- the target ------------------------------------------------------------------------------------------------------


def test_the_target_is_found_by_its_name():
    assert find("ort-x86") == TARGET


@pytest.mark.parametrize(("bits", "version"), [(4, "1.23"), (5, "1.23"), (7, "1.18"), (8, "1.18")])
def test_a_file_needs_a_newer_runtime_where_it_packs_weights(bits: int, version: str):
    site = Site("fc", "MatMul", "layer", ("x",), "y", "y", -1, weight="w")
    plan = Plan((site, replace(site, weight=None, kind="join")), {"fc": replace(W8A8, weight_bits=bits)}, ())

    assert TARGET.requirements(plan) == (
        f"ONNX Runtime {version} or newer, with graph optimizations enabled (the default).",
        "A CPU with VNNI for exact 8-bit products; on older ones write for ort-x86-avx2, or set the session option "
        'session.x64quantprecision = "1".',
    )


def test_no_abstract_node_is_left():
    model = matmul(LAYER + "h = MatMul(a, w)" + measured("h", "c", "dynamic") + static("c", "y", 4))

    assert {n.domain for n in model.graph.node} == {""}


def test_planning_leaves_the_float_graph_as_it_is():
    model = parse("g (float[N,4] x) => (float[N,4] y) { [fc] y = MatMul(x, w) }", {"w": np.eye(4, dtype=np.float32)}, opset=21)
    graph = prepare(model, runtime.infer_types).graph
    before = to_model(graph, model).SerializeToString()

    plan = TARGET.plan(graph, find_sites(graph), {"fc": W8A8})

    assert [p.tensor for p in plan.points] == ["x"]
    assert to_model(graph, model).SerializeToString() == before
