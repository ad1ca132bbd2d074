"""Where two 8-bit products leave 16 bits: never missed, and hardly ever suspected in vain."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from tiny import Tiny, build

from onnxcomp.graph.convert import to_graph
from onnxcomp.graph.edit import Node
from onnxcomp.numerics.saturation import LIMIT, crowded, hold, reach
from onnxcomp.pipeline import quantize
from onnxcomp.recipe import Bits, Recipe

Array = np.ndarray
CASES = 400


def largest_sum(rows: Array, patches: Array) -> float:
    """The largest sum of two neighbouring products, in size: `rows` [O, K] are weights, `patches` [T, K] what they meet."""
    width = rows.shape[1] + rows.shape[1] % 2
    w, a = (np.pad(x.astype(np.int64), ((0, 0), (0, width - x.shape[1]))).reshape(len(x), -1, 2) for x in (rows, patches))
    return float(np.abs(np.einsum("opk,tpk->otp", w, a)).max())


def may_saturate(codes: Array, highest: Array, pairs: Array, groups: int = 1) -> bool:
    """Whether any output channel has to have other codes."""
    scale = np.ones(codes.shape[1] if codes.ndim == 2 else len(codes), np.float32)
    return not np.array_equal(hold(codes.astype(float), codes, scale, highest, pairs, groups)[0], codes)


def codes(rng: np.random.Generator, *shape: int) -> Array:
    """Weights of a random reach, mostly of one sign."""
    largest = int(rng.integers(80, 129))
    return (rng.integers(0, largest, shape) * rng.choice([-1, 1, 1, 1], shape)).clip(-128, 127).astype(np.int8)


def activations(rng: np.random.Generator, rows: int, channels: int) -> Array:
    """Codes of channels that differ in how far they reach."""
    return (rng.integers(0, 256, (rows, channels)) * rng.uniform(0.6, 1, channels)).astype(np.uint8)


def assert_judged(found: bool, largest: float) -> bool:
    """Whatever saturates is found, and what is found comes within 1 % of it; whether it does saturate."""
    assert found or largest <= LIMIT
    assert not found or largest > LIMIT / 1.01
    return largest > LIMIT


@pytest.mark.parametrize("channels", [1, 2, 5, 8])
def test_sums_of_a_matmul_are_found(rng: np.random.Generator, channels: int):
    verdicts = []
    for _ in range(CASES):
        w, a = codes(rng, channels, 3), activations(rng, 6, channels)

        found = may_saturate(w, a.max(axis=0), reach(a))

        verdicts.append(assert_judged(found, largest_sum(w.T, a)))
    assert len(set(verdicts)) == min(channels, 2)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("channels", [2, 4])
def test_sums_of_a_conv_are_found_position_by_position(rng: np.random.Generator, channels: int, groups: int):
    """Any position of the input may come to stand under any one of the kernel's."""
    verdicts = []
    for _ in range(CASES // 4):
        w, a = codes(rng, 2 * groups, channels, 2, 1), activations(rng, 4, channels * groups)

        found = may_saturate(w, a.max(axis=0), reach(a), groups)

        largest = 0.0
        for group in range(groups):
            mine, rows = a[:, group * channels :][:, :channels], w[2 * group :][:2].transpose(0, 2, 3, 1).reshape(2, -1)
            pairs = [np.concatenate(taps) for taps in itertools.product(mine, repeat=2)]
            largest = max(largest, largest_sum(rows, np.stack(pairs)))
        verdicts.append(assert_judged(found, largest))
    assert len(set(verdicts)) == 2


@pytest.mark.parametrize("groups", [1, 2])
def test_with_odd_channels_neighbours_are_of_two_positions_and_meet_at_their_largest(rng: np.random.Generator, groups: int):
    verdicts = []
    for _ in range(CASES):
        w, a = codes(rng, 2 * groups, 3, 3), activations(rng, 6, 3 * groups)
        top = a.max(axis=0)

        found = may_saturate(w, top, reach(a), groups)

        rows = w.transpose(0, 2, 1).reshape(groups, 2, -1)
        tops = [np.tile(part, 3)[None] for part in top.reshape(groups, -1)]
        largest = max(map(largest_sum, rows, tops))
        # Or a channel of zeros stands behind each position, and then neighbours are of one.
        filled = np.pad(rows.reshape(groups, 2, 3, 3), ((0, 0), (0, 0), (0, 0), (0, 1))).reshape(groups, 2, -1)
        rest = a.reshape(6, groups, 3) if groups == 1 else np.tile(top, (6, 1)).reshape(6, groups, 3)
        patches = np.tile(np.pad(rest, ((0, 0), (0, 0), (0, 1))), (1, 1, 3)).swapaxes(0, 1)
        verdicts.append(assert_judged(found, max(largest, *map(largest_sum, filled, patches))))
    assert len(set(verdicts)) == 2


def test_a_depthwise_conv_is_exact():
    w, a = np.full((4, 1, 3, 3), 127, np.int8), np.full((5, 4), 255)

    assert not may_saturate(w, a.max(axis=0), reach(a), groups=4)
    # With one input channel, or two outputs of each, it has the kernel of any other.
    assert may_saturate(w, a[0, :1], reach(a[:, :1]), groups=1)
    assert may_saturate(w, a[0, :2], reach(a[:, :2]), groups=2)


def test_weights_of_seven_bits_are_never_suspected():
    a = np.full((1, 8), 255)

    assert not may_saturate(np.full((8, 2), -63, np.int8), a[0], reach(a))
    assert may_saturate(np.full((8, 2), -65, np.int8), a[0], reach(a))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("channels", [2, 3, 4])
def test_with_a_channel_of_zeros_behind_each_position_odd_channels_are_found_too(
    rng: np.random.Generator, channels: int, groups: int
):
    for _ in range(CASES // 4):
        w, a = codes(rng, 2 * groups, channels, 2, 1), activations(rng, 4, channels * groups)

        found = may_saturate(w, a.max(axis=0), reach(a), groups)

        for group in range(groups):
            mine = np.pad(a[:, group * channels :][:, :channels], ((0, 0), (0, channels % 2)))
            filled = np.pad(w[2 * group :][:2], ((0, 0), (0, channels % 2), (0, 0), (0, 0)))
            rows = filled.transpose(0, 2, 3, 1).reshape(2, -1)
            patches = [np.concatenate(taps) for taps in itertools.product(mine, repeat=2)]
            assert found or largest_sum(rows, np.stack(patches)) <= LIMIT


# --- codes that fit --------------------------------------------------------------------------------------------------


def rounded(w: Array, axis: int) -> tuple[Array, Array]:
    """The codes of 8 bits and the scales [C_out] of a weight."""
    rows = np.moveaxis(w, axis, 0)
    scale = (np.abs(rows.reshape(len(rows), -1)).max(axis=1) / 127).astype(np.float32)
    return np.moveaxis(np.rint(rows / scale.reshape(-1, *[1] * (w.ndim - 1))), 0, axis).astype(np.int8), scale


@pytest.mark.parametrize("channels", [1, 2, 5, 8])
def test_what_is_held_fits_and_is_closer_than_seven_bits_are(rng: np.random.Generator, channels: int):
    counts = set()
    for _ in range(CASES // 4):
        w, a = rng.uniform(-0.2, 1, (channels, 3)), activations(rng, 6, channels)
        before, scale = rounded(w, 1)

        held, steps = hold(w, before, scale, a.max(axis=0), reach(a))

        assert largest_sum(held.T, a) <= LIMIT
        assert held.dtype == np.int8
        assert steps.dtype == np.float32
        changed = (held != before).any(axis=0)
        assert (steps == scale)[~changed].all()
        seven = np.square(np.rint(w / scale / 2) * scale * 2 - w).sum(axis=0)
        assert (np.square(held * steps - w).sum(axis=0)[changed] <= seven[changed] * (1 + 1e-6)).all()
        counts.add(changed.sum())
    assert (counts > {0}) == (channels > 1)


@pytest.mark.parametrize(("shape", "groups"), [((4, 3, 2, 1), 1), ((4, 3, 2, 1), 2), ((6, 4, 1, 2), 3), ((4, 2, 3), 1)])
def test_what_is_held_of_a_conv_is_not_suspected_again(rng: np.random.Generator, shape: tuple[int, ...], groups: int):
    found = 0
    for _ in range(20):
        w, a = rng.uniform(0.1, 1, shape), activations(rng, 6, groups * shape[1])
        before, scale = rounded(w, 0)

        held, steps = hold(w, before, scale, a.max(axis=0), reach(a), groups)

        assert held.shape == shape
        # What is cut off when a pair is shortened turns it a little, and the bound of that direction is 0.5 % looser.
        assert not may_saturate(held, (0.99 * a).max(axis=0), reach(0.99 * a), groups)
        assert np.abs(held * steps.reshape(-1, *[1] * (w.ndim - 1)) - w).max() <= 0.6
        found += (held != before).sum()
    assert found


@pytest.mark.parametrize(
    ("shape", "groups"), [((20, 6), 1), ((21, 6), 1), ((4, 6, 2, 1), 1), ((4, 5, 2, 1), 1), ((4, 6, 1, 2), 2), ((4, 5, 2), 2)]
)
def test_the_reach_of_pairs_that_are_not_crowded_does_not_matter(rng: np.random.Generator, shape: tuple[int, ...], groups: int):
    changed = spared = 0
    for _ in range(20):
        channels = shape[0] if len(shape) == 2 else groups * shape[1]
        w, a = rng.normal(0, 0.5, shape), activations(rng, 6, channels)
        before, scale = rounded(w, 1 if len(shape) == 2 else 0)
        highest, pairs = a.max(axis=0), reach(a.max(axis=0)[None])
        asked = crowded(before, highest, groups)
        pairs[asked] = reach(a)[asked]

        held, steps = hold(w, before, scale, highest, pairs, groups)

        wanted, wanted_steps = hold(w, before, scale, highest, reach(a), groups)
        assert (held == wanted).all()
        assert (steps == wanted_steps).all()
        changed, spared = changed + (held != before).sum(), spared + (~asked).sum()
    assert spared
    assert changed


def test_channels_that_fit_are_left_as_they_are(rng: np.random.Generator):
    w = rng.uniform(0.1, 1, (8, 3))
    w[:, 1] *= rng.choice([-1, 1], 8)
    w[1::2, 1] = -np.sign(w[::2, 1]) * np.abs(w[1::2, 1])
    before, scale = rounded(w, 1)

    held, steps = hold(w, before, scale, np.full(8, 255), reach(np.full((1, 8), 255)))

    assert (held[:, [0, 2]] != before[:, [0, 2]]).any(axis=0).all()
    assert (held[:, 1] == before[:, 1]).all()
    assert steps[1] == scale[1]


# --- the pipeline ----------------------------------------------------------------------------------------------------


def two_layers() -> Tiny:
    """In front of `one` neighbouring channels are large together, in front of `other` never."""
    rng = np.random.default_rng(0)
    text = """<ir_version: 10, opset_import: ["" : 21]> two (float[N,8] x, float[N,8] z) => (float[N,4] y, float[N,4] v) {
        [one] y = MatMul(x, w)
        [other] v = MatMul(z, w2)
    }"""
    w = rng.uniform(0.9, 1, size=(8, 4)).astype(np.float32)
    x = rng.uniform(0, 1, size=(12, 1, 8)).astype(np.float32)
    x[:, :, :2] = 1
    z = x * np.float32([1, 0] * 4)
    return build("two", text, {"w": w, "w2": w.copy()}, [{"x": a, "z": b} for a, b in zip(x, z, strict=True)])


def codes_of(node: Node) -> Array:
    """The codes of a product's weight, whatever makes them a factor."""
    tensor = node.inputs[1]
    while tensor.inputs:
        tensor = tensor.inputs[0].inputs[0]
    return tensor.values


def stored_codes(target: str, bits: Bits) -> tuple[dict[str, Array], list[str]]:
    """The weight's codes in front of each layer, and the layers where the report says that some were changed."""
    tiny = two_layers()
    recipe = Recipe(target=target, bits=bits, activations="static", compensate=(), rotation="none")
    result = quantize(tiny.model, tiny.samples, recipe)
    nodes = {node.name: node for node in to_graph(result.model).nodes}
    said = [d for d in result.report.decisions if d.method == "saturation"]
    text = "sums of two products of 8-bit codes may leave 16 bits, so some of the weight's were changed"
    assert {d.reason for d in said if d.adopted} <= {text}
    return {name: codes_of(nodes[name]).astype(int) for name in ("one", "other")}, [d.site for d in said]


def test_without_vnni_the_layers_that_may_saturate_have_other_codes_and_no_others():
    found, said = stored_codes("ort-x86-avx2", Bits(8, 8))

    assert said == ["one"]
    assert np.abs(found["one"][::2] + found["one"][1::2]).max() * 255 <= 32767
    assert np.abs(found["one"]).max() >= 63
    assert np.abs(found["other"]).max() > 100


@pytest.mark.parametrize(("target", "bits"), [("ort-x86", Bits(8, 8)), ("ort-arm", Bits(8, 8)), ("ort-x86-avx2", Bits(7, 8))])
def test_elsewhere_every_weight_keeps_its_bits(target: str, bits: Bits):
    found, said = stored_codes(target, bits)

    assert said == []
    assert min(np.abs(codes).max() for codes in found.values()) > 2 ** (bits.weights - 2)


def test_without_data_every_input_may_be_the_largest():
    tiny = two_layers()

    result = quantize(tiny.model, None, replace(Recipe(compensate=()), target="ort-x86-avx2", activations="dynamic"))

    assert [d.site for d in result.report.decisions if d.method == "saturation"] == ["one", "other"]
