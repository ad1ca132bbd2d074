"""Where quantizers are planned: what is stored as integers, what shares a scale, and what only a site's input needs."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import tiny
from equality import parse
from onnx import ModelProto

from onnxcomp.graph.prepare import prepare
from onnxcomp.graph.sites import find_sites
from onnxcomp.numerics.affine import Scheme
from onnxcomp.pipeline import quantize
from onnxcomp.runtime import infer_types
from onnxcomp.targets import find
from onnxcomp.targets.base import Encoding, Plan, Point, Settings

TARGET = find("ort-x86")

W8A8 = Settings(8, 8, "static", "mse", 99.99, False)
W4A4 = Settings(4, 4, "static", "minmax", 99.0, False)
NO_BOUND = math.inf

STORAGE = Encoding().storage([W8A8])


def plan(model: ModelProto, settings: Settings = W8A8, without: str = "", target: str = "ort-x86", **rules: Settings) -> Plan:
    """The plan around every layer but `without`, with `settings` but for the sites named in `rules`."""
    graph = prepare(model, infer_types).graph
    sites = tuple(s for s in find_sites(graph) if s.kind == "layer" and s.name != without)
    return find(target).plan(graph, sites, {s.name: rules.get(s.name, settings) for s in sites})


def convs(text: str, opset: int = 21) -> ModelProto:
    """A graph on x [N, 4, 6, 6] whose Convs all have the weight w [4, 4, 1, 1]."""
    constants = {
        "w": np.ones((4, 4, 1, 1), np.float32),
        "zero": np.float32(0),
        "six": np.float32(6),
        "flat": np.array([0, -1]),
        "zero2": np.array([0, 0]),
        "six2": np.array([6, 6]),
        "flat8": np.zeros(8, np.int64),
        "half": np.ones((4, 1, 1), np.float32) / 2,
        "plane": np.ones((6, 6), np.float32) / 2,
        "wide": np.ones((144, 3), np.float32),
    }
    used = {key: value for key, value in constants.items() if f"{key})" in text or f" {key}," in text}
    return parse(f"g (float[N,4,6,6] x) => (float y) {{ {text} }}", used, opset=opset)


def stored(found: Plan) -> dict[str, str | None]:
    """The tensors stored for everyone, with whom they share their scale."""
    return {p.tensor: p.same_as for p in found.points if p.consumers is None}


def inputs(found: Plan) -> dict[str, tuple[str, ...]]:
    """The tensors quantized for some readers only."""
    return {p.tensor: p.consumers for p in found.points if p.consumers is not None}


# --- what is stored --------------------------------------------------------------------------------------------------


def test_a_residual_block_is_stored_as_integers_from_end_to_end():
    found = plan(tiny.residual().model)

    assert stored(found) == {"rs": None, "r1": None, "c2": None, "rj": None, "p": None}
    assert inputs(found) == {"x": ("stem",)}
    assert [(s.name, s.kind) for s in found.sites] == [
        ("stem", "layer"), ("conv1", "layer"), ("conv2", "layer"), ("join", "join"), ("p", "join"),
    ]  # fmt: skip


def test_a_relu_behind_a_conv_is_stored_in_its_place():
    assert stored(plan(convs("[a] h = Conv(x, w) r = Relu(h) [b] g = Conv(r, w) y = Tanh(g)"))) == {"r": None, "g": None}


def test_a_conv_whose_output_others_read_too_is_stored_before_its_relu():
    text = "[a] h = Conv(x, w) r = Relu(h) [b] g = Conv(r, w) t = Tanh(h) y = Add(g, t)"

    assert stored(plan(convs(text))) == {"h": None, "g": None}


def test_the_output_of_a_clip_must_not_be_exceeded():
    text = "[a] h = Conv(x, w) r = Clip(h, zero, six) [b] g = Conv(r, w) y = Tanh(g)"

    found = {p.tensor: p.highest for p in plan(convs(text)).points}

    assert found == {"r": 6.0, "g": NO_BOUND, "x": NO_BOUND}


def test_a_clip_that_does_not_begin_at_zero_is_not_stored_in_the_convs_place():
    text = "[a] h = Conv(x, w) r = Clip(h, six) [b] g = Conv(r, w) y = Tanh(g)"

    found = plan(convs(text))

    assert stored(found) == {"h": None, "g": None}
    assert inputs(found) == {"r": ("b",), "x": ("a",)}


def test_a_max_pool_shares_the_scale_of_what_it_pools():
    text = "[a] h = Conv(x, w) p = MaxPool<kernel_shape = [2, 2]>(h) [b] g = Conv(p, w) y = Tanh(g)"

    assert stored(plan(convs(text))) == {"h": None, "p": "h", "g": None}


def test_moves_of_values_share_the_scale_of_the_first_of_them():
    text = """[a] h = Conv(x, w) p = MaxPool<kernel_shape = [2, 2]>(h) t = Transpose<perm = [0, 1, 3, 2]>(p)
        [b] g = Conv(t, w) y = Tanh(g)"""

    assert stored(plan(convs(text))) == {"h": None, "p": "h", "t": "p", "g": None}


def test_a_move_that_no_integer_kernel_reads_stays_float():
    text = "[a] h = Conv(x, w) p = MaxPool<kernel_shape = [2, 2]>(h) y = Tanh(p)"

    assert stored(plan(convs(text))) == {"h": None}


@pytest.mark.parametrize("op", ["Add(h, g)", "Mul(h, g)", "Concat<axis = 1>(h, g)"])
def test_what_joins_stored_tensors_is_stored_and_a_site(op: str):
    text = f"[a] h = Conv(x, w) [b] g = Conv(x, w) [j] k = {op} y = Tanh(k)"

    found = plan(convs(text))

    assert stored(found) == {"h": None, "g": None, "k": None}
    assert [(s.name, s.kind, s.inputs) for s in found.sites][2:] == [("j", "join", ("h", "g"))]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[a] h = Conv(x, w) [j] k = Add(h, x) y = Tanh(k)", "one operand is float"),
        (
            "[a] h = Conv(x, w) [j] k = Mul(h, plane) y = Tanh(k)",
            "its constant operand would serve no integer reader",
        ),
        ("[a] h = Conv(x, w) [b] g = Conv(x, w) [j] y = Add(h, g)", "it is an output"),
        ("[a] h = Conv(x, w) [b] g = Conv(x, w) [j] k = Add(h, g) y = Relu(k)", "its ReLU is an output"),
        ("[a] h = Conv(x, w) [b] g = Conv(x, w) [j] k = Max(h, g) y = Tanh(k)", "Max has no integer kernel"),
    ],
)
def test_a_join_stays_float_where(text: str, why: str):
    found = plan(convs(text))

    assert [s.name for s in found.sites if s.kind == "join"] == [], why
    assert "k" not in stored(found)


def test_nothing_behind_a_conv_of_float_or_measured_activations_is_stored():
    for activations in ("float", "dynamic"):
        settings = Settings(8, 8, activations, "mse", 99.99, False)
        text = "[a] h = Conv(x, w) [b] g = Conv(h, w) y = Tanh(g)"

        assert stored(plan(convs(text), a=settings)) == {"g": None}


def test_nothing_is_stored_behind_a_matmul():
    found = plan(tiny.mlp().model)

    assert stored(found) == {}
    assert inputs(found) == {"x": ("fc1",), "g": ("fc2",)}


def test_a_conv_that_stays_float_ends_the_region():
    text = "[a] h = Conv(x, w) [b] g = Conv(h, w) [c] k = Conv(g, w) y = Tanh(k)"

    found = plan(convs(text), without="b")

    assert stored(found) == {"h": None, "k": None}
    assert inputs(found) == {"x": ("a",), "g": ("c",)}


# --- with which scheme -----------------------------------------------------------------------------------------------


def point(found: Plan, tensor: str) -> list[Point]:
    return [p for p in found.points if p.tensor == tensor]


def test_a_stored_tensor_has_its_readers_own_scheme():
    (found,) = point(plan(convs("[a] h = Conv(x, w) [b] g = Conv(h, w) y = Tanh(g)"), W4A4), "h")

    assert found == Point("h", Scheme(4), "static", "minmax", 99.0)


def test_a_stored_tensor_that_no_layer_reads_has_eight_bits():
    (found,) = point(plan(convs("[a] h = Conv(x, w) y = Tanh(h)"), W4A4), "h")

    assert found == Point("h", STORAGE, "static", "mse", 99.99)


def test_readers_that_disagree_quantize_a_stored_tensor_again_for_themselves():
    text = "[a] h = Conv(x, w) [b] g = Conv(h, w) [c] k = Conv(h, w) [j] s = Add(g, k) y = Tanh(s)"

    found = point(plan(convs(text), W8A8, b=W4A4), "h")

    assert found == [
        Point("h", STORAGE, "static", "minmax", 99.0),
        Point("h", Scheme(4), "static", "minmax", 99.0, ("b",)),
    ]


def test_a_residual_read_beside_a_narrow_layer_keeps_eight_bits():
    text = "[a] h = Conv(x, w) [b] g = Conv(h, w) [j] k = Add(g, h) y = Tanh(k)"

    found = point(plan(convs(text), W4A4), "h")

    assert [(p.scheme, p.consumers) for p in found] == [(STORAGE, None), (Scheme(4), ("b",))]


def test_a_layer_of_symmetric_activations_gets_its_zero_in_the_middle():
    settings = Settings(8, 8, "static", "mse", 99.99, True)

    (found,) = point(plan(tiny.linear().model, settings), "x")

    assert found.scheme == Scheme(8, signed=False, symmetric=True)


def test_layers_that_read_a_tensor_in_the_same_way_share_its_quantizer():
    found = point(plan(tiny.transformer().model, W8A8, k=Settings(4, 8, "static", "mse", 99.99, False)), "n1")

    assert [p.consumers for p in found] == [("q", "k", "v")]  # the width of their weights does not matter


def test_layers_that_read_a_tensor_in_different_ways_have_a_quantizer_each():
    found = point(plan(tiny.transformer().model, W8A8, k=W4A4), "n1")

    assert [(p.scheme.bits, p.consumers) for p in found] == [(8, ("q", "v")), (4, ("k",))]


def test_a_layer_of_float_activations_has_no_quantizer():
    found = plan(tiny.mlp().model, W8A8, fc2=Settings(4, 8, "float", "mse", 99.99, False))

    assert inputs(found) == {"x": ("fc1",)}


def test_a_layer_measured_at_run_time_has_a_quantizer_of_its_own_on_a_stored_tensor():
    token = Settings(8, 8, "token", "mse", 99.99, False)
    text = "[a] h = Conv(x, w) f = Flatten(h) [fc] m = MatMul(f, wide) y = Tanh(m)"

    found = point(plan(convs(text), W8A8, fc=token), "f")

    assert [(p.granularity, p.consumers) for p in found if p.consumers] == [("token", ("fc",))]


# --- where the walk stops --------------------------------------------------------------------------------------------


def test_the_walk_stops_at_every_site_and_at_the_first_reader_of_every_stored_tensor():
    found = plan(convs("[a] h = Conv(x, w) [t] u = Tanh(h) [b] g = Conv(u, w) [r] y = Tanh(g)"))

    assert {name: site and site.name for name, site in found.heads.items()} == {"a": "a", "t": None, "b": "b", "r": None}


def test_points_are_in_the_order_in_which_they_are_fitted():
    """Storage before inputs, and a tensor before those that share its scale."""
    found = plan(convs("[a] h = Conv(x, w) p = MaxPool<kernel_shape = [2, 2]>(h) [b] g = Conv(p, w) y = Tanh(g)"))

    assert [p.tensor for p in found.points] == ["h", "p", "g", "x"]


def test_a_constant_that_is_added_or_multiplied_is_stored_in_8_bits(rng: np.random.Generator):
    text = """g (float[N,3,8,8] x) => (float[N,4,6,6] y) {
        [one] c = Conv(x, w1) [shift] a = Add(c, o) [scale] s = Mul(a, k) r = Relu(s) [two] d = Conv(r, w2) y = Tanh(d)
    }"""
    shapes = {"w1": (4, 3, 3, 3), "k": (4, 1, 1), "o": (1, 4, 6, 6), "w2": (4, 4, 1, 1)}
    model = parse(text, {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()})

    result = quantize(model, rng.normal(size=(8, 3, 8, 8)).astype(np.float32))

    kernels = {site.name: site.kernel for site in result.report.sites}
    assert kernels == {"one": "QLinearConv", "shift": "QLinearAdd", "scale": "QLinearMul", "two": "QLinearConv"}


# --- hard activations ------------------------------------------------------------------------------------------------


def test_a_hard_swish_between_convs_is_stored_and_its_scale_divides_three():
    found = plan(convs("[a] c = Conv(x, w) h = HardSwish(c) [b] y = Conv(h, w)"))

    assert stored(found) == {"c": None, "h": None, "y": None}
    assert [(s.op, s.kind) for s in found.sites] == [("Conv", "layer"), ("HardSwish", "join"), ("Conv", "layer")]
    assert {p.tensor: p.divides for p in found.points if p.consumers is None} == {"c": 3.0, "h": None, "y": None}


def test_a_hard_swish_that_a_constant_is_added_to_stays_float():
    text = "[a] c = Conv(x, w) h = HardSwish(c) k = Add(h, half) [b] y = Conv<pads = [1, 1, 1, 1]>(k, w)"

    found = plan(convs(text))

    assert stored(found) == {"c": None, "y": None}
    assert inputs(found) == {"x": ("a",), "k": ("b",)}


def test_the_gate_of_squeeze_and_excitation_is_stored_and_is_no_site():
    text = (
        """[a] c = Conv(x, w) p = GlobalAveragePool(c) [b] s = Conv(p, w) g = HardSigmoid(s) m = Mul(c, g) [d] y = Conv(m, w)"""
    )

    found = plan(convs(text))

    assert stored(found) == dict.fromkeys(("c", "p", "s", "g", "m", "y"))
    assert [s.op for s in found.sites] == ["Conv", "GlobalAveragePool", "Conv", "Mul", "Conv"]


def test_what_is_stored_may_be_read_inside_a_body_alone(rng: np.random.Generator):
    """The walk stops in front of the node that has the body."""
    text = """g (float[N,4] x, bool b) => (float[N,3] y) {
        r = Reshape(x, image) [conv] c = Conv(r, w) [fc] h = MatMul(x, v)
        [if] y = If (b) <
            then_branch = one () => (float[N,3] p) { i = Reshape(c, flat) s = Slice(i, zero, three, last) p = Add(h, s) },
            else_branch = two () => (float[N,3] q) { q = Identity(h) }
        > }"""
    numbers = {"image": [-1, 4, 1, 1], "flat": [0, -1], "zero": [0], "three": [3], "last": [1]}
    weights = {key: np.array(value) for key, value in numbers.items()}
    weights |= {"w": rng.normal(size=(4, 4, 1, 1)).astype(np.float32), "v": rng.normal(size=(4, 3)).astype(np.float32)}
    model = parse(text, weights, opset=21)
    feeds = [{"x": rng.normal(size=(2, 4)).astype(np.float32), "b": np.array(True)} for _ in range(8)]

    assert "if" in plan(model).heads
    assert quantize(model, feeds).report.verification.sqnr_db > 25


@pytest.mark.parametrize(
    ("skip", "found"),
    [
        ("i = Slice(r, zero2, six2) s = Pad(i, flat8)", {"r": None, "s": "r"}),
        ("i = Slice(r, zero2, six2) s = Tanh(i)", {}),  # no mere move
        ("i = Slice(r, zero2, six2) s = Pad(i, flat8) t = Tanh(r)", {}),  # r is read in float as well
        ("i = Slice(r, zero2, six2) s = Pad(i, flat8) t = Tanh(s)", {}),
        ("i = Slice(r, zero2, six2) s = Pad(i, flat8) j = Slice(r, zero2, six2) t = Tanh(j)", {}),
        ("s = Relu(r)", {}),
    ],
)
def test_what_skips_a_conv_by_moves_shares_the_codes_that_layers_read(skip: str, found: dict[str, str | None]):
    layers = "[a] h = Conv(x, w) r = Relu(h) [b] g = Conv(r, w) k = Relu(g) [c] m = Conv(k, w)"
    body = f"{layers} {skip} [join] u = Add(s, m) y = Mul(u, {'t' if 't = ' in skip else 'u'})"
    made = plan(convs(body), target="tensorrt")

    assert stored(made) == found
    assert inputs(made) == {"x": ("a",), "k": ("c",)} | ({} if found else {"r": ("b",), "s": ("join",)})


def test_what_float_layers_alone_read_is_not_stored():
    """They are to lose nothing by it; where an integer kernel reads it too, the codes are there anyway."""
    text = "[a] h = Conv(x, w) [b] g = Conv(x, w) [j] k = Add(h, g) [c] m = Conv(k, w) y = Tanh(m)"
    both = text.replace("y = Tanh(m)", "[d] n = Conv(k, w) o = Add(m, n) y = Tanh(o)")
    in_float = replace(W8A8, activations="float")

    found = plan(convs(text), c=in_float)

    assert (stored(found), [site.kind for site in found.sites]) == ({"h": None, "g": None}, ["layer"] * 3)
    assert stored(plan(convs(both), c=in_float)) == {"h": None, "g": None, "k": None, "n": None}
