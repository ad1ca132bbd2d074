"""NoisyQuant: what is added, that it is taken out exactly, what is declined and why, and which tokens are listened to."""

from __future__ import annotations

import dataclasses
import math
import zlib

import numpy as np
import pytest
from equality import parse, run

from onnxcomp.calibrate.samples import Cut, LiveBatch
from onnxcomp.errors import RecipeError
from onnxcomp.graph.convert import to_graph, to_model
from onnxcomp.graph.edit import Tape, apply
from onnxcomp.graph.sites import Site
from onnxcomp.methods import noisyquant
from onnxcomp.methods.base import Input, Outcome
from onnxcomp.methods.noisyquant import EVEN, FIRST, PEAK, ROWS, NoisyQuant, Rows, amplitude
from onnxcomp.numerics.affine import QParams, Scheme

Array = np.ndarray

LAYER = Site("fc", "MatMul", "layer", ("x",), "h", "y", -1)
CONV = Site("conv", "Conv", "layer", ("x",), "y", "y", 1, rank=4)


def unit(bits: int = 4) -> QParams:
    """Step 1 around zero."""
    return QParams(Scheme(bits), np.array(1, np.float32), np.array(2 ** (bits - 1), np.uint8))


def place(channels: int, q: QParams | None = None, outputs: int | None = None, site: Site = LAYER) -> Input:
    """One MatMul that passes its channels on, or, with `outputs`, adds them up into so many."""
    w = np.eye(channels, dtype=np.float32) if outputs is None else np.ones((channels, outputs), np.float32)
    return Input("x", q or unit(), (site,), (w,))


def cut(x: Array, batch: int = 1) -> Cut:
    """Samples [N, T, C], `batch` of them at a time."""
    x = x.astype(np.float32)
    starts = range(0, len(x), batch)
    batches = [LiveBatch(tuple(range(s, min(s + batch, len(x)))), {"x": x[s : s + batch]}) for s in starts]
    return Cut(batches, {"xh": "x"})


def fitted(outcome: Outcome, key: str = "noise") -> Array:
    assert outcome.fit is not None, outcome.reason
    return outcome.fit[key]


def halves(samples: int = 16, tokens: int = 12, channels: int = 3) -> Array:
    """Values half-way between two levels: the worst there are, and half a step away from the best. The first channel
    keeps to the levels, so that it gains nothing.
    """
    x = np.random.default_rng(0).integers(-4, 5, size=(samples, tokens, channels)).astype(np.float32)
    x[..., 1:] += 0.5
    return x


def output_error(x: Array, noise: Array, q: QParams, w: Array) -> float:
    x = x.astype(np.float32)
    return float(np.square((q.fake(x + noise) - noise - x).astype(np.float64) @ w).sum())


# --- offset ----------------------------------------------------------------------------------------------------------


def test_channels_that_lie_between_the_levels_are_moved_onto_them():
    outcome = NoisyQuant().fit(place(3), cut(halves()))

    noise = fitted(outcome)
    assert np.abs(noise % 1).tolist() == [0.0, 0.5, 0.5]
    assert output_error(halves(), noise, NoisyQuant().quantizer(outcome.fit or {}, unit()), np.eye(3)) == 0


def test_channels_far_apart_are_centred_and_share_a_finer_range(rng: np.random.Generator):
    """Two channels of width 1 around -10 and 10: 16 levels over 21 before, over 1 after."""
    x = rng.uniform(-0.5, 0.5, size=(32, 16, 2)) + np.array([-10.0, 10.0])
    q = QParams(Scheme(4), np.array(21 / 15, np.float32), np.array(8, np.uint8))

    method = NoisyQuant()
    outcome = method.fit(place(2, q), cut(x))

    finer = method.quantizer(outcome.fit or {}, q)
    assert outcome.reason == "a range of its own"
    assert finer.scale.shape == ()
    assert finer.scale <= 1 / 15 * 1.05  # the range holds at least 95 % of values that are spread evenly over 1
    assert np.abs(fitted(outcome) - [10, -10]).max() <= 0.5 + float(finer.scale)
    assert method.quantizer({"noise": fitted(outcome)}, q) is q


def test_the_gain_is_that_of_held_out_samples_at_the_outputs(rng: np.random.Generator):
    x = np.broadcast_to(rng.normal(size=(1, 1, 20, 6)), (4, 8, 20, 6)).reshape(32, 20, 6)  # 20 tokens: all are looked at
    x = x * (1 + 0.5 * rng.normal(size=(32, 1, 1)))
    x[..., 1:] = np.rint(x[..., 1:]) + 0.4
    weights = (rng.normal(size=(6, 4)).astype(np.float32), rng.normal(size=(6, 2)).astype(np.float32))
    two = Input("x", unit(), (LAYER, dataclasses.replace(LAYER, name="other")), weights)

    outcome = NoisyQuant(keep="always").fit(two, cut(x))

    assert outcome.gain_db is not None
    assert outcome.gain_db > 3
    assert outcome.gain_db == pytest.approx((outcome.after_db or 0) - (outcome.before_db or 0), abs=1e-9)


def test_no_value_of_the_weight_and_no_held_out_sample_enters_the_offset():
    x = halves()
    changed = x.copy()
    changed[3::4] = 7 * np.random.default_rng(1).normal(size=changed[3::4].shape)

    one = NoisyQuant(keep="always").fit(place(3), cut(x))
    two = NoisyQuant(keep="always").fit(place(3), cut(changed))

    assert fitted(one).tolist() == fitted(two).tolist()


def test_of_moves_that_are_the_same_the_shortest_is_taken():
    """Half a step up or down, or a whole one further: the values in the middle of the range are rounded alike."""
    x = 0.25 * np.tile([1.0, -1.0], (16, 12, 1)) + np.random.default_rng(0).integers(-3, 4, size=(16, 12, 2))

    assert np.abs(fitted(NoisyQuant().fit(place(2), cut(x)))).tolist() == [0.25, 0.25]


# --- uniform ---------------------------------------------------------------------------------------------------------


def expected_change(d: float, n: float, b: float) -> float:
    """By integration: the squared error of a value at distance d from a threshold, averaged over U(-n, n), less (b - d)^2."""
    u = (np.arange(200_000) + 0.5) / 100_000 * n - n
    x = d - b  # the level is 0, the threshold -b; behind it lies the level -2b
    rounded = np.where(x + u < -b, -2 * b, 0.0)
    return float(np.square(rounded - u - x).mean()) - x * x


@pytest.mark.parametrize(("d", "n"), [(0.05, 0.3), (0.2, 0.3), (0.3, 0.25), (0.0, 0.5)])
def test_the_theorem_is_what_integration_gives(d: float, n: float):
    b = 0.5
    formula = n * n / 3 - (b / n * (n - d) ** 2 if d <= n else 0)

    # The midpoint rule with steps h = n / 1e5 errs by less than one step of a jump of at most (3 b)^2 over a width 2 n.
    assert expected_change(d, n, b) == pytest.approx(formula, abs=9 * b * b / 2e5 + 1e-9)


@pytest.mark.parametrize("distances", [[0.0], [0.1, 0.4], [0.02, 0.05, 0.3, 0.5]])
def test_n_minimises_the_theorems_sum(distances: list[float]):
    x = np.floor(np.arange(len(distances))) + 0.5 + np.array(distances)
    tried = np.arange(1, 33) / 64
    sums = [sum(n * n / 3 - (0.5 / n * (n - d) ** 2 if d <= n else 0) for d in distances) for n in tried]
    best = tried[int(np.argmin(sums))] if min(sums) < 0 else 0.0

    assert amplitude(x[None].astype(np.float32), unit()) == best


def test_values_on_their_levels_want_no_noise():
    outcome = NoisyQuant(mode="uniform").fit(place(3), cut(np.rint(halves() - 0.5)))

    assert outcome.fit is None
    assert outcome.reason == "no noise lowers the expected error"


def test_draws_follow_from_the_seed_and_the_places_name_alone():
    x = halves()
    x[..., 1:] += 0.02  # at distance 0.02 from the thresholds
    method = NoisyQuant(mode="uniform", keep="always")
    n = amplitude(np.concatenate([s for i, s in enumerate(x) if i % 4 != 3]), unit())

    first = fitted(method.fit(place(3), cut(x)))
    other = fitted(dataclasses.replace(method, seed=1).fit(place(3), cut(x)))
    renamed = fitted(method.fit(place(3, site=dataclasses.replace(LAYER, name="fc2")), cut(x)))

    drawn = np.random.default_rng([0, zlib.crc32(b"fc")]).uniform(-n, n, size=(8, 3)).astype(np.float32)
    assert first.tolist() in drawn.tolist()
    assert first.tolist() == fitted(method.fit(place(3), cut(x, batch=5))).tolist()
    assert len({tuple(a.tolist()) for a in (first, other, renamed)}) == 3


def test_of_more_draws_the_best_is_no_worse():
    x = halves()[..., 1:] + 0.02
    w = np.eye(2)
    few, many = (
        fitted(NoisyQuant(mode="uniform", keep="always", draws=k).fit(place(2), cut(np.concatenate([x] * 4)))) for k in (1, 30)
    )

    assert output_error(x, many, unit(), w) <= output_error(x, few, unit(), w)


def test_uniform_noise_keeps_the_quantizer():
    outcome = NoisyQuant(mode="uniform", keep="always").fit(place(3), cut(halves()))

    assert list(outcome.fit or {}) == ["noise"]
    assert outcome.reason == "the same range"


# --- declined --------------------------------------------------------------------------------------------------------


def test_a_range_measured_at_run_time_is_declined():
    outcome = NoisyQuant().fit(Input("x", None, (LAYER,), (np.eye(3, dtype=np.float32),)), cut(halves()))

    assert outcome.fit is None
    assert outcome.reason == "the range is measured at run time: a fixed noise has no fixed step to work on"


def test_a_conv_that_pads_is_declined():
    padded = dataclasses.replace(CONV, padded=True)
    outcome = NoisyQuant(keep="always").fit(
        Input("x", unit(), (padded,), (np.ones((1, 3, 3, 3), np.float32),)), cut(np.zeros((4, 3, 8, 8)))
    )

    assert outcome.fit is None
    assert outcome.reason == "a Conv that reads it pads with zeros, from which the noise could not be taken out"


def test_what_held_out_samples_do_not_confirm_is_declined():
    x = halves()
    x[3::4, :, 1:] += 0.5

    outcome = NoisyQuant().fit(place(3), cut(x))

    assert outcome.fit is None
    assert outcome.reason == "held-out samples do not improve"
    assert outcome.after_db == outcome.before_db
    assert outcome.gain_db is not None
    assert outcome.gain_db < 0


def test_values_on_their_levels_are_left_alone():
    assert NoisyQuant().fit(place(3), cut(np.rint(halves() - 0.5))).reason == "held-out samples do not improve"


def test_a_range_that_suits_the_many_and_clips_the_first_token_is_not_taken(rng: np.random.Generator):
    """Two channels, -4 and 4, that centring could bring together, if it were not for the first token: there they are
    exchanged, and a range that is half as wide could not hold it.
    """
    x = (rng.uniform(-1, 1, size=(32, 64, 2)) + np.array([-4.0, 4.0])).astype(np.float32)
    x[:, 0] = x[:, 0, ::-1]
    q = QParams(Scheme(4), np.array(10 / 15, np.float32), np.array(8, np.uint8))
    method = NoisyQuant(keep="always")

    outcome = method.fit(place(2, q), cut(x))

    noise, first = fitted(outcome), x[:, 0]
    error = method.quantizer(outcome.fit or {}, q).fake(first + noise) - noise - first
    assert np.abs(error).max() < 1  # a step is 2/3; centred, the many would share a range of 2, and the first lie 7 outside


# --- tokens that are looked at ---------------------------------------------------------------------------------------


def view(x: Array, first: int = 0) -> LiveBatch:
    return LiveBatch(tuple(range(first, first + len(x))), {"xh": x.astype(np.float32)})


def test_evenly_spread_tokens_those_of_large_values_and_the_first_are_looked_at():
    x = np.zeros((1, 100, 2))
    x[0, :, 0] = np.arange(100) / 100
    x[0, [40, 41, 42], 1] = [-9, 8, 7]

    (rows,) = Rows.of(view(x, first=3), -1)

    at = np.rint(100 * rows.x[:, 0]).astype(int)
    assert at[rows.kind == EVEN].tolist() == list(range(3, 100, 7))  # 100 / 16, rounded up
    assert at[rows.kind == PEAK].tolist() == [40, 41, 42]
    assert at[rows.kind == FIRST].tolist() == [0]
    assert len(at[rows.kind == EVEN]) <= ROWS


def test_of_many_samples_some_fours_are_looked_at(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(noisyquant, "SAMPLES", 8)
    x = halves(16)
    others = x.copy()
    others[[4, 5, 6, 7, 12, 13, 14, 15]] += 0.3

    assert np.array_equal(fitted(NoisyQuant().fit(place(3), cut(x))), fitted(NoisyQuant().fit(place(3), cut(others))))


def test_channels_of_a_conv_lie_behind_the_batch():
    x = np.arange(2 * 3 * 2 * 2.0).reshape(2, 3, 2, 2)

    rows = Rows.joined([*Rows.of(view(x), 1)])

    assert rows.x[rows.kind == FIRST].tolist() == [[0, 4, 8], [12, 16, 20]]


@pytest.mark.parametrize("sizes", [[1] * 12, [5, 5, 2], [12]])
def test_rows_are_the_same_however_samples_are_batched(rng: np.random.Generator, sizes: list[int]):
    x = rng.normal(size=(12, 40, 3))
    ends = np.cumsum(sizes)
    parts = [row for size, end in zip(sizes, ends, strict=True) for row in Rows.of(view(x[end - size : end], end - size), -1)]

    found, whole = Rows.joined(parts), Rows.joined([*Rows.of(view(x), -1)])

    for key in ("sample", "kind", "x"):
        assert getattr(found, key).tobytes() == getattr(whole, key).tobytes()


# --- taken out again -------------------------------------------------------------------------------------------------


def test_the_correction_of_a_matmul_is_minus_the_noise_times_its_weight(rng: np.random.Generator):
    noise, w = rng.normal(size=5).astype(np.float32), rng.normal(size=(5, 3)).astype(np.float32)

    exact = [-math.fsum(float(a) * float(b) for a, b in zip(noise, column, strict=True)) for column in w.T]

    # Products of float32 are exact in float64, their sum of five is rounded to float32 once.
    assert NoisyQuant().correction({"noise": noise}, w, LAYER).tolist() == np.array(exact, np.float32).tolist()


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_correction_of_a_conv_makes_up_for_the_noise_in_every_pixel(rng: np.random.Generator, groups: int):
    noise, w = rng.integers(-8, 9, size=4) / 8, rng.integers(-4, 5, size=(8, 4 // groups, 2, 3)) / 4
    model = parse(
        f"g (float[N,4,5,5] x) => (float[N,8,4,3] y) {{ y = Conv<group = {groups}>(x, w) }}",
        {"w": w.astype(np.float32)},
        opset=21,
    )
    x = rng.integers(-8, 9, size=(1, 4, 5, 5)).astype(np.float32)

    b = NoisyQuant().correction({"noise": noise.astype(np.float32)}, w.astype(np.float32), CONV)

    shifted = run(model, {"x": x + noise.astype(np.float32).reshape(-1, 1, 1)})["y"]
    # Eighths times quarters, few of them: every sum is exact in float32.
    np.testing.assert_array_equal(shifted + b.reshape(-1, 1, 1), run(model, {"x": x})["y"])


def test_noise_and_correction_cancel_in_front_of_a_fine_quantizer(rng: np.random.Generator):
    """One MatMul in ONNX: Add, FakeQuantize left out, MatMul, bias. All numbers are eighths: exact."""
    w, noise = rng.integers(-8, 9, size=(4, 3)) / 8, rng.integers(-8, 9, size=4) / 8
    model = parse("g (float[N,4] x) => (float[N,3] y) { [fc] h = MatMul(x, w) y = Add(h, b) }",
        {"w": w.astype(np.float32), "b": np.zeros(3, np.float32)}, opset=21)  # fmt: skip
    graph, tape, method = to_graph(model), Tape("fc/noisyquant"), NoisyQuant()
    fit = {"noise": noise.astype(np.float32)}

    new = method.build(tape, place(4), fit)
    apply(graph, "noisyquant", tape, {"x": new["x"]}, ("fc",))
    graph.tensors()["b"].values = method.correction(fit, w.astype(np.float32), LAYER)

    assert graph.nodes[0].name == "fc/noisyquant/add"
    x = rng.integers(-8, 9, size=(5, 4)).astype(np.float32)
    np.testing.assert_array_equal(run(to_model(graph, model), {"x": x})["y"], run(model, {"x": x})["y"])


@pytest.mark.parametrize(("site", "shape"), [(LAYER, (3,)), (CONV, (3, 1, 1)), (dataclasses.replace(CONV, rank=3), (3, 1))])
def test_noise_is_one_add_along_the_channels(site: Site, shape: tuple[int, ...]):
    tape = Tape("fc/noisyquant")

    new = NoisyQuant().build(tape, place(3, site=site), {"noise": np.ones(3, np.float32)})

    assert new == {"x": "fc/noisyquant/add"}
    assert [(n.op, n.inputs) for n in tape.nodes] == [("Add", ("x", "fc/noisyquant.noise"))]
    assert tape.constants["fc/noisyquant.noise"].shape == shape


@pytest.mark.parametrize("groups", [1, 3])
def test_a_conv_without_padding_is_fitted(groups: int):
    x = np.moveaxis(halves(tokens=16), -1, 1).reshape(16, 3, 4, 4)
    w = np.ones((3, 3 // groups, 2, 2), np.float32)

    outcome = NoisyQuant().fit(Input("x", unit(), (CONV,), (w,)), cut(x))

    assert np.abs(fitted(outcome) % 1).tolist() == [0.0, 0.5, 0.5]


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"draws": 0}, "draws = 0 is not understood. Input should be greater than 0."),
        ({"seed": -1}, "seed = -1 is not understood. Input should be greater than or equal to 0."),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, int], text: str):
    with pytest.raises(RecipeError) as caught:
        NoisyQuant(**options)  # pyright: ignore[reportArgumentType]

    assert str(caught.value) == text


def test_an_unknown_mode_is_refused():
    with pytest.raises(RecipeError) as caught:
        NoisyQuant(mode="gauss")  # pyright: ignore[reportArgumentType]

    assert str(caught.value) == "mode = 'gauss' is not understood. Input should be 'offset' or 'uniform'."


def test_it_is_fitted_to_what_is_quantized():
    assert NoisyQuant().scope == "input"
