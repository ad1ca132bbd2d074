"""The proof: every law is broken on purpose by a damaged model, and the error says which."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import onnx
import pytest
from equality import parse
from onnx import ModelProto

from onnxcomp import runtime
from onnxcomp.errors import ModelError, VerificationError
from onnxcomp.report.model import Verification
from onnxcomp.verify import demand_equal, made_up_feed, sqnr, verify

Array = np.ndarray
X = np.array([[1, 2, -2, 4]], np.float32)
FLOAT = "g (float[N,4] x) => (float[N,4] y) { y = Mul(x, w) }"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.onnx"


def model(text: str, **weights: object) -> ModelProto:
    return parse(text, {key: np.asarray(value) for key, value in weights.items()}, opset=21)


def proof(
    path: Path, damaged: ModelProto, reference: ModelProto, feeds: list[Mapping[str, Array]], expected: object = None
) -> Verification:
    onnx.save(damaged, path)
    return verify(path, runtime.Session(reference.SerializeToString()), feeds, expected)  # pyright: ignore[reportArgumentType]


def refusal(*arguments: object) -> str:
    with pytest.raises(VerificationError) as caught:
        proof(*arguments)  # pyright: ignore[reportArgumentType]
    return str(caught.value)


def scale(w: float) -> ModelProto:
    """y = w x"""
    return model(FLOAT, w=np.float32(w))


def test_a_model_that_holds_is_described(path: Path):
    feeds = [{"x": X}, {"x": np.concatenate([X, 2 * X])}]

    found = proof(path, scale(1.5), scale(1), feeds, [{"y": 1.5 * f["x"]} for f in feeds])

    assert found == Verification(
        checker=f"onnx {onnx.__version__}",
        runtime=f"onnxruntime {runtime.version()}",
        samples=3,
        agreement_db=200.0,
        sqnr_db=10 * math.log10(1 / 0.25),  # noise is a quarter of the signal's energy; all sums are exact
        expected_db=200.0,
    )


def test_without_a_walk_nothing_is_expected(path: Path):
    assert proof(path, scale(1), scale(1), [{"x": X}]).expected_db is None


def test_inputs_that_share_no_leading_axis_are_one_sample(path: Path):
    text = "g (float[N,4] x, float[4] z) => (float[N,4] y) { y = Add(x, z) }"
    feeds = [{"x": np.concatenate([X, X]), "z": X[0]}]

    assert proof(path, model(text), model(text), feeds).samples == 1


# --- the laws --------------------------------------------------------------------------------------------------------


def test_a_model_that_the_checker_refuses_is_refused(path: Path):
    damaged = scale(1)
    damaged.graph.node[0].input[0] = "nowhere"

    found = refusal(path, damaged, scale(1), [{"x": X}])

    assert found.startswith("The quantized model does not run: The ONNX checker refuses the model: Nodes in a graph must be")
    assert found.endswith(" Nothing was written.")


def test_a_model_that_cannot_be_loaded_is_refused(path: Path):
    damaged = model(FLOAT, w=np.ones(4, np.float32))
    damaged.graph.initializer[0].dims[0] = 2

    found = refusal(path, damaged, scale(1), [{"x": X}])

    assert found.startswith("The quantized model does not run: ")
    assert found.endswith(" Nothing was written.")


def test_a_model_that_fails_when_it_runs_is_refused(path: Path):
    damaged = model("g (float[N,4] x) => (float[N,4] y) { y = Reshape(x, shape) }", shape=np.array([3, 4]))

    found = refusal(path, damaged, scale(1), [{"x": X}])

    assert found.startswith("The quantized model does not run: ONNX Runtime cannot run the model: ")
    assert found.endswith(" Nothing was written.")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_output_that_is_not_finite_is_refused(path: Path, value: float):
    found = refusal(path, scale(value), scale(1), [{"x": X}])

    assert found == "Output 'y' of the quantized model is not finite where the float one's is. Nothing was written."


def test_an_output_that_is_finite_with_optimizations_only_is_refused(path: Path):
    """The runtime folds the second factor into the Conv: 3e38 * 10 overflows without that, 3e38 * 1e-30 * 10 does not."""
    text = "g (float[1,1,2,2] x) => (float[1,1,2,2] y) { h = Conv(x, w) y = Mul(h, v) }"
    weights = {"w": np.full((1, 1, 1, 1), 3e38, np.float32), "v": np.full((1, 1, 1), 1e-30, np.float32)}
    reference = model("g (float[1,1,2,2] x) => (float[1,1,2,2] y) { y = Mul(x, w) }", w=np.float32(3e8))

    found = refusal(path, model(text, **weights), reference, [{"x": np.full((1, 1, 2, 2), 10, np.float32)}])

    assert found == "Output 'y' of the quantized model is not finite where the float one's is. Nothing was written."


def test_a_walk_that_arrived_at_no_number_proves_nothing(path: Path):
    found = refusal(path, scale(1), scale(1), [{"x": X}], [{"y": np.nan * X}])

    assert (
        found == "Output 'y': the runs and calibration differ by more than twice the quantization error. Nothing was written."
    )


def test_an_output_may_be_infinite_where_the_float_one_is(path: Path):
    text = "g (float[N,4] x) => (float[N,4] y) { y = Div(x, w) }"
    masked = model(text, w=np.array([1, 0, 0, 1], np.float32))

    assert proof(path, masked, masked, [{"x": X}]).sqnr_db == 200.0


def test_runs_that_differ_with_optimizations_on_are_refused(path: Path, rng: np.random.Generator):
    """The runtime fuses a weight whose scale runs along the wrong axis, as if it ran along the right one."""
    codes, scales = rng.integers(-127, 128, (8, 8)).astype(np.int8), rng.uniform(0.01, 0.02, 8).astype(np.float32)
    x = rng.normal(size=(4, 8)).astype(np.float32)
    shape = "g (float[N,8] x) => (float[N,8] y)"
    text = (
        "c = QuantizeLinear(x, s, z) a = DequantizeLinear(c, s, z) w = DequantizeLinear<axis = 0>(W, ws, wz) y = MatMul(a, w)"
    )
    damaged = model(f"{shape} {{ {text} }}", W=codes, ws=scales, wz=np.zeros(8, np.int8), s=np.float32(2**-5), z=np.uint8(128))
    reference = model(f"{shape} {{ y = MatMul(x, w) }}", w=codes * scales[:, None])

    found = refusal(path, damaged, reference, [{"x": x}])

    assert found == (
        "Output 'y': the runs with optimizations on and off differ by more than twice the quantization error. "
        "Nothing was written."
    )


def test_a_file_that_is_not_what_calibration_arrived_at_is_refused(path: Path):
    """Calibration arrived at 1.1 x, an error of 0.1 |x|; the file computes 1.35 x, 0.25 |x| away from that."""
    found = refusal(path, scale(1.35), scale(1), [{"x": X}], [{"y": np.float32(1.1) * X}])

    assert found == (
        "Output 'y': the runs and calibration differ by more than twice the quantization error. Nothing was written."
    )


@pytest.mark.parametrize(("w", "holds"), [(1.0, True), (1.375, True), (1.4, False)])
def test_the_file_may_be_twice_as_far_from_calibration_as_calibration_is_from_float(path: Path, w: float, holds: bool):
    arguments = (path, scale(w), scale(1), [{"x": X}], [{"y": np.float32(1.125) * X}])

    if holds:
        proof(*arguments)
    else:
        assert "the runs and calibration differ" in refusal(*arguments)


@pytest.mark.parametrize(("w", "holds"), [(1 + 2**-7, True), (1 + 2**-6, False)])
def test_where_calibration_is_exact_a_hundredth_of_the_signal_is_allowed(path: Path, w: float, holds: bool):
    """1e-4 of the energy lies between 2^-14 and 2^-12."""
    arguments = (path, scale(w), scale(1), [{"x": X}], [{"y": X}])

    if holds:
        proof(*arguments)
    else:
        assert "the runs and calibration differ" in refusal(*arguments)


def test_every_output_is_held_to_the_laws(path: Path):
    text = "g (float[N,4] x) => (float[N,4] y, float[N,4] z) { y = Mul(x, w) z = Mul(x, v) }"
    one, two = np.float32(1), np.float32(2)

    found = refusal(path, model(text, w=one, v=two), model(text, w=one, v=one), [{"x": X}], [{"y": X, "z": X}])

    assert found.startswith("Output 'z': ")


def test_an_output_of_whole_numbers_may_change(path: Path):
    text = "g (float[N,4] x) => (int64[N,1] y) { s = Mul(x, w) y = ArgMax<axis = 1>(s) }"
    reference, damaged = model(text, w=np.float32(1)), model(text, w=np.float32(-1))

    found = proof(path, damaged, reference, [{"x": X}], [{"y": np.array([[3]])}])

    assert found.sqnr_db == 10 * math.log10(3**2 / (3 - 2) ** 2)  # the class is 2 in place of 3


# --- figures ---------------------------------------------------------------------------------------------------------


def test_sqnr_is_that_of_the_worst_output_over_all_feeds():
    want = [{"a": np.array([3.0, 1.0]), "b": np.array([10.0])}, {"a": np.array([0.0, 0.0]), "b": np.array([0.0])}]
    found = [{"a": np.array([3.0, 1.0]), "b": np.array([10.0])}, {"a": np.array([0.0, 1.0]), "b": np.array([0.1])}]

    assert sqnr(found, want) == 10 * math.log10(10 / 1)  # b: 100 over 0.01


def test_equal_outputs_have_two_hundred_decibels():
    assert sqnr([{"a": X}], [{"a": X}]) == 200.0


# --- a feed for models without data ----------------------------------------------------------------------------------


def test_a_made_up_feed_has_the_models_own_shapes_with_free_dimensions_one():
    text = """g (float[N,3] x, int64[T,2] ids, bool m, float16[2] h) => (float[N,3] a, int64[T,2] b, bool c, float16[2] d)
        { a = Neg(x) b = Neg(ids) c = Not(m) d = Neg(h) }"""
    session = runtime.Session(model(text).SerializeToString())

    feed = made_up_feed(session)

    assert {name: (a.shape, a.dtype.name) for name, a in feed.items()} == {
        "x": ((1, 3), "float32"), "ids": ((1, 2), "int64"), "m": ((), "bool"), "h": ((2,), "float16"),
    }  # fmt: skip
    assert (feed["ids"] == 1).all()
    assert np.all(feed["x"] != 0)
    session.run(feed)


CACHE = """g (float[B,seq,2] x, float[B,past,2] cache, float[B,total,2] mask) => (float[B,total,2] y) {
    all = Concat<axis = 1>(cache, x) second = Gather<axis = 1>(mask, one) y = Mul(all, second)
}"""


def test_a_made_up_feed_fits_a_cache_and_what_is_new():
    """What attends to both is as long as the two together: with sizes of 1 throughout it would not run."""
    session = runtime.Session(model(CACHE, one=np.array([1])).SerializeToString())

    feed = made_up_feed(session)

    assert {name: a.shape for name, a in feed.items()} == {"x": (1, 1, 2), "cache": (1, 1, 2), "mask": (1, 2, 2)}


@pytest.mark.parametrize(("kernel", "length"), [(2, 2), (30, 32), (400, 1024)])
def test_a_made_up_feed_is_as_long_as_the_frames_that_it_is_cut_into(kernel: int, length: int):
    text = "g (float[B,1,T] x) => (float[B,1,F] y) { y = Conv(x, w) }"
    session = runtime.Session(model(text, w=np.ones((1, 1, kernel), np.float32)).SerializeToString())

    assert made_up_feed(session)["x"].shape == (1, 1, length)


@pytest.mark.parametrize(("kernel", "side"), [(1, 1), (2, 2), (30, 32), (60, 256)])
def test_a_made_up_image_is_large_enough(kernel: int, side: int):
    text = "g (float[B,1,H,W] x) => (float[B,1,G,V] y) { y = Conv(x, w) }"
    session = runtime.Session(model(text, w=np.ones((1, 1, kernel, kernel), np.float32)).SerializeToString())

    assert made_up_feed(session)["x"].shape == (1, 1, side, side)


def test_made_up_integers_are_zero_where_one_does_not_run():
    session = runtime.Session(model("g (int64[N] i) => (float[N,2] y) { y = Gather(t, i) }", t=X[:, :2]).SerializeToString())

    assert made_up_feed(session)["i"].tolist() == [0]


def test_sizes_that_are_given_stay_in_a_made_up_feed():
    session = runtime.Session(model(CACHE, one=np.array([1])).SerializeToString())

    assert made_up_feed(session, {"x": (1, 3, 2), "mask": (1, 4, 2)})["mask"].shape == (1, 4, 2)
    with pytest.raises(ModelError, match=r"cannot run .* It was fed made-up inputs; pass some that it takes with --data\.$"):
        made_up_feed(session, {"x": (1, 3, 2), "mask": (1, 1, 2)})


def test_a_made_up_feed_is_the_same_every_time():
    session = runtime.Session(scale(1).SerializeToString())

    assert made_up_feed(session)["x"].tolist() == made_up_feed(session)["x"].tolist()


@pytest.mark.parametrize(("factor", "holds"), [(1.0, True), (1.0005, True), (1.01, False)])
def test_the_rewritten_model_may_differ_from_the_one_given_by_roundings_alone(factor: float, holds: bool):
    if holds:
        demand_equal(scale(2), {"y": 2 * factor * X}, {"x": X})
        return
    with pytest.raises(VerificationError) as caught:
        demand_equal(scale(2), {"y": 2 * factor * X}, {"x": X})
    text = (
        "Output 'y': the model as it is rewritten before it is quantized is only within 40 dB of the one given. This is a fault"
    )
    assert str(caught.value) == f"{text} of onnxcomp, please report it. Nothing was written."


@pytest.mark.parametrize(
    ("x", "factor", "holds"), [(X, 1.005, True), (X, 1.02, False), (X * 0, 1e-5, True), (X * 0, 0.1, False)]
)
def test_float16_rounds_more_and_loses_what_is_smallest(x: Array, factor: float, holds: bool):
    with nullcontext() if holds else pytest.raises(VerificationError):
        demand_equal(scale(1), {"y": factor * x if x.any() else x + factor}, {"x": x}, is_half=True)


@pytest.mark.parametrize(("own", "holds"), [(0.0, False), (0.01, True), (0.001, False)])
def test_the_rewritten_model_may_round_as_the_given_one_does(monkeypatch: pytest.MonkeyPatch, own: float, holds: bool):
    class Rounding:
        def __init__(self, _: ModelProto, *, optimize: bool = True) -> None:
            self.y = X + (0 if optimize else own)

        def run(self, _: object) -> dict[str, Array]:
            return {"y": self.y}

    monkeypatch.setattr("onnxcomp.verify.Session", Rounding)
    with nullcontext() if holds else pytest.raises(VerificationError):
        demand_equal(scale(1), {"y": X + 0.05}, {"x": X})


def test_outputs_that_are_picked_are_not_compared(path: Path):
    text = "g (float[N,4] x) => (float[N,4] h, float[N,1] y) { h = Mul(x, w) y, i = TopK(h, one) }"
    whole = model(text, w=np.float32(1), one=np.array([1]))
    onnx.save(whole, path)
    expected = [{"h": X, "y": np.array([[np.nan]], np.float32)}]

    assert "Output 'y'" in refusal(path, whole, whole, [{"x": X}], expected)
    assert verify(path, runtime.Session(path), [{"x": X}], expected, picked={"y"}).expected_db == 200
    demand_equal(whole, expected[0], {"x": X}, picked={"y"})
