"""QParams against ONNX Runtime bit for bit; from_range and weight_qparams against their definitions."""

from __future__ import annotations

import re

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from onnxcomp.errors import DataError, RecipeError
from onnxcomp.numerics.affine import SMALLEST_SCALE, QParams, Scheme, from_range, weight_qparams

SCHEMES = [Scheme(bits, signed) for bits in (2, 3, 4, 8) for signed in (False, True)]


def run_ort(q: QParams, x: NDArray[np.float32], optimized: bool = False) -> tuple[NDArray, NDArray]:
    """Codes and values of QuantizeLinear -> Clip -> DequantizeLinear."""
    kind = TensorProto.INT8 if q.scheme.signed else TensorProto.UINT8
    constants = {"scale": q.scale, "zero": q.zero_point}
    constants |= {"low": np.array(q.scheme.qmin, q.scheme.dtype), "high": np.array(q.scheme.qmax, q.scheme.dtype)}
    axis = {} if q.axis is None else {"axis": q.axis}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["raw"], **axis),
        helper.make_node("Clip", ["raw", "low", "high"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["values"], **axis),
    ]
    graph = helper.make_graph(
        nodes,
        "qdq",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [
            helper.make_tensor_value_info("codes", kind, x.shape),
            helper.make_tensor_value_info("values", TensorProto.FLOAT, x.shape),
        ],
        [onnx.numpy_helper.from_array(np.asarray(a), name) for name, a in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = ort.SessionOptions()
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    codes, values = session.run(None, {"x": x})
    return codes, values


def edge_values(scale: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """Halves, the floats next to them, zeros of both signs, denormals, extremes, and ordinary values."""
    halves = (np.arange(-300, 300, dtype=np.float32) + np.float32(0.5)) * np.float32(scale)
    top = np.finfo(np.float32).max
    special = np.array([0.0, -0.0, 1e-45, -1e-45, top, -top, np.inf, -np.inf, 1e30, -1e30], np.float32)
    beside = [np.nextafter(halves, np.float32(sign * np.inf)) for sign in (1, -1)]
    return np.concatenate([halves, *beside, special, (rng.normal(size=2000) * scale * 100).astype(np.float32)])


def assert_same_bits(q: QParams, x: NDArray[np.float32], optimized: bool = False) -> None:
    codes, values = run_ort(q, x, optimized)
    assert q.quantize(x).dtype == codes.dtype
    np.testing.assert_array_equal(q.quantize(x), codes)
    np.testing.assert_array_equal(q.dequantize(codes).view(np.uint32), values.view(np.uint32))
    np.testing.assert_array_equal(q.fake(x).view(np.uint32), values.view(np.uint32))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_tensor_gets_the_codes_and_values_of_ort(scheme: Scheme) -> None:
    rng = np.random.default_rng(0)
    for scale in (1.0, 0.1, 1 / 3, 3e-5, SMALLEST_SCALE, 1e20):
        for zero in (scheme.qmin, scheme.qmin + 1, scheme.midpoint, scheme.qmax):
            q = QParams(scheme, np.asarray(scale, np.float32), np.asarray(zero, scheme.dtype))
            with np.errstate(over="ignore"):  # halves of a huge scale
                assert_same_bits(q, edge_values(scale, rng))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_an_axis_gets_the_codes_and_values_of_ort(scheme: Scheme, axis: int) -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(5, 6, 7)).astype(np.float32)
    channels = x.shape[axis]
    scale = rng.uniform(0.01, 0.5, channels).astype(np.float32)
    zero = rng.integers(scheme.qmin, scheme.qmax + 1, channels).astype(scheme.dtype)
    assert_same_bits(QParams(scheme, scale, zero, axis), x)


def test_the_optimized_graph_gives_the_same_bits() -> None:
    q = from_range(-1.0, 2.0, Scheme(4))
    assert_same_bits(q, edge_values(float(q.scale), np.random.default_rng(2)), optimized=True)


def test_halves_go_to_even_codes() -> None:
    q = QParams(Scheme(8, signed=True), np.asarray(1, np.float32), np.asarray(0, np.int8))
    x = np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5], np.float32)
    np.testing.assert_array_equal(q.quantize(x), [-2, -2, 0, 0, 2, 2])


def test_float64_and_float16_are_taken_as_float32() -> None:
    q = from_range(-1.0, 1.0, Scheme())
    x = np.random.default_rng(3).normal(size=100).astype(np.float16)
    np.testing.assert_array_equal(q.fake(x), q.fake(x.astype(np.float32)))
    np.testing.assert_array_equal(q.fake(x.astype(np.float64)), q.fake(x.astype(np.float32)))


def test_a_scheme_spans_two_to_the_bits_codes() -> None:
    unsigned, signed = Scheme(4), Scheme(4, signed=True)
    assert (unsigned.qmin, unsigned.qmax, unsigned.midpoint) == (0, 15, 8)
    assert (signed.qmin, signed.qmax, signed.midpoint) == (-8, 7, 0)


@pytest.mark.parametrize("bits", [1, 9, 0, -4, True, 4.0])
def test_bits_outside_two_to_eight_are_refused(bits: int) -> None:
    with pytest.raises(RecipeError, match=f"^bits = {bits} is not supported. Give a whole number from 2 to 8, or 16.$"):
        Scheme(bits)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_zero_is_exact_and_the_ends_are_within_a_step(scheme: Scheme) -> None:
    rng = np.random.default_rng(4)
    for lo, hi in [(-1.0, 3.0), (0.5, 2.0), (-7.0, -2.0), *rng.normal(scale=10, size=(50, 2))]:
        lo, hi = min(lo, hi), max(lo, hi)
        q = from_range(lo, hi, scheme)
        ends = np.array([min(lo, 0.0), 0.0, max(hi, 0.0)], np.float32)
        values = q.fake(ends)
        assert values[1] == 0.0
        # rounding the zero point moves the ends by at most half a step, rounding x / scale by another half
        assert np.max(np.abs(values - ends)) <= q.scale * np.float32(1 + 1e-5)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_range_from_zero_has_its_zero_point_at_the_end(scheme: Scheme) -> None:
    assert from_range(0.0, 6.0, scheme).zero_point == scheme.qmin
    assert from_range(2.0, 6.0, scheme).zero_point == scheme.qmin
    assert from_range(-6.0, 0.0, scheme).zero_point == scheme.qmax


@pytest.mark.parametrize("signed", [False, True])
def test_a_symmetric_range_fixes_the_zero_point(signed: bool) -> None:
    scheme = Scheme(4, signed, symmetric=True)
    q = from_range(-3.5, 1.0, scheme)
    assert q.zero_point == (0 if signed else 8)
    assert q.scale == np.float32(0.5)
    np.testing.assert_array_equal(q.fake(np.array([-3.5, 3.5], np.float32)), [-3.5, 3.5])


@pytest.mark.parametrize("scheme", [Scheme(), Scheme(4, True), Scheme(8, True, True), Scheme(4, False, True)], ids=str)
def test_a_dead_tensor_gets_a_positive_scale_and_stays_zero(scheme: Scheme) -> None:
    q = from_range(0.0, 0.0, scheme)
    assert q.scale == np.float32(SMALLEST_SCALE)
    np.testing.assert_array_equal(q.fake(np.zeros(3, np.float32)), np.zeros(3, np.float32))


def test_ranges_per_channel_equal_ranges_one_by_one() -> None:
    lo, hi = np.array([-1.0, 0.0, -5.0]), np.array([2.0, 0.0, -1.0])
    q = from_range(lo, hi, Scheme(4), axis=1)
    assert q.axis == 1
    for i in range(3):
        single = from_range(lo[i], hi[i], Scheme(4))
        assert (q.scale[i], q.zero_point[i]) == (single.scale, single.zero_point)


@pytest.mark.parametrize("end", [np.inf, np.nan])
def test_a_range_that_is_not_finite_is_refused(end: float) -> None:
    text = "The values to quantize hold NaN or infinity, so they have no range. Check the samples and the model."
    with pytest.raises(DataError, match=f"^{re.escape(text)}$"):
        from_range(-1.0, end, Scheme())


def widest(w: np.ndarray, bits: int) -> np.ndarray:
    """The smallest scale per row that clips nothing, float64 [C, 1, ..]."""
    rows = w.reshape(len(w), -1).astype(np.float64)
    scale = np.maximum(rows.max(axis=1) / (2 ** (bits - 1) - 1), -rows.min(axis=1) / 2 ** (bits - 1))
    return scale.reshape(-1, *[1] * (w.ndim - 1))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_mse_weights_are_as_good_as_a_brute_force_search(bits: int) -> None:
    rng = np.random.default_rng(6)
    w = np.concatenate([rng.normal(size=(4, 900)), rng.laplace(size=(4, 900))]).astype(np.float32)
    q = weight_qparams(w, 0, bits)
    found = np.square(q.fake(w).astype(np.float64) - w).mean(axis=1)
    brute = np.full(len(w), np.inf)
    for factor in np.linspace(0.1, 1.0, 1000):
        codes = np.clip(np.rint(w / (widest(w, bits) * factor)), q.scheme.qmin, q.scheme.qmax)
        brute = np.minimum(brute, np.square(codes * widest(w, bits) * factor - w).mean(axis=1))
    # The error is flat to second order: a factor within 1 % of the best costs well under 0.05 dB at these widths
    assert np.all(found <= brute * 10**0.005)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_mse_weights_are_never_worse_than_minmax(bits: int) -> None:
    w = np.random.default_rng(7).standard_t(3, size=(8, 3, 3, 3)).astype(np.float32)
    scale = widest(w, bits)
    plain = np.clip(np.rint(w / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale
    errors = [np.square(values - w).sum(axis=(1, 2, 3)) for values in (weight_qparams(w, 0, bits).fake(w), plain)]
    # 27 float32 squares a channel, each of a value rounded twice: sums agree to 100 roundings
    assert np.all(errors[0] <= errors[1] * (1 + 100 * 2.0**-23))


def test_weights_do_not_depend_on_how_channels_are_grouped() -> None:
    w = np.random.default_rng(8).normal(size=(200, 700)).astype(np.float32)
    whole = weight_qparams(w, 0, 4).scale
    np.testing.assert_array_equal(whole[90:120], weight_qparams(w[90:120], 0, 4).scale)
    np.testing.assert_array_equal(whole, weight_qparams(np.ascontiguousarray(w.T), 1, 4).scale)


def test_a_dead_channel_gets_a_positive_scale() -> None:
    w = np.random.default_rng(9).normal(size=(3, 10)).astype(np.float32)
    w[1] = 0.0
    q = weight_qparams(w, 0, 4)
    assert q.scale[1] == np.float32(SMALLEST_SCALE)
    assert not q.fake(w)[1].any()
    assert weight_qparams(np.zeros((3, 0), np.float32), 0, 4).scale.shape == (3,)
