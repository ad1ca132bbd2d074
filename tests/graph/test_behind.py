"""What is found behind a tensor: functions of single values, and nothing where anything else reads it."""

from __future__ import annotations

import numpy as np
import pytest
from equality import parse

from onnxcomp.graph.behind import function_behind
from onnxcomp.graph.convert import to_model
from onnxcomp.graph.prepare import prepare
from onnxcomp.runtime import Session, infer_types

W = np.random.default_rng(0).normal(size=(4, 4, 1, 1)).astype(np.float32)
CONSTANTS = {"w": W, "one": np.float32(1), "many": np.ones((4, 1, 1), np.float32)}


def behind(body: str, outputs: str = "float[N,4,3,3] y") -> np.ndarray | None:
    """What the function behind `c` makes of -2, -1, 0, 1 and 2."""
    text = f"g (float[N,4,3,3] x) => ({outputs}) {{ [conv] c = Conv(x, w) {body} }}"
    used = {name: values for name, values in CONSTANTS.items() if f"{name})" in text or f"{name}," in text}
    prepared = prepare(parse(text, used, opset=21), infer_types)
    part = function_behind(prepared.graph, "c")
    if part is None:
        return None
    assert [t.name for t in part.inputs] == ["c"]
    (found,) = Session(to_model(part, prepared.model)).run({"c": np.arange(-2, 3, dtype=np.float32)}).values()
    return found


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("h = Relu(c) y = Conv(h, w)", [0, 0, 0, 1, 2]),
        ("s = Sigmoid(c) h = Mul(c, s) y = Conv(h, w)", [x / (1 + np.exp(-x)) for x in range(-2, 3)]),
        ("h = Abs(c) k = Add(h, one) y = Add(k, x)", [3, 2, 1, 2, 3]),
        ("h = Neg(c) y = Mul(h, many)", [2, 1, 0, -1, -2]),
    ],
)
def test_arithmetic_on_single_values_is_followed_to_where_it_ends(body: str, expected: list[float]):
    found = behind(body)

    assert found is not None
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        ("y = Conv(c, w)", "float[N,4,3,3] y"),
        ("h = Relu(c) k = Conv(c, w) y = Add(h, k)", "float[N,4,3,3] y"),
        ("h = Relu(c) y = Conv(h, w)", "float[N,4,3,3] y, float[N,4,3,3] c"),
        ("h = Relu(c) k = Abs(c) a = Conv(h, w) b = Conv(k, w) y = Add(a, b)", "float[N,4,3,3] y"),
    ],
)
def test_what_is_read_itself_or_in_two_ways_has_no_function(body: str, outputs: str):
    assert behind(body, outputs) is None
