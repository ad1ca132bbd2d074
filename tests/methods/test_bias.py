"""Bias Compensation: what is fitted, what is left out, what is declined and why, and how it is written down."""

from __future__ import annotations

import functools
import math
import operator

import numpy as np
import pytest
from equality import parse, run

from onnxcomp.calibrate.samples import Cut, LiveBatch
from onnxcomp.errors import RecipeError
from onnxcomp.graph.convert import to_graph, to_model
from onnxcomp.graph.edit import Tape, apply
from onnxcomp.graph.sites import Site, find_sites
from onnxcomp.methods.base import Outcome
from onnxcomp.methods.bias import BiasCompensation, SampleErrors, decibel

Array = np.ndarray

LAYER = Site("fc", "MatMul", "layer", ("x",), "h", "y", -1)
TOKENS = Site("fc", "MatMul", "layer", ("x",), "h", "y", -1, fixed_tokens=True)
CONV = Site("conv", "Conv", "layer", ("x",), "y", "y", 1, rank=4)
PLAIN = BiasCompensation(trim=0.0, significance=0.0)


def cut(errors: Array, outputs: Array | None = None, batch: int = 1) -> Cut:
    """Samples [N, ...] whose compressed output lacks `errors` to the float one, `batch` of them at a time."""
    f = np.ones_like(errors) if outputs is None else outputs
    live = {"f_xh": f.astype(np.float32), "g_xh": (f - errors).astype(np.float32)}
    starts = range(0, len(errors), batch)
    batches = [
        LiveBatch(tuple(range(s, min(s + batch, len(errors)))), {k: v[s : s + batch] for k, v in live.items()}) for s in starts
    ]
    return Cut(batches, {name: name for name in live})


def fit(errors: Array, method: BiasCompensation = PLAIN, site: Site = LAYER) -> Outcome:
    return method.fit(site, cut(errors))


def fitted(outcome: Outcome, key: str = "b") -> Array:
    assert outcome.fit is not None, outcome.reason
    return outcome.fit[key]


def rank_one(rng: np.random.Generator, tokens: int = 4, channels: int = 3) -> tuple[Array, Array, Array]:
    """Eight samples [8, T, C] of an error u v and noise that cancels over the fitted and over the held-out samples."""
    u = np.arange(1, tokens + 1) * np.where(np.arange(tokens) % 2, -1.0, 1.0)
    v = 2.0 ** -np.arange(channels)
    noise = rng.integers(-1, 2, size=(tokens, channels)) / 8
    signs = np.array([1, -1, 1, 1, -1, 1, -1, -1])  # samples 3 and 7 are held out, the others fitted
    return np.outer(u, v) + signs[:, None, None] * noise, u, v


# --- one number per channel ------------------------------------------------------------------------------------------


def test_the_bias_is_the_mean_error_per_channel():
    errors = np.array([[1, -2], [3, -4], [2, -3]], np.float32)

    assert fitted(fit(errors)).tolist() == [2.0, -3.0]


def test_every_fourth_sample_only_judges():
    errors = np.array([[1], [3], [2], [4], [2]], np.float32)

    outcome = fit(errors)

    assert fitted(outcome).tolist() == [2.0]  # with sample 3 it would be 2.4
    assert outcome.reason == "1 of 1 channels"


def test_the_gain_is_counted_on_held_out_samples():
    errors = np.array([[[2.0], [2.0]]] * 3 + [[[1.0], [3.0]]])

    outcome = fit(errors)

    # Held out: E e^2 = (1 + 9) / 2 = 5 before and ((1 - 2)^2 + (3 - 2)^2) / 2 = 1 after; the output's energy is 1.
    assert outcome.before_db == 10 * math.log10(1 / 5)
    assert outcome.after_db == 10 * math.log10(1 / 1)
    assert outcome.gain_db == outcome.after_db - outcome.before_db


def test_the_bias_of_a_conv_is_the_mean_over_its_pixels():
    errors = np.zeros((4, 2, 2, 2))
    errors[:, 0] = [[0, 1], [2, 5]]
    errors[:, 1] = -1

    assert fitted(fit(errors, site=CONV)).tolist() == [2.0, -1.0]


def test_a_single_sample_is_fitted_and_judged():
    assert fitted(fit(np.array([[0.5, 0.25]]), BiasCompensation(trim=0.0))).tolist() == [0.5, 0.25]


@pytest.mark.parametrize(("significance", "kept"), [(1.99, 2.0), (2.0, 0.0)])
def test_a_channel_is_kept_where_it_exceeds_its_standard_errors(significance: float, kept: float):
    """Means 1, 1, 4: their mean is 2, and its standard error sqrt(3) / sqrt(3) = 1."""
    errors = np.array([[1, 8], [1, 8], [4, 8]], np.float32)

    outcome = fit(errors, BiasCompensation(trim=0.0, significance=significance))

    assert fitted(outcome).tolist() == [kept, 8.0]
    assert outcome.reason == f"{1 + bool(kept)} of 2 channels"


def test_trim_leaves_out_the_tokens_of_the_largest_error():
    errors = np.ones((3, 20, 1))
    errors[:, 7] = 101

    trimmed, plain = (fitted(fit(errors, BiasCompensation(trim=t, significance=0.0))) for t in (0.05, 0.0))

    assert trimmed.tolist() == [1.0]  # 5 % of 20 tokens are one
    assert plain.tolist() == [6.0]  # (19 + 101) / 20


def test_trim_always_leaves_a_token():
    assert fitted(fit(np.array([[[1.0], [3.0]]] * 3), BiasCompensation(trim=0.99, significance=0.0))).tolist() == [1.0]


# --- declined --------------------------------------------------------------------------------------------------------


def test_a_mean_that_is_not_significant_is_declined():
    outcome = fit(np.array([[1.0], [-1.0], [1.0], [-1.0]]), BiasCompensation(trim=0.0))

    assert outcome.fit is None
    assert outcome.reason == "the mean error is not significant in any channel"
    assert outcome.gain_db == 0.0
    assert outcome.after_db == outcome.before_db


def test_what_held_out_samples_do_not_confirm_is_declined():
    outcome = fit(np.array([[1.0], [1.0], [1.0], [-1.0]]))

    assert outcome.fit is None
    assert outcome.reason == "held-out samples do not improve"
    # Held out: ((-1) - 1)^2 = 4 in place of 1.
    assert outcome.gain_db == pytest.approx(-10 * math.log10(4), abs=1e-12)  # a few float64 roundings of two logarithms
    assert outcome.after_db == outcome.before_db


def test_one_sample_that_gains_much_does_not_outvote_the_typical_one():
    """b = 1. Three held-out samples go from 0.25 to 2.25, one from 100 to 81: the sum falls, the median rises."""
    errors = np.ones((16, 1))
    errors[[3, 7, 11]], errors[15] = -0.5, 10.0

    assert fit(errors).reason == "held-out samples do not improve"


def test_typical_samples_that_gain_little_do_not_outvote_one_that_loses_much():
    """b = 1. Three held-out samples go from 0.36 to 0.16, one from 100 to 121: the median falls, the sum rises."""
    errors = np.ones((16, 1))
    errors[[3, 7, 11]], errors[15] = 0.6, -10.0

    assert fit(errors).reason == "held-out samples do not improve"


def test_kept_always_is_kept_where_held_out_samples_do_not_improve():
    outcome = fit(np.array([[1.0], [1.0], [1.0], [-1.0]]), BiasCompensation(keep="always", trim=0.0))

    assert fitted(outcome).tolist() == [0.5]  # nothing is held out, nothing is tested for significance
    assert outcome.reason == "kept as the paper does"


@pytest.mark.parametrize("site", [LAYER, TOKENS])
def test_kept_always_is_declined_where_there_is_no_error(site: Site):
    outcome = fit(np.zeros((4, 5, 3)), BiasCompensation(keep="always"), site)

    assert outcome.fit is None
    assert outcome.reason == "there is no error to correct"


# --- one number per token and channel --------------------------------------------------------------------------------


def test_an_error_of_rank_one_over_the_tokens_is_found(rng: np.random.Generator):
    errors, u, v = rank_one(rng)

    outcome = fit(errors, site=TOKENS)

    assert outcome.reason == "per token, rank 1"
    left, right = fitted(outcome, "u"), fitted(outcome, "v")
    assert left.shape == (4, 2)
    assert right.shape == (2, 3)
    assert np.all(left[:, -1] == 1)
    # Three roundings to float16 on sums of two terms, none above 8 (the largest error is 4): 3 * 2 * 8 * 2^-11.
    assert left.dtype == right.dtype == np.float16
    assert np.abs(left.astype(np.float64) @ right - np.outer(u, v)).max() <= 48 * 2.0**-11


def test_the_gain_of_a_table_is_counted_on_held_out_samples(rng: np.random.Generator):
    errors, u, v = rank_one(rng)

    outcome = fit(errors, site=TOKENS)

    before = np.square(errors[[3, 7]]).sum()
    after = np.square(errors[[3, 7]] - np.outer(u, v)).sum()
    # Rounding the table to float16 adds less than its square, (4 * 2^-10)^2 per number, to what is left of its error
    # (the two held-out samples' noise cancels, and with it the cross term).
    least = np.square(4 * 2.0**-10) * errors[[3, 7]].size
    assert 10 * math.log10(before / (after + least)) <= outcome.gain_db <= 10 * math.log10(before / max(after - least, 1e-9))
    assert outcome.after_db == outcome.before_db + outcome.gain_db


def test_a_table_of_low_rank_is_the_nearest_of_its_rank(rng: np.random.Generator):
    table = rng.normal(size=(6, 8)) * np.arange(1, 7)[:, None]
    errors = np.broadcast_to(table, (8, 6, 8)).astype(np.float32)
    f = np.zeros_like(errors)  # so that f - g is exactly the error

    outcome = BiasCompensation(rank=1, significance=0.0).fit(TOKENS, cut(errors, f))

    exact = errors[0].astype(np.float64)
    centre = exact.mean(axis=0)
    left, values, right = np.linalg.svd(exact - centre)
    nearest = centre + values[0] * np.outer(left[:, 0], right[0])
    # Both factors are rounded to float16, and their products are sums of two terms, none above 32: 3 * 2 * 32 * 2^-11.
    assert np.abs(fitted(outcome, "u").astype(np.float64) @ fitted(outcome, "v") - nearest).max() <= 192 * 2.0**-11


def test_a_table_is_given_no_higher_rank_than_asked_for(rng: np.random.Generator):
    errors = np.broadcast_to(rng.normal(size=(6, 8)), (8, 6, 8)) + 1e-3 * rng.normal(size=(8, 6, 8))

    ranks = [fitted(fit(errors, BiasCompensation(rank=r), TOKENS), "u").shape[1] - 1 for r in (1, 2, 3, 4, 0)]

    assert ranks == [1, 2, 2, 4, 6]  # powers of two and the full one are tried; 0 sets no limit


def test_without_a_fixed_number_of_tokens_there_is_no_table(rng: np.random.Generator):
    errors, u, v = rank_one(rng)

    outcome = fit(errors, site=LAYER)

    assert fitted(outcome).tolist() == (u.mean() * v).tolist()
    assert outcome.reason == "3 of 3 channels"


def test_tokens_switched_off_there_is_no_table(rng: np.random.Generator):
    errors, _, _ = rank_one(rng)

    assert fit(errors, BiasCompensation(trim=0.0, significance=0.0, tokens=False), TOKENS).reason == "3 of 3 channels"


def test_no_table_without_samples_to_judge_it(rng: np.random.Generator):
    errors, _, _ = rank_one(rng)

    assert fit(errors[:3], site=TOKENS).reason == "3 of 3 channels"


def test_a_table_no_better_than_the_channels_gives_way_to_them():
    assert fit(np.ones((8, 5, 3)), site=TOKENS).reason == "3 of 3 channels"


def test_a_rank_2_output_has_no_tokens():
    assert fit(np.ones((8, 3)), site=TOKENS).reason == "3 of 3 channels"


def test_kept_always_it_is_the_full_table_over_all_samples_and_tokens(rng: np.random.Generator):
    errors = rng.integers(-8, 9, size=(8, 5, 3)) / 8

    outcome = fit(errors, BiasCompensation(keep="always"), TOKENS)

    assert np.array_equal(fitted(outcome), errors.mean(axis=0))  # eighths and a mean over eight: exact
    assert outcome.reason == "kept as the paper does"


def test_a_sample_of_several_rows_counts_every_row():
    errors = np.arange(2 * 3 * 2, dtype=np.float64).reshape(2, 3, 2)  # two rows of three tokens and two channels

    found = SampleErrors.of(view(errors[None]), -1, 0.0, per_token=True)

    assert found.tokens[..., -1].tolist() == [[2, 2, 2], [0, 0, 0]]
    assert found.tokens[0, :, :-2].tolist() == errors.sum(axis=0).tolist()
    assert found.tokens[0, :, -2].tolist() == np.square(errors).sum(axis=(0, 2)).tolist()


# --- statistics ------------------------------------------------------------------------------------------------------


def view(errors: Array, first: int = 0) -> LiveBatch:
    """A batch of samples [N, rows, ...] with these errors."""
    f = np.ones((len(errors) * errors.shape[1], *errors.shape[2:]), np.float32)
    live = {"f_xh": f, "g_xh": (f - errors.reshape(f.shape)).astype(np.float32)}
    return LiveBatch(tuple(range(first, first + len(errors))), live)


def collected(errors: Array, sizes: list[int], trim: float = 0.05) -> SampleErrors:
    ends = np.cumsum(sizes)
    parts = [
        SampleErrors.of(view(errors[end - size : end], end - size), -1, trim, per_token=True)
        for size, end in zip(sizes, ends, strict=True)
    ]
    return functools.reduce(operator.add, parts)


@pytest.mark.parametrize("sizes", [[1] * 12, [5, 5, 2], [3, 9]])
def test_what_is_kept_per_sample_is_the_same_bit_for_bit_however_samples_are_batched(
    rng: np.random.Generator, sizes: list[int]
):
    errors = rng.normal(size=(12, 1, 7, 16))

    whole, parts = collected(errors, [12]), collected(errors, sizes)

    for key in ("index", "mean", "error", "energy"):
        assert getattr(parts, key).tobytes() == getattr(whole, key).tobytes(), key
    # Sums of at most 9 errors below 8 in float32, in another order: 9 * 9 * 8 * 2^-24 each; squares are below 16 * 64.
    assert np.abs(parts.tokens - whole.tokens)[..., :-2].max() <= 648 * 2.0**-24
    assert np.abs(parts.tokens - whole.tokens)[..., -2].max() <= 81 * 1024 * 2.0**-24
    assert np.array_equal(parts.tokens[..., -1], whole.tokens[..., -1])


def test_adding_up_is_associative_bit_for_bit_per_sample(rng: np.random.Generator):
    errors = rng.normal(size=(3, 1, 4, 5))
    a, b, c = (SampleErrors.of(view(errors[i : i + 1], i), -1, 0.0) for i in range(3))

    left, right = (a + b) + c, a + (b + c)

    assert left.mean.tobytes() == right.mean.tobytes()
    assert left.index.tolist() == [0, 1, 2]


def test_sqnr_is_the_summed_energy_over_the_summed_error():
    assert decibel(np.array([30.0, 70.0]), np.array([0.25, 0.75])) == 20.0


def test_an_error_of_zero_has_a_finite_sqnr():
    assert decibel(np.array([1.0]), np.array([0.0])) == 300.0


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"significance": -0.1}, "significance = -0.1 is not understood. Input should be greater than or equal to 0."),
        ({"rank": -1}, "rank = -1 is not understood. Input should be greater than or equal to 0."),
        ({"trim": -0.1}, "trim = -0.1 is not understood. Input should be greater than or equal to 0."),
        ({"trim": 1.0}, "trim = 1.0 is not understood. Input should be less than 1."),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, float], text: str):
    with pytest.raises(RecipeError) as caught:
        BiasCompensation(**options)  # pyright: ignore[reportArgumentType]

    assert str(caught.value) == text


def test_an_unknown_way_to_keep_is_refused():
    with pytest.raises(RecipeError) as caught:
        BiasCompensation(keep="never")  # pyright: ignore[reportArgumentType]

    assert str(caught.value) == "keep = 'never' is not understood. Input should be 'if-better' or 'always'."


# --- the graph -------------------------------------------------------------------------------------------------------


def test_a_bias_is_one_add_behind_the_layer():
    tape = Tape("fc/bias")

    replaced = PLAIN.build(tape, LAYER, {"b": np.array([1, 2], np.float32)})

    assert replaced == {"y": "fc/bias/add"}
    assert [(n.op, n.inputs) for n in tape.nodes] == [("Add", ("y", "fc/bias.b"))]
    assert tape.constants["fc/bias.b"].tolist() == [1, 2]


@pytest.mark.parametrize(("rank", "shape"), [(3, (2, 1)), (4, (2, 1, 1)), (5, (2, 1, 1, 1))])
def test_the_bias_of_a_conv_runs_along_its_channels(rank: int, shape: tuple[int, ...]):
    tape = Tape("conv/bias")
    site = Site("conv", "Conv", "layer", ("x",), "y", "y", 1, rank=rank)

    PLAIN.build(tape, site, {"b": np.array([1, 2], np.float32)})

    assert tape.constants["conv/bias.b"].shape == shape


@pytest.mark.parametrize("fit", [{"b": np.arange(6.0).reshape(3, 2)}, {"u": np.eye(3, 2) + 1, "v": np.eye(2)}])
def test_a_table_is_added_token_by_token(rng: np.random.Generator, fit: dict[str, Array]):
    arrays = {key: value.astype(np.float32) for key, value in fit.items()}
    model = parse(
        "g (float[N,3,2] x) => (float[N,3,2] y) { [fc] y = MatMul(x, w) }", {"w": np.eye(2, dtype=np.float32)}, opset=21
    )
    graph, tape = to_graph(model), Tape("fc/bias")
    (site,) = find_sites(graph)

    new = PLAIN.build(tape, site, arrays)
    apply(graph, "bias", tape, new)

    x = rng.integers(-4, 5, size=(2, 3, 2)).astype(np.float32)
    table = arrays["b"] if "b" in arrays else arrays["u"] @ arrays["v"]
    np.testing.assert_array_equal(run(to_model(graph, model), {"x": x})["y"], x + table)
