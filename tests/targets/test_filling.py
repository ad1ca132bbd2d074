"""Channels that are filled up, and what stands in the way."""

from __future__ import annotations

import numpy as np
import pytest
from equality import parse
from onnx import ModelProto, numpy_helper

from onnxcomp.graph.edit import tensors_of
from onnxcomp.graph.prepare import prepare
from onnxcomp.pipeline import quantize
from onnxcomp.recipe import Recipe
from onnxcomp.runtime import Session, infer_types
from onnxcomp.targets.filling import fill_channels, is_depthwise

IN = "g (float[N,8,12,12] x) => (float[N,8,12,12] y) {"
EXPAND = f"{IN} [expand] a = Conv(x, w, b)"
PROJECT = "[project] p = Conv(z, v) y = Tanh(p) }"
DEPTHWISE = "[dw] d = Conv<group = 20, pads = [1,1,1,1]>(r, u, c)"
GATE = """[pool] q = GlobalAveragePool(d) [reduce] s = Conv(q, down) t = Relu(s) [raise] e = Conv(t, up)
    h = HardSigmoid(e) z = Mul(d, h)"""


def block(middle: str, outputs: str = PROJECT) -> ModelProto:
    rng = np.random.default_rng(0)
    shapes = {"w": (20, 8, 1, 1), "b": (20,), "u": (20, 1, 3, 3), "c": (20,), "v": (8, 20, 1, 1), "down": (5, 20, 1, 1)}
    shapes |= {"up": (20, 5, 1, 1), "each": (20, 1, 1), "one": (1,), "wide": (20, 20, 1, 1), "bend": (1, 1, 12)}
    weights = {
        key: (rng.normal(size=shape) / np.sqrt(max(np.prod(shape[1:]), 1))).astype(np.float32) for key, shape in shapes.items()
    }
    text = f"{EXPAND} {middle} {outputs}"
    return parse(text, {key: array for key, array in weights.items() if f" {key})" in text or f" {key}," in text}, opset=21)


def sizes(model: ModelProto) -> dict[str, list[int]]:
    """The shapes of the stored weights, by the letter that stands for them."""
    return {t.name.partition("/")[0]: list(t.dims) for t in model.graph.initializer if t.name.endswith(".codes")}


def done(model: ModelProto, rng: np.random.Generator, target: str = "ort-x86", bits: str = "w8a8") -> ModelProto:
    data = rng.normal(size=(16, 8, 12, 12)).astype(np.float32)
    return quantize(model, data, Recipe(bits=bits, target=target, sensitive="asked")).model  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("bits", ["w8a8", "w4a4", "w3a8"])
def test_a_depthwise_conv_gets_a_multiple_of_sixteen_channels_and_computes_the_same(rng: np.random.Generator, bits: str):
    model, x = block(f"r = Relu(a) {DEPTHWISE} {GATE}"), {"x": rng.normal(size=(3, 8, 12, 12)).astype(np.float32)}

    filled, plain = done(model, np.random.default_rng(1), bits=bits), done(model, np.random.default_rng(1), "ort-arm", bits)

    changed = {"w": [32, 8, 1, 1], "u": [32, 1, 3, 3], "v": [8, 32, 1, 1], "down": [5, 32, 1, 1], "up": [32, 5, 1, 1]}
    assert {key: shape[:2] for key, shape in sizes(filled).items()} == {key: shape[:2] for key, shape in changed.items()}
    assert next(a.i for n in filled.graph.node if n.name == "dw" for a in n.attribute if a.name == "group") == 32
    want, found = (Session(file).run(x)["y"] for file in (plain, filled))
    np.testing.assert_allclose(found, want, atol=0.05)  # ort-arm's codes are signed


@pytest.mark.parametrize(
    ("middle", "fills"),
    [
        (f"r = Relu(a) {DEPTHWISE} z = Relu(d)", True),
        (f"r = HardSwish(a) {DEPTHWISE} z = Add(d, r)", True),
        (f"r = Mul(a, each) {DEPTHWISE} z = Add(d, one)", True),
        (f"r = MaxPool<kernel_shape = [1,1]>(a) {DEPTHWISE} z = Sigmoid(d)", True),
        (f"r = Relu(a) {DEPTHWISE} z = Softmax<axis = 1>(d)", False),
        (f"r = Div(a, d0) d0 = Exp(a) {DEPTHWISE} z = Relu(d)", False),
        (f"r = Relu(a) {DEPTHWISE} z = Mul(d, bend)", False),
        (f"r = Relu(a) {DEPTHWISE} [two] z = Conv<group = 2>(d, wide2)", False),
    ],
)
def test_what_may_stand_around_a_depthwise_conv(middle: str, fills: bool):
    if "d0" in middle:
        middle = middle.replace("r = Div(a, d0) d0 = Exp(a)", "d0 = Exp(a) r = Div(a, d0)")
    if "wide2" in middle:
        middle = middle.replace("wide2", "wide").replace("<group = 2>", "<group = 2, strides = [1,1]>")
    model = block(middle)
    if "group = 2," in middle:
        (wide,) = (t for t in model.graph.initializer if t.name == "wide")
        wide.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(wide)[:, :10].copy(), "wide"))
    p = prepare(model, infer_types)
    graph = p.graph.copy()
    conv = next(node for node in graph.nodes if node.name == "dw")
    conv.inputs[0].inputs[0].attrs["granularity"] = "static"  # stands for a quantizer in front

    fill_channels(graph, 16)

    shapes = {name: list(tensors_of(graph)[name].values.shape) for name in "wuvbc"}
    assert shapes["u"] == ([32, 1, 3, 3] if fills else [20, 1, 3, 3])
    assert (shapes["w"][0], shapes["b"], shapes["c"]) == ((32, [32], [32]) if fills else (20, [20], [20]))
    assert is_depthwise(conv)


def test_an_output_of_the_model_and_what_is_a_multiple_already_stay(rng: np.random.Generator):
    shown = block(f"r = Relu(a) {DEPTHWISE} z = Relu(d)", "[project] p = Conv(z, v) y = Tanh(p) }").SerializeToString()
    model = ModelProto.FromString(shown)
    model.graph.output.append(model.graph.output[0])
    model.graph.output[1].name = "d"
    model.graph.output[1].type.tensor_type.shape.dim[1].dim_value = 20

    assert sizes(done(model, rng))["u"] == [20, 1, 3, 3]
    assert sizes(done(block(f"r = Relu(a) {DEPTHWISE} z = Relu(d)"), rng, "portable"))["u"] == [20, 1, 3, 3]
