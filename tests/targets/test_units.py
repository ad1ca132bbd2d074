"""Where every operator reads and makes codes (qnn): what its constants become, and what need not be codes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from equality import parse, stored

from onnxcomp.lint import lint
from onnxcomp.methods import sensitivity
from onnxcomp.methods.base import Outcome
from onnxcomp.methods.sensitivity import Stored
from onnxcomp.pipeline import Result, quantize
from onnxcomp.recipe import Recipe

RNG = np.random.default_rng(0)
SHAPE = (8, 4, 6, 6)
SAMPLES = RNG.normal(size=SHAPE).astype(np.float32)


def made(text: str, output: Path, **weights: np.ndarray) -> Result:
    """The model of x [N, 4, 6, 6], a Conv by w and what the text adds, quantized for qnn."""
    w = {"w": RNG.normal(size=(4, 4, 1, 1)).astype(np.float32) / 2, **weights}
    model = parse(f"g (float[N,4,6,6] x) => (float y) {{ [first] h = Conv(x, w) {text} }}", w, opset=21)
    onnx.save(model, output.with_name("f.onnx"))
    return quantize(model, SAMPLES, Recipe(target="qnn"), output=output)


def kinds(model: onnx.ModelProto, op: str) -> list[str]:
    """The types of the constant codes that an operator reads, in order."""
    makers, values = {n.output[0]: n for n in model.graph.node}, stored(model)
    (node,) = (n for n in model.graph.node if n.op_type == op)
    read = [makers[name].input[0] for name in node.input if name in makers and makers[name].op_type == "DequantizeLinear"]
    return [str(values[name].dtype) for name in read if name in values]


@pytest.mark.parametrize(
    ("text", "op", "expected"),
    [
        ("y = InstanceNormalization(h, g, b)", "InstanceNormalization", ["uint8", "int32"]),
        ("y = ConvTranspose(h, t, b)", "ConvTranspose", ["uint8", "int32"]),
        ("y = ConvTranspose(h, t)", "ConvTranspose", ["uint8"]),
        ("y = Pow(h, two)", "Pow", ["uint8"]),
        ("y = Max(h, two)", "Max", ["uint8"]),
    ],
)
def test_constants_are_codes_and_biases_of_kernels_have_32_bits(tmp_path: Path, text: str, op: str, expected: list[str]):
    weights = {
        "g": RNG.uniform(0.5, 1.5, 4).astype(np.float32),
        "b": RNG.normal(size=4).astype(np.float32),
        "t": RNG.normal(size=(4, 4, 2, 2)).astype(np.float32) / 4,
        "two": np.float32(2),
    }

    result = made(text, tmp_path / "q.onnx", **{key: value for key, value in weights.items() if f" {key}" in text})

    assert kinds(result.model, op) == expected
    assert result.report.verification.sqnr_db > 28
    assert lint(tmp_path / "q.onnx", "qnn").violations == ()


def test_what_is_made_of_shapes_is_computed_once_and_may_be_infinite(tmp_path: Path):
    constants = {"end": np.array(-1), "zero": np.array(0), "one": np.array(1), "none": np.array(0, np.float32)}
    shapes = "s = Shape(x) n = Gather(s, end) r = Range(zero, n, one) f = Cast<to = 1>(r) l = Log(f) m = Max(l, none)"

    result = made(f"{shapes} y = Add(h, m)", tmp_path / "q.onnx", **constants)

    quantized = {node.input[0] for node in result.model.graph.node if node.op_type == "QuantizeLinear"}
    makers = {output: node.op_type for node in result.model.graph.node for output in node.output}
    assert {makers.get(name, name) for name in quantized} == {"x", "Conv", "Max", "Add"}
    assert result.report.verification.sqnr_db > 28
    assert lint(tmp_path / "q.onnx", "qnn").violations == ()


def test_moves_of_a_wide_tensor_are_wide_where_a_layer_reads_8_bits_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sensitivity, "store", lambda *_: {"h": Stored((), Outcome({}, "for the test"))})
    text = "[second] g = Conv(h, v) p = Transpose<perm = [0, 1, 3, 2]>(h) y = Add(g, p)"

    result = made(text, tmp_path / "q.onnx", v=RNG.normal(size=(4, 4, 1, 1)).astype(np.float32) / 2)

    values = stored(result.model)
    codes = {n.input[0]: values[n.input[2]].dtype for n in result.model.graph.node if n.op_type == "QuantizeLinear"}
    assert sorted(map(str, codes.values())) == ["uint16"] * 5 + ["uint8"] * 3
    assert [site.bits for site in result.report.sites] == ["w8a16", "w8a8", "a16"]
    assert result.report.verification.expected_db == 200


def test_what_nobody_reads_is_not_stored(tmp_path: Path):
    text = "v, i = TopK<axis = 1>(h, two) f = Cast<to = 1>(i) y = Mul(f, f)"

    result = made(text, tmp_path / "q.onnx", two=np.array([2]))

    read = {name for node in result.model.graph.node for name in node.input}
    assert "v" not in read
    assert not {name for name in read if name.startswith("v/")}


def test_a_product_of_two_activations_is_a_unit_and_not_said_to_be_float(tmp_path: Path):
    result = made("g = Transpose<perm = [0, 1, 3, 2]>(h) y = MatMul(h, g)", tmp_path / "q.onnx")

    assert result.report.skipped == ()
    assert lint(tmp_path / "q.onnx", "qnn").violations == ()
    plain = quantize(onnx.load(tmp_path / "f.onnx"), SAMPLES, Recipe(target="ort-x86"))
    assert [skipped.op for skipped in plain.report.skipped] == ["MatMul"]
