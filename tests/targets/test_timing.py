"""Which layers stay float for the time they take: where the front of a CNN ends, and what integer kernels are slow at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from equality import parse
from onnx import ModelProto

from onnxcomp.account import frozen
from onnxcomp.graph.prepare import prepare
from onnxcomp.graph.sites import find_sites
from onnxcomp.pipeline import quantize
from onnxcomp.recipe import Recipe
from onnxcomp.runtime import infer_types, profile
from onnxcomp.targets.timing import faster_in_float

SIZES = {
    "a": (32, 3, 3, 3),
    "b": (32, 1, 3, 3),
    "c": (16, 32, 1, 1),
    "d": (128, 16, 3, 3),
    "e": (128, 128, 3, 3),
    "f": (8, 128, 1, 1),
}


def net(text: str, size: int = 96, inputs: str = "") -> ModelProto:
    rng = np.random.default_rng(0)
    weights = {k: (rng.normal(size=s) / np.sqrt(np.prod(s[1:]))).astype(np.float32) for k, s in SIZES.items()}
    used = {key: array for key, array in weights.items() if f", {key})" in text}
    return parse(f"g (float[N,3,{size},{size}] x{inputs}) => (float[N,8,M,K] y) {{ {text} }}", used, opset=21)


STEM = "[a] h0 = Conv<pads = [1,1,1,1], strides = [2,2]>(x, a) h = Relu(h0)"
DEPTHWISE = "[b] i0 = Conv<pads = [1,1,1,1], group = 32>(h, b) i = Relu(i0)"
POINT = "[c] j = Conv(i, c)"
WIDE = "[d] k0 = Conv<pads = [1,1,1,1]>(j, d) k = Relu(k0) [e] l = Conv<pads = [1,1,1,1]>(k, e)"
LAST = "[f] m = Conv(l, f) y = Tanh(m)"
MOBILE = " ".join([STEM, DEPTHWISE, POINT, WIDE, LAST])


def front(model: ModelProto, size: int = 96, fixed: Sequence[str] = ()) -> list[str]:
    p = prepare(model, infer_types)
    convs = [site for site in find_sites(p.graph) if site.kind == "layer" and site.op == "Conv"]
    sites, floats = ([site for site in convs if (site.name in fixed) == is_fixed] for is_fixed in (False, True))
    channels = {"h": 32, "h0": 32, "i": 32, "i0": 32, "i1": 32, "j": 16, "k": 128, "k0": 128, "l": 128, "m": 8}

    def shapes_of(names: Sequence[str]) -> dict[str, tuple[int, ...]]:
        inner = {name: (1, channels.get(name, 8), size // 2, size // 2) for name in names}
        return inner | {"x": (1, 3, size, size), "other": (1, 1)}

    return list(faster_in_float(p.graph, sites, shapes_of, floats))


def test_the_front_ends_where_channels_are_few_and_before_they_are_many():
    assert front(net(MOBILE)) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("text", "inputs"),
    [
        (f"{STEM} {DEPTHWISE} {POINT} {WIDE} {LAST}", ", float[N,1] other"),  # a second input
        (f"[v] v0 = Tanh(x) {STEM.replace('(x, a)', '(v0, a)')} w0 = MatMul(h, h) i = Relu(w0) {POINT} {WIDE} {LAST}", ""),
    ],
)
def test_a_front_reads_one_image(text: str, inputs: str):
    text = text.replace("y = Tanh(m)", "n = Tanh(m) y = Add(n, other)") if inputs else text

    assert front(net(text, inputs=inputs)) in ([], ["a"])


def test_a_front_reaches_as_far_as_a_conv_that_is_float_anyway():
    """It would be handed codes, and hand some on."""
    small = net(MOBILE, 40)

    assert (front(small, 40), front(small, 40, fixed=["b"])) == ([], ["a", "c"])


def test_nothing_is_gained_where_the_first_conv_is_wide():
    wide = "[e] l = Conv<pads = [1,1,1,1]>(x, e)"

    weights = {key: np.ones(SIZES[key], np.float32) for key in "ef"}

    assert front(parse(f"g (float[N,128,64,64] x) => (float[N,8,64,64] y) {{ {wide} {LAST} }}", weights, opset=21)) == []


def test_what_skips_the_front_moves_its_end(rng: np.random.Generator):
    """The one tensor that is handed on is the sum, not what lies inside the residual block."""
    skip = "[b] i0 = Conv<pads = [1,1,1,1], group = 32>(h, b) i1 = Relu(i0) i = Add(i1, h)"

    assert front(net(f"{STEM} {skip} {POINT} {WIDE} {LAST}")) == ["a", "b", "c"]


def test_the_front_is_float_and_the_account_says_so(rng: np.random.Generator):
    data = rng.normal(size=(8, 3, 96, 96)).astype(np.float32)

    report = quantize(net(MOBILE), data).report

    found = {site.name: site for site in report.sites}
    assert [(found[name].activations, found[name].bits) for name in "abc"] == [("float", "w8")] * 3
    assert {found[name].rounding for name in "abc"} == {"gptq"}
    assert all(found[name].integer for name in "de")
    decided = [d for d in report.decisions if d.method == "float"]
    assert [d.site for d in decided] == ["a", "b", "c"]
    assert decided[0].reason.startswith("the first 3 Convs are faster in float, by ")


@pytest.mark.parametrize(
    "how", [{"sensitive": "asked"}, {"activations": "static"}, {"target": "ort-arm"}, {"target": "tensorrt"}]
)
def test_whoever_asks_for_integers_gets_them(rng: np.random.Generator, how: dict[str, str]):
    data = rng.normal(size=(8, 3, 96, 96)).astype(np.float32)

    report = quantize(net(MOBILE), data, Recipe(**how)).report  # pyright: ignore[reportArgumentType]

    assert not any(site.activations == "float" for site in report.sites if site.name in "abc")
    assert "float" not in {decision.method for decision in report.decisions}


def test_a_frozen_recipe_decides_nothing_again(rng: np.random.Generator):
    model, data = net(MOBILE), rng.normal(size=(8, 3, 96, 96)).astype(np.float32)
    first = quantize(model, data).report

    again = quantize(model, data, frozen(first)).report

    assert "float" not in {decision.method for decision in again.decisions}
    assert [(s.name, s.activations) for s in again.sites] == [(s.name, s.activations) for s in first.sites]


def test_what_nobody_would_notice_is_not_worth_it():
    assert front(net(MOBILE, 32), 32) == []


@pytest.mark.parametrize(("groups", "is_slow"), [(1, False), (2, False), (16, True), (32, True), (64, False)])
def test_small_groups_are_slow_and_depthwise_convs_are_not(rng: np.random.Generator, groups: int, is_slow: bool):
    """The channels are as many for all of them, and what is in front takes no time."""
    weights = {
        "w": rng.normal(size=(64, 64 // groups, 3, 3)).astype(np.float32),
        "v": rng.normal(size=(64, 64, 1, 1)).astype(np.float32),
    }
    text = f"""[a] h = Conv(x, v) [b] i = Conv<group = {groups}, pads = [1,1,1,1]>(h, w) [c] j = Conv(i, v) y = Tanh(j)"""
    model = parse(f"g (float[N,64,24,24] x) => (float[N,64,24,24] y) {{ {text} }}", weights, opset=21)

    report = quantize(model, rng.normal(size=(8, 64, 24, 24)).astype(np.float32)).report

    reasons = {d.site: d.reason for d in report.decisions if d.method == "float"}
    assert ("b" in reasons) == is_slow


def test_a_long_kernel_on_one_channel_is_an_island(rng: np.random.Generator):
    """Its values are gathered one by one."""
    shapes = {"w": (64, 64, 3, 3), "one": (1, 64, 1, 1), "long": (16, 1, 1, 25)}
    text = """[a] h = Conv<pads = [1,1,1,1]>(x, w) [b] i = Conv(h, one) [c] j = Conv(i, long) r = Relu(j)
        p = ReduceMean<keepdims = 1, axes = [2, 3]>(r) y = Tanh(p)"""
    weights = {key: (0.05 * rng.normal(size=shape)).astype(np.float32) for key, shape in shapes.items()}
    model = parse(f"g (float[N,64,96,96] x) => (float[N,16,1,1] y) {{ {text} }}", weights, opset=17)

    report = quantize(model, rng.normal(size=(8, 64, 96, 96)).astype(np.float32)).report

    reasons = {d.site: d.reason for d in report.decisions if d.method == "float"}
    assert [name for name, reason in reasons.items() if reason.startswith("its integer kernel takes ")] == ["c"]


ROWS = 64 * 64
HEADS = "h0 = Transpose<perm = [0, 2, 1]>(x) h = Softmax(h0) "


def floats(text: str, shapes: dict[str, tuple[int, ...]], rng: np.random.Generator, inputs: int = 4) -> list[str]:
    """The layers of a model over rows of `inputs` channels that stay float because that is faster."""
    weights = {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}
    model = parse(f"g (float[N,{inputs},{ROWS}] x) => (float[N,K,M] y) {{ {text} }}", weights, opset=21)
    report = quantize(model, rng.normal(size=(8, inputs, ROWS)).astype(np.float32)).report
    assert all(site.integer for site in report.sites if site.activations != "float")
    return [d.site for d in report.decisions if d.method == "float"]


def test_a_product_of_few_channels_is_float_and_one_of_many_is_not(rng: np.random.Generator):
    text = HEADS + "[mix] i = MatMul(h, a) [up] j = MatMul(i, b) [wide] y = MatMul(j, c)"

    assert floats(text, {"a": (4, 4), "b": (4, 256), "c": (256, 256)}, rng) == ["mix", "up"]


def test_products_that_share_a_quantizer_pay_less_for_it(rng: np.random.Generator):
    alone = HEADS + "[one] y = MatMul(h, a)"
    several = HEADS + "[one] i = MatMul(h, a) [two] j = MatMul(h, b) [three] k = MatMul(h, c) z = Add(i, j) y = Add(z, k)"
    shapes = dict.fromkeys("abc", (96, 34))

    assert floats(alone, {"a": shapes["a"]}, rng, 96) == ["one"]
    assert floats(several, shapes, rng, 96) == []


def test_a_product_that_reads_codes_is_left_alone(rng: np.random.Generator):
    """What a Conv stores would have to become values."""
    text = """[conv] h0 = Conv<group = 1>(x, v) h1 = Relu(h0) h = Transpose<perm = [0, 2, 1]>(h1) [mix] i = MatMul(h, a)
        y = Tanh(i)"""

    assert "mix" not in floats(text, {"v": (16, 4, 1), "a": (16, 16)}, rng)


def test_a_float_product_is_one_kernel_with_its_bias(rng: np.random.Generator):
    weights = {key: rng.normal(size=shape).astype(np.float32) for key, shape in {"a": (4, 4), "b": (4,), "c": (4, 256)}.items()}
    text = HEADS + "[mix] i0 = MatMul(h, a) i = Add(i0, b) [up] y = MatMul(i, c)"
    model = parse(f"g (float[1,4,{ROWS}] x) => (float[1,{ROWS},256] y) {{ {text} }}", weights, opset=21)
    data = rng.normal(size=(8, 4, ROWS)).astype(np.float32)

    found = quantize(model, data)

    assert [d.site for d in found.report.decisions if d.method == "float"] == ["mix", "up"]
    operators = {op for op, _ in profile(found.model, {"x": data[:1]})}
    assert operators & {"Add", "Gemm", "MatMul", "MatMulIntegerToFloat", "Sum"} == {"Gemm"}  # both have a bias then
