"""Nonlinear Bipolar Compensation: what is fitted, searched, priced and declined, and that the graph computes it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from equality import parse

from onnxcomp import recipe, runtime
from onnxcomp.calibrate.samples import Cut, LiveBatch
from onnxcomp.errors import DataError, RecipeError
from onnxcomp.graph.blocks import Block
from onnxcomp.graph.convert import to_graph, to_model
from onnxcomp.graph.edit import Tape, apply
from onnxcomp.methods import nbc
from onnxcomp.methods.base import Fit, Outcome
from onnxcomp.methods.nbc import NonlinearBipolarCompensation, _deviation, compensation
from onnxcomp.numerics.affine import NOT_FINITE
from onnxcomp.numerics.statistics import spread
from onnxcomp.recipe import Recipe
from onnxcomp.targets import find

TARGET = find("ort-x86")

Array = np.ndarray
NBC = NonlinearBipolarCompensation

TOKENS, WIDTH = 24, 16
BLOCK = Block("block", ("x",), "y", -1, 3, (WIDTH, WIDTH))
STAGE = Block("stage", ("x",), "y", 1, 4, (128, 128), (2, 2))
PRICED = Block("block", ("x",), "y", -1, 3, (WIDTH, WIDTH), macs=12 * TOKENS * WIDTH**2)


def cut(x: Array, errors: Array, batch: int = 1, outputs: Array | None = None) -> Cut:
    """Samples [N, ...] with the block's input and the error of its output."""
    f = np.ones_like(errors) if outputs is None else outputs
    live = {"xh": x.astype(np.float32), "f_xh": f.astype(np.float32), "g_xh": (f - errors).astype(np.float32)}
    starts = range(0, len(x), batch)
    batches = [
        LiveBatch(tuple(range(s, min(s + batch, len(x)))), {k: v[s : s + batch] for k, v in live.items()}) for s in starts
    ]
    return Cut(batches, {name: name for name in live})


def tokens(rng: np.random.Generator, samples: int = 40) -> Array:
    return rng.normal(size=(samples, TOKENS, WIDTH))


def bent(t: Array) -> Array:
    return np.sign(t) * np.log1p(np.abs(t))


def straight(z: Array) -> Array:
    return np.sign(z) * np.expm1(np.abs(z))


def linear_error(rng: np.random.Generator, x: Array, noise: float = 0.1) -> Array:
    """A third of what W of variance 1 / C_in would give, and noise of its own."""
    w = rng.normal(size=(x.shape[-1], x.shape[-1])) / np.sqrt(9 * x.shape[-1])
    return x @ w + noise * rng.normal(size=x.shape) + 0.2


def fitted(outcome: Outcome) -> Fit:
    assert outcome.fit is not None, outcome.reason
    return outcome.fit


def edited(block: Block, fit: Fit, body: str = "y = Neg(x)") -> tuple[runtime.Session, Tape, bytes]:
    """A model y = -x + compensation(x), for the target."""
    sizes = f"N,{TOKENS},{WIDTH}" if block.rank == 3 else "N,128,8,8"
    size = sizes if block.rank == 3 else "N,128,4,4"
    model = parse(f"g (float[{sizes}] x) => (float[{size}] y) {{ {body} }}", opset=21)
    graph, tape = to_graph(model), Tape(f"{block.name}/nbc")
    new = NBC().build(tape, block, fit)
    apply(graph, "nbc", tape, new)
    lowered = to_model(TARGET.lower(graph), model)
    data = lowered.SerializeToString()
    return runtime.Session(data, threads=1), tape, data


# --- what is fitted --------------------------------------------------------------------------------------------------


def test_what_is_linear_in_the_input_is_taken_out(rng: np.random.Generator):
    x = tokens(rng)
    errors = linear_error(rng, x, noise=0.0)

    fit = fitted(NBC(alpha=math.inf, weight="float", ridge=1e-9).fit(BLOCK, cut(x, errors)))

    left = errors[0] - compensation(fit, x[0].astype(np.float32))
    assert np.abs(left).max() < 1e-4  # 16 products of up to 0.3 and 3, the weights kept to 2^-16, signs at random


def test_what_is_linear_in_the_logarithms_is_taken_out(rng: np.random.Generator):
    """E = a_e L^-1(L(x / a_x) W), W a permutation of signs: then std(e) = std(x), so a_e = a_x is what the fit finds."""
    x = tokens(rng)
    order, signs = rng.permutation(WIDTH), rng.choice([-1.0, 1.0], WIDTH)
    errors = x[..., order] * signs

    fit = fitted(NBC(alpha=1.0, weight="float", ridge=1e-9).fit(BLOCK, cut(x, errors)))

    left = errors[0] - compensation(fit, x[0].astype(np.float32))
    assert np.abs(left).max() < 2e-4  # errors up to 4, a_x and a_e kept to 2^-16 each


def test_a_heavy_tailed_error_is_predicted_better_in_the_logarithm(rng: np.random.Generator):
    x = tokens(rng)
    w = rng.normal(size=(WIDTH, WIDTH)) / 4
    errors = straight(2 * (x @ w) + 0.1 * rng.normal(size=x.shape))

    bend, line = (NBC(alpha=c, weight="float", keep="always").fit(BLOCK, cut(x, errors)) for c in (1.0, math.inf))

    assert bend.gain_db is not None
    assert line.gain_db is not None
    assert bend.gain_db > line.gain_db + 1.0


@pytest.mark.parametrize("seed", range(4))
def test_the_search_is_never_worse_than_a_linear_branch(seed: int):
    rng = np.random.default_rng(seed)
    x = tokens(rng)
    errors = straight(linear_error(rng, x) * rng.choice([0.1, 1.0, 3.0]))

    search, line = (NBC(alpha=c, weight="float", price=0.0).fit(BLOCK, cut(x, errors)) for c in (0.0, math.inf))

    assert search.gain_db is not None
    assert line.gain_db is not None
    assert search.gain_db >= line.gain_db


def test_no_compensation_exceeds_the_largest_error_seen(rng: np.random.Generator):
    x = tokens(rng)
    errors = linear_error(rng, x)

    fit = fitted(NBC(alpha=3.0, weight="float").fit(BLOCK, cut(x, errors)))

    found = compensation(fit, (1e6 * x[0]).astype(np.float32))
    most = np.abs(errors.astype(np.float32)).max(axis=(0, 1))
    assert (np.abs(found) <= most * (1 + 1e-4)).all()  # a_e and the bound are kept to 2^-16 each


def test_a_constant_channel_counts_for_nothing(rng: np.random.Generator):
    x = tokens(rng)
    x[..., 3] = 7.0
    errors = linear_error(rng, x)

    for alpha in (1.0, math.inf):
        fit = fitted(NBC(alpha=alpha, weight="int8").fit(BLOCK, cut(x, errors)))
        moved = x[0].astype(np.float32).copy()
        moved[:, 3] = -1e9
        np.testing.assert_array_equal(compensation(fit, moved), compensation(fit, x[0].astype(np.float32)))


def test_the_size_of_a_batch_changes_nothing(rng: np.random.Generator):
    x = tokens(rng, 12)
    errors = linear_error(rng, x)

    one, four = (fitted(NBC(weight="low-rank", keep="always").fit(BLOCK, cut(x, errors, batch))) for batch in (1, 4))

    assert one.keys() == four.keys()
    assert all(np.array_equal(four[key], value) for key, value in one.items())


# --- the gate and the price --------------------------------------------------------------------------------------------


def test_of_many_samples_fewer_tokens_are_held(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(nbc, "TOTAL", 40 * 4)
    monkeypatch.setattr(nbc, "EACH", 1)
    x = tokens(rng)
    errors = linear_error(rng, x)
    others = np.full_like(errors, 100.0)
    for number in range(len(x)):
        held = spread(TOKENS, 4, number)  # 5 tokens of 24, others in each sample
        others[number, held] = errors[number, held]

    found = NBC(weight="float").fit(BLOCK, cut(x, errors))

    assert np.array_equal(fitted(found)["weight"], fitted(NBC(weight="float").fit(BLOCK, cut(x, others)))["weight"])
    assert all((others == errors).any(axis=(0, 2)))


def test_noise_is_declined(rng: np.random.Generator):
    outcome = NBC().fit(BLOCK, cut(tokens(rng, 8), rng.normal(size=(8, TOKENS, WIDTH))))

    assert outcome.fit is None
    assert outcome.reason == "held-out samples do not improve"
    assert outcome.gain_db is not None
    assert outcome.gain_db <= 0
    assert outcome.after_db == outcome.before_db


def test_a_paper_keeps_noise_too(rng: np.random.Generator):
    outcome = NBC(keep="always").fit(BLOCK, cut(tokens(rng, 8), rng.normal(size=(8, TOKENS, WIDTH))))

    assert outcome.fit is not None


def test_the_gain_is_the_fall_of_the_error_on_held_out_samples(rng: np.random.Generator):
    """Held out, the error is half noise: a branch that is exact about the other half gains 3 dB."""
    x = tokens(rng, 400)
    errors = np.sqrt(9) * linear_error(rng, x, noise=0.0)
    errors -= errors.mean(axis=(0, 1))
    noise = rng.normal(size=x.shape) * errors.std(axis=(0, 1))

    outcome = NBC(alpha=math.inf, weight="float").fit(BLOCK, cut(x, errors + noise))

    assert outcome.before_db is not None
    assert outcome.after_db is not None
    assert outcome.gain_db == outcome.after_db - outcome.before_db
    # 3.01, less what a regression of 17 numbers on 7200 tokens misses; the trimmed sums of a token weigh both halves alike.
    assert outcome.gain_db == pytest.approx(3.01, abs=0.15)


def test_one_token_in_twenty_does_not_decide(rng: np.random.Generator):
    """In every held-out sample one token of 24 has an error a thousand times the others', which no branch can know of."""
    x = tokens(rng)
    errors = linear_error(rng, x)
    wild = errors.copy()
    wild[3::4, 5] *= 1000

    tame, outliers = (NBC(alpha=math.inf, weight="float").fit(BLOCK, cut(x, e, batch=1)) for e in (errors, wild))

    assert outliers.gain_db is not None
    assert outliers.gain_db > 3.0
    assert tame.fit is not None


def test_without_an_error_there_is_nothing_to_do(rng: np.random.Generator):
    outcome = NBC(keep="always").fit(BLOCK, cut(tokens(rng, 4), np.zeros((4, TOKENS, WIDTH))))

    assert outcome == Outcome(None, "there is no error to correct")


def test_tokens_that_do_not_line_up_are_declined(rng: np.random.Generator):
    outcome = NBC().fit(BLOCK, cut(tokens(rng, 4), rng.normal(size=(4, TOKENS - 1, WIDTH))))

    assert outcome == Outcome(None, "its input and output do not line up")


def test_the_price_decides_between_branches(rng: np.random.Generator):
    x = tokens(rng)
    data = cut(x, straight(2 * linear_error(rng, x)))

    best, cheap = (NBC(price=price).fit(PRICED, data) for price in (0.0, 0.6))

    assert best.gain_db is not None
    assert cheap.gain_db is not None
    assert best.gain_db > cheap.gain_db > 0
    shares = [float(outcome.reason.split(", ")[-1].split(" %")[0]) for outcome in (best, cheap)]
    assert shares[0] > shares[1] > 0


def test_what_is_not_worth_its_time_is_declined(rng: np.random.Generator):
    x = tokens(rng)

    outcome = NBC(price=100.0, weight="int8", alpha=math.inf).fit(PRICED, cut(x, linear_error(rng, x)))

    assert outcome.fit is None
    gain, share = outcome.reason.split(" dB are not worth ")
    assert float(gain) > 1.0
    assert share.endswith(" % of the block's time")


def test_without_a_known_time_nothing_has_a_price(rng: np.random.Generator):
    x = tokens(rng)

    outcome = NBC(price=100.0, alpha=math.inf, weight="int8").fit(BLOCK, cut(x, linear_error(rng, x)))

    assert outcome.fit is not None
    assert outcome.reason == "linear, int8"


# --- the graph ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 1.0, math.inf])
@pytest.mark.parametrize("weight", ["float", "int8", "low-rank"])
def test_the_graph_computes_what_was_judged(weight: str, alpha: float, rng: np.random.Generator):
    x = tokens(rng)
    fit = fitted(NBC(alpha=alpha, weight=weight, price=0.0).fit(BLOCK, cut(x, linear_error(rng, x))))

    session, tape, _ = edited(BLOCK, fit)

    sample = x[:1].astype(np.float32)
    wanted = compensation(fit, sample[0])
    found = session.run({"x": sample})["y"][0] + sample[0]
    # float32: outputs of order 1 and the sum with x. int8: where x falls between two codes, either is right, and then a
    # token's output moves by one step of u times the largest weight, for each of two inputs at most.
    step = 2 * float(fit["input_scale"]) * 127 * float(fit["scale"].max()) if "codes" in fit else 0.0
    span = float(fit["bound"].max() * (fit["unit"].max() + np.abs(wanted).max())) if "unit" in fit else 1.0
    assert np.abs(found - wanted).max() <= 1e-5 + step * span
    assert np.median(np.abs(found - wanted)) < 1e-6
    assert all(node.name.startswith("block/nbc/") for node in tape.nodes)


@pytest.mark.parametrize("alpha", [1.0, math.inf])
@pytest.mark.parametrize("weight", ["float", "int8", "low-rank"])
def test_the_graph_of_a_stage_computes_what_was_judged(weight: str, alpha: float, rng: np.random.Generator):
    """Two groups of 64 channels, and every second pixel."""
    x = rng.normal(size=(24, 128, 8, 8))
    errors = 0.5 * x[:, ::-1, ::2, ::2] + 0.1 * rng.normal(size=(24, 128, 4, 4))
    errors[:, :64] += 0.5 * x[:, :64, ::2, ::2]
    fit = fitted(NBC(alpha=alpha, weight=weight, keep="always").fit(STAGE, cut(x, errors)))
    body = "y = AveragePool<kernel_shape = [1, 1], strides = [2, 2]>(x)"

    session, _, _ = edited(STAGE, fit, body)

    sample = x[:1].astype(np.float32)
    found = session.run({"x": sample})["y"] - sample[:, :, ::2, ::2]
    wanted = compensation(fit, np.moveaxis(sample[0, :, ::2, ::2], 0, -1).reshape(-1, 128))
    assert (fit["left"] if weight == "low-rank" else fit["weight" if weight == "float" else "codes"]).shape[1] == 64
    # float32 sums of 64 products of order 1, and the derivative of L^-1
    assert np.abs(np.moveaxis(found[0], 0, -1).reshape(-1, 128) - wanted).max() < 1e-4


@pytest.mark.parametrize("alpha", [1.0, math.inf])
def test_int8_runs_as_an_integer_matmul(alpha: float, rng: np.random.Generator):
    x = tokens(rng)
    fit = fitted(NBC(alpha=alpha, weight="int8").fit(BLOCK, cut(x, linear_error(rng, x))))

    _, _, data = edited(BLOCK, fit)

    kinds = [node.op_type for node in runtime.optimized(data)]
    assert kinds.count("MatMulIntegerToFloat") == 1
    assert "MatMul" not in kinds


@pytest.mark.parametrize("t", [0.0, 1e-30, 0.5, 30.0, 1e4, 1e9, 1e30])
def test_the_forms_of_both_functions_hold_wherever_numbers_go(t: float):
    """One channel, W = 1 and no bias: a_e L^-1(L(x)), clipped at the bound."""
    block = Block("block", ("x",), "y", -1, 3, (WIDTH, WIDTH))
    one = np.ones(WIDTH, np.float32)
    bound = np.full(WIDTH, 5.0, np.float32)
    weight = (np.eye(WIDTH) / 5).astype(np.float32)
    fit = {"factor": one, "log": one[0], "weight": weight, "bias": 0 * one, "bound": bound, "unit": one}
    x = np.full((1, TOKENS, WIDTH), t, np.float32)
    x[:, ::2] *= -1

    found = edited(block, fit)[0].run({"x": x})["y"] + x

    wanted = np.sign(x) * np.minimum(np.abs(x), math.expm1(5.0))
    # An epsilon of 1 + |x| in ln, as much in exp, and what the sum with x rounds away.
    epsilon = float(np.finfo(np.float32).eps)
    assert np.abs(found - wanted).max() <= 8 * epsilon * (1 + float(np.abs(wanted).max())) + 2 * epsilon * t


# --- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"alpha": -1.0}, "alpha = -1.0 is not understood. Input should be greater than or equal to 0."),
        ({"alpha": math.nan}, "alpha = nan is not understood. Input should be greater than or equal to 0."),
        ({"price": -0.1}, "price = -0.1 is not understood. Input should be greater than or equal to 0."),
        ({"ridge": 0.0}, "ridge = 0.0 is not understood. Input should be greater than 0."),
        ({"weight": "int4"}, "weight = 'int4' is not understood. Input should be 'auto', 'float', 'int8' or 'low-rank'."),
        ({"keep": "never"}, "keep = 'never' is not understood. Input should be 'if-better' or 'always'."),
    ],
)
def test_an_option_out_of_range_is_refused(options: dict[str, float | str], text: str):
    with pytest.raises(RecipeError) as error:
        NBC(**options)  # pyright: ignore[reportArgumentType]

    assert str(error.value) == text


@pytest.mark.parametrize("alpha", [0.0, 3.0, math.inf])
def test_options_survive_toml(alpha: float):
    written = Recipe(compensate=(NBC(alpha=alpha, weight="low-rank", ridge=0.01, price=0.5, keep="always"),))

    assert recipe.loads(recipe.dumps(written)) == written


def test_it_is_fitted_to_blocks():
    assert NBC().scope == "block"


def test_the_deviation_is_that_of_all_parts_together_and_never_that_of_what_is_not_finite():
    x = np.random.default_rng(4).integers(-99, 99, (300, 6)).astype(np.float32)  # whole numbers: every sum is exact

    found = _deviation(np.split(x, [1, 50, 220]))

    # two terms of at most 99^2, a few roundings each
    assert np.max(np.abs(np.square(found) - x.astype(np.float64).var(axis=0))) <= 8 * 99**2 * 2.0**-53
    assert np.all(_deviation([np.full((1000, 2), 0.1, np.float32)]) >= 0)
    with pytest.raises(DataError, match=NOT_FINITE):
        _deviation([x, np.full((1, 6), np.inf, np.float32)])
