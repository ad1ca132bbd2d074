"""Weight rounding: codes and scales per output channel, and what they stand for in the graph."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from equality import parse, run

from onnxcomp.calibrate.samples import Cut, LiveBatch
from onnxcomp.graph.edit import DOMAIN, Tape
from onnxcomp.graph.sites import Site
from onnxcomp.methods import weights
from onnxcomp.methods.base import Fit
from onnxcomp.numerics.affine import weight_qparams

Array = np.ndarray

MATMUL = Site("fc", "MatMul", "layer", ("x",), "y", "y", -1, weight="w", weight_axis=1)
CONV = Site("conv", "Conv", "layer", ("x",), "y", "y", 1, rank=4, weight="w", weight_axis=0)


@pytest.mark.parametrize(("site", "shape", "channels"), [(MATMUL, (6, 5), 5), (CONV, (4, 3, 2, 2), 4)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_weight_has_one_scale_per_output_channel_and_codes_of_its_width(
    rng: np.random.Generator, site: Site, shape: tuple[int, ...], channels: int, bits: int
):
    w = rng.normal(size=shape).astype(np.float32)

    fit = weights.fit(site, w, bits)

    codes, scale = fit["codes"], fit["scale"]
    assert (codes.dtype, codes.shape, scale.dtype, scale.shape) == (np.int8, shape, np.float32, (channels,))
    assert -(2 ** (bits - 1)) <= codes.min()
    assert codes.max() <= 2 ** (bits - 1) - 1
    q = weight_qparams(w, site.weight_axis, bits)
    assert scale.tobytes() == q.scale.tobytes()
    along = scale.reshape([-1 if i == site.weight_axis else 1 for i in range(w.ndim)])
    nearest = np.clip(np.rint(w / along), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert np.array_equal(codes, nearest)


def test_a_weight_on_its_own_grid_is_kept_exactly():
    codes = np.array([[-8, 3], [7, -8], [1, 7]], np.int8)
    w = codes * np.array([0.5, 2], np.float32)

    fit = weights.fit(MATMUL, w, 4)

    assert np.array_equal(fit["codes"] * fit["scale"], w)


def test_a_dead_channel_has_codes_of_zero_and_a_positive_scale():
    fit = weights.fit(MATMUL, np.array([[0, 1], [0, -1]], np.float32), 8)

    assert fit["codes"][:, 0].tolist() == [0, 0]
    assert fit["scale"][0] > 0


@pytest.mark.parametrize(("site", "axis"), [(MATMUL, 1), (CONV, 0)])
def test_the_codes_replace_the_weight_behind_one_abstract_node(site: Site, axis: int):
    tape = Tape("w/quantized")
    fitted = {"codes": np.ones((2, 2), np.int8), "scale": np.ones(2, np.float32)}

    new = weights.build(tape, site, fitted, 4)

    (node,) = tape.nodes
    assert new == {"w": node.name}
    assert (node.op, node.domain, node.inputs) == ("Dequantize", DOMAIN, ("w/quantized.codes", "w/quantized.scale"))
    assert node.attrs == {"bits": 4, "axis": axis}


# --- GPTQ ------------------------------------------------------------------------------------------------------------


def samples(x: Array) -> Cut:
    """The samples x [N, ...], one at a time, as a layer's input."""
    return Cut([LiveBatch((i,), {"x": x[i : i + 1]}) for i in range(len(x))], {"xh": "x"})


def gptq(site: Site, w: Array, x: Array, bits: int = 4, **attrs: object) -> Fit:
    return weights.fit_gptq(site, w, bits, samples(x), attrs, lambda array: array)


def values(site: Site, fitted: Fit) -> Array:
    shape = [-1 if i == site.weight_axis else 1 for i in range(fitted["codes"].ndim)]
    return fitted["codes"] * fitted["scale"].astype(np.float64).reshape(shape)


def test_a_weight_on_its_own_grid_is_kept_exactly_by_gptq(rng: np.random.Generator):
    codes = np.concatenate([np.full((1, 5), -8), rng.integers(-8, 8, size=(5, 5))]).astype(np.int8)
    x = (rng.normal(size=(8, 32, 6)) @ rng.normal(size=(6, 6))).astype(np.float32)

    fitted = gptq(MATMUL, codes * np.float32(0.25), x)

    assert np.array_equal(fitted["codes"] * fitted["scale"], codes * np.float32(0.25))


@pytest.mark.parametrize("size", [8, 960])
@pytest.mark.parametrize("spread", [0.0, 1e-6, 1e-3])
def test_inputs_that_hardly_vary_leave_the_weight_near_the_nearest(rng: np.random.Generator, spread: float, size: int):
    """Of their sums of squares in float32, centred, nothing is left but what was rounded."""
    w = rng.normal(size=(size, 5)).astype(np.float32)
    x = (rng.normal(size=size) * (1 + spread * rng.normal(size=(16, 128, size)))).astype(np.float32)

    fitted = weights.fit_gptq(MATMUL, w, 4, samples(x), {}, lambda array: array, centred=True)

    off, least = (np.square(values(MATMUL, found) - w).mean() for found in (fitted, weights.fit(MATMUL, w, 4)))
    assert off < 10 * least


def test_the_weight_takes_up_what_the_inputs_lose_in_their_quantizer(rng: np.random.Generator):
    w, x = rng.normal(size=(6, 5)).astype(np.float32), rng.normal(size=(8, 32, 6)).astype(np.float32)

    fitted = weights.fit_gptq(MATMUL, w, 8, samples(x), {}, lambda array: array * np.float32(0.9))

    error, nearest = (np.linalg.norm(0.9 * values(MATMUL, f) - w) for f in (fitted, weights.fit(MATMUL, w, 8)))
    assert error < nearest / 4  # the nearest codes leave the whole 10 %, GPTQ the damping's 5 % of it and what it clips


@pytest.mark.parametrize(("site", "shape", "energy"), [(MATMUL, (4, 4), 3.0), (CONV, (4, 4, 1), 9.0)])
def test_a_token_counts_with_no_more_than_the_mean_energy_and_a_position_in_full(
    site: Site, shape: tuple[int, ...], energy: float
):
    tokens = np.diag([1, 1, 1, 3]).astype(np.float32)[None]  # energies 1, 1, 1, 9: the mean is 3
    how = {"site": site, "w": np.eye(4)[None], "gram": None, "kernel": shape[2:], "attrs": {}, "fake": np.array, "limit": 4}

    seen = samples(tokens).reduce(functools.partial(weights._moments, **how))

    np.testing.assert_allclose(seen[0, 0, :4, :4], np.diag([1, 1, 1, energy]), rtol=4 * np.finfo(np.float32).eps)


def test_a_wide_layer_sums_its_inputs_and_gets_the_moments_of_its_outputs_from_them(rng: np.random.Generator):
    w, x = rng.normal(size=(1, 6, 9)), rng.normal(size=(8, 32, 6)).astype(np.float32)
    how = {"site": MATMUL, "w": w, "kernel": (), "attrs": {}, "fake": np.round, "limit": 32}

    direct, through = (
        samples(x).reduce(functools.partial(weights._moments, gram=gram, **how)) for gram in (None, w[0] @ w[0].T)
    )

    np.testing.assert_allclose(through[..., :7], direct[..., :7], rtol=1e-5)
    scale = np.abs(direct[..., 7:]).max()
    np.testing.assert_allclose(through[..., 7:] @ w, direct[..., 7:], rtol=0, atol=1e-5 * scale)  # float32 sums of 32 tokens


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("block", [90, 32])
def test_turns_of_scale_and_codes_lower_the_error_that_gptq_leaves(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, bits: int, block: int
):
    w, x = rng.normal(size=(3, 90, 4)), rng.normal(size=(3, 400, 90)) @ rng.normal(size=(3, 90, 90))
    h = np.swapaxes(x, 1, 2) @ x

    scale = np.abs(w).max(axis=1, keepdims=True) / 2 ** (bits - 1) + 0 * w
    ends = np.full((1, 1, 1), -(2.0 ** (bits - 1))), np.full((1, 1, 1), 2.0 ** (bits - 1) - 1)

    errors = []
    for turns in (0, 1, 2):
        monkeypatch.setattr(weights, "TURNS", turns)
        found = [weights._gptq(*(a[g : g + 1] for a in (w, h, h @ w, scale)), np.arange(90) // block, ends) for g in range(3)]
        codes, step = (np.concatenate(parts) for parts in zip(*found, strict=True))
        damped = h + weights.DAMPING * np.einsum("gkk->g", h)[:, None, None] / 90 * np.eye(90)
        errors.append(weights._loss(codes * step, damped, damped @ w))

    assert np.all(errors[1] < errors[0])
    assert np.all(errors[2] <= errors[1] + 1e-6 * np.abs(errors[1]))  # a scale is rounded to float32


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_correlated_inputs_make_less_error_than_with_rounding_to_nearest(rng: np.random.Generator, bits: int):
    w = rng.normal(size=(16, 8)).astype(np.float32)
    x = (rng.normal(size=(16, 32, 16)) @ rng.normal(size=(16, 16))).astype(np.float32)

    error, nearest = (
        np.square(x[3::4] @ (values(MATMUL, fitted) - w)).sum()
        for fitted in (gptq(MATMUL, w, x, bits), weights.fit(MATMUL, w, bits))
    )

    assert error < nearest


def test_an_output_channel_keeps_its_codes_where_held_out_samples_would_not_gain(rng: np.random.Generator):
    w = rng.normal(size=(8, 64)).astype(np.float32)
    x = (rng.normal(size=(8, 4, 8)) @ rng.normal(size=(8, 8))).astype(np.float32)
    x[3::4] = np.eye(8)[:4]  # where inputs do not correlate rounding to nearest is best

    fitted, nearest = gptq(MATMUL, w, x), weights.fit(MATMUL, w, 4)

    held_out = np.concatenate(list(x[3::4])).astype(np.float64)
    energy = np.square(held_out @ w).sum(axis=1)
    held_out *= np.sqrt(np.minimum(1, energy.reshape(2, 4).mean(axis=1).repeat(4) / energy))[:, None]
    errors = [np.square(held_out @ (values(MATMUL, f) - w)).sum(axis=0) for f in (fitted, nearest)]
    assert np.all(errors[0] <= errors[1])


@pytest.mark.parametrize(
    ("shape", "kernel", "attrs"),
    [
        ((4, 6, 5), (3, 3), {"pads": [1, 0, 0, 1], "strides": [2, 1]}),
        ((4, 7, 7), (3, 2), {"dilations": [2, 1]}),
        ((4, 6, 6), (1, 1), {}),
        ((4, 5, 5), (3, 3), {"group": 2, "pads": [1, 1, 1, 1]}),
        ((4, 5, 5), (3, 3), {"group": 4}),
        ((4, 9), (3,), {"pads": [1, 1]}),
    ],
)
def test_the_patches_of_a_conv_are_what_its_weight_is_multiplied_with(
    rng: np.random.Generator, shape: tuple[int, ...], kernel: tuple[int, ...], attrs: dict[str, list[int]]
):
    groups = attrs.get("group", 1)
    x = rng.integers(-4, 5, size=(1, *shape)).astype(np.float32)
    w = rng.integers(-4, 5, size=(8, shape[0] // groups, *kernel)).astype(np.float32)
    written = ", ".join(f"{key} = {value}" for key, value in attrs.items())
    written = f"<{written}>" if attrs else ""
    axes = ",".join(str(n) for n in x.shape)
    model = parse(f"g (float[{axes}] x) => (float y) {{ y = Conv{written}(x, w) }}", {"w": w}, opset=21)
    y = run(model, {"x": x})["y"]

    rows = weights.patches(x, kernel, attrs).reshape(-1, groups, w[0].size)
    found = np.stack([rows[:, g] @ w.reshape(groups, 8 // groups, -1)[g].T for g in range(groups)], axis=1)

    np.testing.assert_array_equal(np.moveaxis(found.reshape(*y.shape[2:], 8), -1, 0), y[0])


def test_a_conv_in_groups_is_rounded_group_by_group(rng: np.random.Generator):
    w = rng.normal(size=(6, 2, 3, 3)).astype(np.float32)
    x = np.cumsum(rng.normal(size=(8, 4, 9, 9)), axis=-1).astype(np.float32)

    whole = gptq(CONV, w, x, group=2)["codes"]

    for g, part in enumerate((slice(0, 3), slice(3, 6))):
        alone = gptq(CONV, w[part], x[:, 2 * g : 2 * g + 2])["codes"]
        np.testing.assert_array_equal(whole[part], alone)


# --- blocks ----------------------------------------------------------------------------------------------------------


def in_blocks(fitted: Fit, block: int) -> Array:
    """The values [K, N] of codes with a scale, and a zero point, per block of K."""
    scale, zero = (
        np.repeat(fitted[key].astype(np.float64), block, axis=0)[: len(fitted["codes"])] if key in fitted else 0.0
        for key in ("scale", "zero_point")
    )
    return (fitted["codes"] - zero) * scale


@pytest.mark.parametrize("gptq", [False, True])
@pytest.mark.parametrize("size", [64, 72])
def test_every_block_of_inputs_has_its_own_scale_and_the_last_may_be_shorter(rng: np.random.Generator, size: int, gptq: bool):
    w = rng.normal(size=(size, 5)).astype(np.float32)
    w[32:64] *= 100
    x = rng.normal(size=(8, 32, size)).astype(np.float32)

    fitted = weights.fit_gptq(MATMUL, w, 4, samples(x), {}, np.array, 32) if gptq else weights.fit(MATMUL, w, 4, 32)

    assert (fitted["codes"].dtype, fitted["codes"].shape, "zero_point" in fitted) == (np.int8, w.shape, False)
    assert (fitted["scale"].dtype, fitted["scale"].shape) == (np.float32, (-(-size // 32), 5))
    assert np.all(fitted["scale"][1] > 20 * fitted["scale"][0])
    if not gptq:  # which lets one block's weights take up the error of the other's
        # A range of least squared error clips a little; half a step of the largest value is 1/15 of it.
        assert np.abs(in_blocks(fitted, 32) - w)[:32].max() < np.abs(w[:32]).max() / 4


def test_a_block_as_long_as_the_weight_is_a_scale_per_channel(rng: np.random.Generator):
    w = rng.normal(size=(32, 5)).astype(np.float32)

    block, channel = weights.fit(MATMUL, w, 4, 32), weights.fit(MATMUL, w, 4)

    assert np.array_equal(block["codes"], channel["codes"])
    assert np.array_equal(block["scale"][0], channel["scale"])


def test_zero_points_halve_the_step_of_weights_of_one_sign(rng: np.random.Generator):
    w = rng.uniform(0, 1, size=(64, 5)).astype(np.float32)

    errors = [np.square(in_blocks(weights.fit(MATMUL, w, 4, 32, zero_points=z), 32) - w).sum() for z in (False, True)]

    assert errors[1] < errors[0] / 3  # a quarter, but for what is clipped


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_in_blocks_makes_less_error_than_rounding_to_nearest(rng: np.random.Generator, bits: int, zero_points: bool):
    w = (rng.normal(size=(64, 8)) + 0.3).astype(np.float32)
    x = (rng.normal(size=(16, 32, 64)) @ rng.normal(size=(64, 64))).astype(np.float32)

    error, nearest = (
        np.square(x[3::4] @ (in_blocks(fitted, 32) - w)).sum()
        for fitted in (
            weights.fit_gptq(MATMUL, w, bits, samples(x), {}, np.array, 32, zero_points=zero_points),
            weights.fit(MATMUL, w, bits, 32, zero_points=zero_points),
        )
    )

    assert error < nearest


def test_blocks_and_their_zero_points_stand_behind_one_abstract_node():
    tape, ones = Tape("w/quantized"), np.ones((2, 2), np.int8)

    weights.build(tape, MATMUL, {"codes": ones, "scale": np.ones((1, 2), np.float32), "zero_point": ones[:1]}, 4, 32)

    (node,) = tape.nodes
    assert node.inputs == ("w/quantized.codes", "w/quantized.scale", "w/quantized.zero_point")
    assert node.attrs == {"bits": 4, "axis": 0, "block": 32}
