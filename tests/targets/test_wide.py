"""Stored tensors of 16 bits among those of 8: what is wide with them, and where conversions stand."""

from __future__ import annotations

import numpy as np
from equality import parse

from onnxcomp.graph.prepare import prepare
from onnxcomp.graph.sites import find_sites
from onnxcomp.runtime import infer_types
from onnxcomp.targets import find
from onnxcomp.targets.base import Plan, Settings

W8A8 = Settings(8, 8, "static", "mse", 99.99, False)


def widened(text: str, **wide: str) -> Plan:
    """The plan for qnn, where all is stored, with these tensors in 16 bits, also for the layers that each letter names; Convs
    have the weight w [4, 4, 1, 1].
    """
    used = {"w": np.ones((4, 4, 1, 1), np.float32)} if "w)" in text else {}
    graph = prepare(parse(f"g (float[N,4,6,6] x) => (float y) {{ {text} }}", used, opset=21), infer_types).graph
    sites = find_sites(graph)
    return find("qnn").plan(graph, sites, {site.name: W8A8 for site in sites}, wide)


def widths(found: Plan) -> dict[str, list[tuple[int, tuple[str, ...] | None]]]:
    """The bits of every tensor's quantizers, and for whom they are."""
    return {t: [(p.scheme.bits, p.consumers) for p in found.points if p.tensor == t] for t in {p.tensor for p in found.points}}


def test_all_that_makers_and_readers_of_a_wide_tensor_touch_is_wide_and_converted_around_them():
    text = "[t] h = Tanh(x) [e] k = Exp(h) [n] l = Neg(k) [b] c = Conv(k, w) [s] m = Sin(c) [j] y = Max(l, m)"

    found = widened(text, k="b")

    assert widths(found) == {
        "x": [(8, None)],
        "h": [(8, None), (16, ("e",))],
        "k": [(16, None)],
        "l": [(16, None), (8, ("j",))],
        "c": [(16, None), (8, ("s",))],
        "m": [(8, None)],
        "y": [(8, None)],
    }
    assert {"e", "s", "j"} <= found.heads.keys()
    assert found.settings["b"].activation_bits == 16


def test_a_relu_ends_what_its_layer_begins_and_a_layer_behind_it_reads_8_bits():
    text = "[a] h = Conv(x, w) [r] g = Relu(h) [t] k = Tanh(g) [b] z = Conv(g, w) [j] s = Add(z, x) [m] y = Max(s, k)"

    found = widened(text, x="a")

    assert widths(found) == {
        "x": [(16, None)],
        "g": [(16, None), (8, ("b",)), (8, ("t",))],
        "k": [(8, None)],
        "z": [(8, None), (16, ("j",))],
        "s": [(16, None), (8, ("m",))],
        "y": [(8, None)],
    }
    assert {name: s.activation_bits for name, s in found.settings.items()} == {"a": 16, "b": 8}
    assert found.joined == {"j": 16}


def test_moves_have_the_bits_of_what_they_move():
    text = "[a] g = Conv(x, w) [t] h = Tanh(g) [p] k = Transpose<perm = [0, 2, 3, 1]>(h) [e] z = Exp(k) [n] y = Neg(z)"

    found = widened(text, h="")

    assert widths(found) == {
        "x": [(8, None)],
        "g": [(8, None), (16, ("t",))],
        "h": [(16, None)],
        "k": [(16, None)],
        "z": [(16, None), (8, ("n",))],
        "y": [(8, None)],
    }
    assert [p.same_as for p in found.points if p.tensor == "k"] == ["h"]


def test_a_shape_is_read_in_any_width():
    text = "[t] h = Tanh(x) [q] s = Shape(h) [a] g = Conv(h, w) [r] y = Reshape(g, s)"

    assert widths(widened(text, h="a"))["h"] == [(16, None)]


def test_a_layer_that_is_not_named_reads_8_bits_of_a_wide_tensor():
    text = "[t] h = Tanh(x) [a] g = Conv(h, w) [j] y = Add(g, h)"

    found = widened(text, h="")

    assert widths(found) == {
        "x": [(8, None), (16, ("t",))],
        "h": [(16, None), (8, ("a",))],
        "g": [(8, None), (16, ("j",))],
        "y": [(16, None)],
    }
    assert found.settings["a"].activation_bits == 8


def test_what_is_computed_from_the_shape_of_a_wide_tensor_is_not_wide():
    text = "[t] h = Tanh(x) [q] s = Shape(h) [i] n = Mul(s, s) [a] g = Conv(h, w) [e] y = Expand(g, n)"

    found = widths(widened(text, h="a"))

    assert found["g"] == [(16, None), (8, ("e",))]
    assert found["y"] == [(8, None)]
