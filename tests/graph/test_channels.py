"""Groups of channels: what belongs together, what is refused, and that changing one changes nothing that the model gives."""

from __future__ import annotations

import numpy as np
import pytest
from equality import parse

from onnxcomp.graph.channels import Group, find_groups, transform
from onnxcomp.graph.convert import to_model
from onnxcomp.graph.edit import Graph
from onnxcomp.graph.prepare import Prepared, prepare
from onnxcomp.numerics.arrays import energies, sqnr_db
from onnxcomp.runtime import Session, infer_types

RNG = np.random.default_rng(0)
EXACT_DB = 100.0
"""What float32 sums of some ten terms leave, about 2^-20 of the signal, is 120 dB."""
IMAGE = RNG.normal(size=(2, 3, 6, 6)).astype(np.float32)
WEIGHTS = {
    "w": RNG.normal(size=(4, 3, 3, 3)), "b": RNG.normal(size=4), "d": RNG.normal(size=(4, 1, 3, 3)),
    "p": RNG.normal(size=(4, 4, 1, 1)), "q": RNG.normal(size=(5, 4, 1, 1)), "g": RNG.normal(size=(4, 5)),
    "lo": np.float32(0), "hi": np.float32(6), "axes": np.array([2, 3]),
}  # fmt: skip


def prepared(body: str, y: str = "float[N,5,H,W] y") -> Prepared:
    used = {
        k: np.asarray(v, np.int64 if k == "axes" else np.float32)
        for k, v in WEIGHTS.items()
        if k in body.replace(",", " ").replace(")", " ").split()
    }
    return prepare(parse(f"g (float[N,3,6,6] x) => ({y}) {{ {body} }}", used), infer_types)


FIRST = "a = Conv<pads = [1, 1, 1, 1]>(x, w, b)"
BODIES = {
    "relu": f"{FIRST} r = Relu(a) y = Conv(r, q)",
    "clip": f"{FIRST} r = Clip(a, lo, hi) y = Conv(r, q)",
    "depthwise": f"{FIRST} r = LeakyRelu(a) y = Conv<group = 4>(r, d)",
    "pool": f"{FIRST} r = MaxPool<kernel_shape = [2, 2]>(a) y = Conv(r, q)",
    "residual": f"{FIRST} r = Relu(a) c = Conv(r, p) s = Add(r, c) t = Relu(s) y = Conv(t, q)",
    "linear": f"{FIRST} c = Conv(a, p) s = Add(a, c) y = Conv(s, q)",
    "flat": f"{FIRST} r = Relu(a) m = GlobalMaxPool(r) f = Flatten(m) y = Gemm(f, g)",
}


def outputs(graph: Graph, like: Prepared) -> np.ndarray:
    return Session(to_model(graph, like.model).SerializeToString()).run({"x": IMAGE})["y"]


def rank(name: str) -> str:
    return "float[N,5] y" if name == "flat" else "float[N,C,H,W] y"


@pytest.mark.parametrize("name", BODIES)
def test_scaled_channels_change_nothing(name: str):
    p = prepared(BODIES[name], rank(name))
    changed = p.graph.copy()
    (group,) = find_groups(changed)

    transform(changed, group, np.array([0.01, 0.5, 1.0, 30.0]), None, {})

    want, found = outputs(p.graph, p), outputs(changed, p)
    assert sqnr_db(*energies(want, found)) > EXACT_DB


def test_channels_of_a_linear_group_may_be_shifted_and_mixed():
    p = prepared(BODIES["linear"], rank("linear"))
    changed = p.graph.copy()
    (group,) = find_groups(changed)
    m, n = RNG.normal(size=4), RNG.normal(size=4)

    transform(changed, group, np.ones(4), RNG.normal(size=(4, 4)), {"a": m, "c": n, "s": m + n})

    assert group.linear
    assert group.shifted == {"a", "c", "s"}
    assert sqnr_db(*energies(outputs(p.graph, p), outputs(changed, p))) > EXACT_DB


def groups(name: str) -> list[Group]:
    return find_groups(prepared(BODIES[name], rank(name)).graph)


def test_what_is_added_up_is_one_group():
    (group,) = groups("residual")

    assert [node.outputs[0].name for node in group.writers] == ["a", "c"]
    assert sorted(node.outputs[0].name for node in group.readers) == ["c", "y"]
    assert not group.linear


def test_a_clip_gets_a_bound_per_channel():
    p = prepared(BODIES["clip"], rank("clip"))
    (group,) = find_groups(p.graph)

    transform(p.graph, group, np.array([1.0, 2.0, 3.0, 4.0]), None, {})

    assert [node.op for node in p.graph.nodes] == ["Conv", "Relu", "Min", "Conv"]
    bounds = p.graph.nodes[2].inputs[1].values
    np.testing.assert_array_equal(bounds, np.array([6, 12, 18, 24], np.float32).reshape(4, 1, 1))


@pytest.mark.parametrize(
    "body",
    [
        f"{FIRST} y = Conv(a, q) z = Relu(a)",  # an output of the model
        f"{FIRST} r = Sigmoid(a) y = Conv(r, q)",
        f"{FIRST} r = Clip(a, hi, hi) y = Conv(r, q)",
        f"{FIRST} s = Softmax(a) r = Add(a, s) y = Conv(r, q)",
        f"{FIRST} r = GlobalAveragePool(a) y = Conv(r, q)",  # what is averaged is quantized in front of that
        f"{FIRST} r = ReduceMean(a, axes) y = Conv(r, q)",
    ],
)
def test_anything_else_is_no_group(body: str):
    y = "float[N,5,H,W] y, float[N,4,H,W] z" if " z = " in body else "float[N,5,H,W] y"

    assert not find_groups(prepared(body, y).graph)
