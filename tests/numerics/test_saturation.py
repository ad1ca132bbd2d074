"""Where two 8-bit products leave 16 bits: never missed, and hardly ever suspected in vain."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from tiny import Tiny, build

from onnxcomp.graph.convert import to_graph
from onnxcomp.graph.edit import Node
from onnxcomp.numerics.saturation import LIMIT, may_saturate, reach
from onnxcomp.pipeline import quantize
from onnxcomp.recipe import Bits, Recipe

Array = np.ndarray
CASES = 400


def largest_sum(rows: Array, patches: Array) -> float:
    """The largest sum of two neighbouring products, in size: `rows` [O, K] are weights, `patches` [T, K] what they meet."""
    width = rows.shape[1] + rows.shape[1] % 2
    w, a = (np.pad(x.astype(np.int64), ((0, 0), (0, width - x.shape[1]))).reshape(len(x), -1, 2) for x in (rows, patches))
    return float(np.abs(np.einsum("opk,tpk->otp", w, a)).max())


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
        verdicts.append(assert_judged(found, max(map(largest_sum, rows, tops))))
    assert len(set(verdicts)) == 2


def test_a_depthwise_conv_is_exact():
    w, a = np.full((4, 1, 3, 3), 127, np.int8), np.full((5, 4), 255)

    assert not may_saturate(w, a.max(axis=0), reach(a), groups=4)


def test_weights_of_seven_bits_never_saturate():
    a = np.full((1, 8), 255)

    assert not may_saturate(np.full((8, 2), -64, np.int8), a[0], reach(a))
    assert may_saturate(np.full((8, 2), -65, np.int8), a[0], reach(a))


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


def stored_codes(target: str, bits: Bits) -> tuple[dict[str, int], list[str]]:
    """The largest weight code in front of each layer, and the layers that the report says got 7 bits."""
    tiny = two_layers()
    recipe = Recipe(target=target, bits=bits, activations="static", compensate=(), rotation="none")
    result = quantize(tiny.model, tiny.samples, recipe)
    nodes = {node.name: node for node in to_graph(result.model).nodes}
    largest = {name: int(np.abs(codes_of(nodes[name]).astype(int)).max()) for name in ("one", "other")}
    said = [d for d in result.report.decisions if d.method == "7-bit weights"]
    reasons = {d.reason for d in said if d.adopted}
    assert reasons <= {"sums of two products of 8-bit weights may leave 16 bits, so these have 7"}
    return largest, [d.site for d in said]


def test_without_vnni_the_layers_that_may_saturate_have_weights_of_seven_bits_and_no_others():
    largest, said = stored_codes("ort-x86-avx2", Bits(8, 8))

    assert said == ["one"]
    assert largest["one"] <= 64
    assert largest["other"] > 100


@pytest.mark.parametrize(("target", "bits"), [("ort-x86", Bits(8, 8)), ("ort-arm", Bits(8, 8)), ("ort-x86-avx2", Bits(7, 8))])
def test_elsewhere_every_weight_keeps_its_bits(target: str, bits: Bits):
    largest, said = stored_codes(target, bits)

    assert said == []
    assert min(largest.values()) > 2 ** (bits.weights - 2)


def test_without_data_every_input_may_be_the_largest():
    tiny = two_layers()

    result = quantize(tiny.model, None, replace(Recipe(compensate=()), target="ort-x86-avx2", activations="dynamic"))

    assert [d.site for d in result.report.decisions if d.method == "7-bit weights"] == ["one", "other"]
