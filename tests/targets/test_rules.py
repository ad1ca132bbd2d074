"""What the targets' rules say of a node, each broken by a tiny graph that keeps every other rule of its target."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import ModelProto, ValueInfoProto, numpy_helper

from onnxcomp import targets
from onnxcomp.errors import RecipeError
from onnxcomp.lint import lint
from onnxcomp.targets import rules
from onnxcomp.targets.base import Violation
from onnxcomp.toml import tomllib

AGAIN = "Quantize the float model again for this target."


@dataclass(frozen=True)
class Probe:
    """A graph in which the node `site` breaks one rule, and one that does not."""

    rule: str
    target: str
    broken: str
    reason: str
    remedy: str
    kept: str


def q(x: str, y: str, scale: str = "s", zero: str = "zs", name: str = "") -> str:
    at = f"[{name}]" if name else ""
    return f" {at} {y}_q = QuantizeLinear({x}, {scale}, {zero})  {y} = DequantizeLinear({y}_q, {scale}, {zero}) "


X, IMAGE = q("x", "a"), q("image", "a")
W = " w = DequantizeLinear<axis = 1>(W, ws, wz) "
K = " k = DequantizeLinear<axis = 0>(K, ks, kz) "
CONV = IMAGE + K + " h = Conv(a, k) "
PADDED = IMAGE + K + " h = Conv<pads = [1, 1, 1, 1]>(a, k) "
RANGE = " m = Abs(x)  mm = ReduceMax<keepdims = 0>(m)  rs = Mul(mm, r) "
OF_CAST, OF_BLOCKS = "DequantizeLinear<axis = 1>(W4, ws, wz4)", "DequantizeLinear<axis = 0, block_size = {}>(W4, {}, {})"
INT4_IN_CONV = "DequantizeLinear<axis = 0>(K4, ks, kz4)"
STAYS = "These int4 weights have no kernel beside quantized activations."
AS_INT8 = "Store their codes as int8."
HEADS, HALVES = " heads = Constant<value_ints = [8, 2, -1]>() ", "Split<axis = 1, num_outputs = 2>"
IS_CUT = "Its product is cut into heads, so its weight is cut at every run and the product computed in float."
IN_FLOAT = "Store the weight in float, behind a QuantizeLinear."

PROBES = (
    Probe("varying-axis", "qnn", q("open", "y"), "Its shape ['N', 8] has axes that vary, so nothing of it is compiled.",
          "Fix every axis.", q("x", "y")),
    Probe("foreign-operator", "portable", "[site] y = com.microsoft.Gelu(x)",
          "It is Gelu of the domain 'com.microsoft', which no other runtime has.", AGAIN, "[site] y = Gelu(x)"),
    Probe("integer-operator", "tensorrt", "[site] y, cs, cz = DynamicQuantizeLinear(x)",
          "DynamicQuantizeLinear is not taken; products of codes are written with QuantizeLinear and DequantizeLinear.", AGAIN,
          "[site] y = QuantizeLinear(x, s, zs)"),
    Probe("integer-operator", "portable", "[site] y = MatMulInteger(U, W)",
          "MatMulInteger is not taken; products of codes are written with QuantizeLinear and DequantizeLinear.", AGAIN,
          X + W + "[site] y = MatMul(a, w)"),
    Probe("integer-operator", "portable", "[site] y = QLinearMatMul(U, s, z, W, s, zs, s, z)",
          "QLinearMatMul is not taken; products of codes are written with QuantizeLinear and DequantizeLinear.", AGAIN,
          X + W + "[site] h = MatMul(a, w)" + q("h", "y")),
    Probe("measured-range", "tensorrt", RANGE + "[site] y = QuantizeLinear(x, rs, zs)",
          "Its scale or zero point is no constant.", "Fix the ranges at calibration.", "[site] y = QuantizeLinear(x, s, zs)"),
    Probe("wide-codes", "ort-x86", "[site] y = QuantizeLinear(x, s, z16)", "Codes of 16 bits have no integer kernel.",
          "Use activations of 8 bits.", "[site] y = QuantizeLinear(x, s, z)"),
    Probe("wide-codes", "ort-arm", "[site] y = DequantizeLinear(W16, s, zs16)", "Codes of 16 bits have no integer kernel.",
          "Use activations of 8 bits.", "[site] y = DequantizeLinear(W, s, zs)"),
    Probe("no-integer-kernel", "ort-x86", IMAGE + K + "[site] y = ConvTranspose(a, k)",
          "There is no integer kernel for ConvTranspose, so its weight is dequantized at every run.", AGAIN,
          IMAGE + "[site] y = ConvTranspose(a, KF)"),
    Probe("half-quantized", "portable", X + "[site] y = MatMul(a, WF)",
          "Its input 'WF' is not quantized, so it is computed in float.", "Quantize both of its factors.",
          X + W + "[site] y = MatMul(a, w)"),
    Probe("half-quantized", "tensorrt", K + "[site] y = Conv(image, k)",
          "Its input 'image' is not quantized, so it is computed in float.", "Quantize both of its factors.",
          "[site] y = Conv(image, KF)"),
    Probe("open-unit", "qnn", "[site] h = Relu(x)" + q("h", "y"),
          "Its input 'x' is float, so it does not run on codes.", "Quantize what it reads.",
          X + "[site] h = Relu(a)" + q("h", "y")),
    Probe("open-unit", "qnn", X + "[site] y = Relu(a)", "Its output 'y' is not quantized once, so it does not run on codes.",
          "Quantize what it makes.", X + W + "[site] h = MatMul(a, w) t = Relu(h)" + q("t", "y")),
    Probe("open-unit", "qnn", "[site] h = Clip(x, low, high)" + q("h", "y"),
          "Its input 'x' is float, so it does not run on codes.", "Quantize what it reads.",
          X + "h = Concat<axis = 0>(a, a) [site] t = Clip(h, low, high)" + q("t", "y")),
    Probe("signed-activation", "nnapi", "[site] y = QuantizeLinear(x, s, zs)",
          "Its activation codes are int8; NNAPI takes uint8.", "Use unsigned activations.", "[site] y = QuantizeLinear(x, s)"),
    Probe("unsigned-activation", "xnnpack", "[site] y = QuantizeLinear(x, s)",
          "Its activation codes are uint8; with scales per channel XNNPACK takes int8.", "Use signed activations.",
          "[site] y = QuantizeLinear<output_dtype = 3>(x, s)"),
    Probe("openvino-codes", "openvino", X + "w = DequantizeLinear<axis = 1>(W, ws, wz3) [site] y = MatMul(a, w)",
          "Its weight 'w' has a zero point, so it is computed in float.", "Use symmetric weights.",
          X + W + "[site] y = MatMul(a, w)"),
    Probe("openvino-codes", "openvino", X + f"w = {OF_CAST} [site] y = MatMul(a, w)",
          "The codes of 'w' have no integer kernel as they are.", "Cast them to int8, one scale per channel.",
          X + "v = Cast<to = 3>(W4) w = DequantizeLinear<axis = 1>(v, ws, wz) [site] y = MatMul(a, w)"),
    Probe("openvino-codes", "openvino", RANGE + q("x", "a", "rs") + W + "[site] y = MatMul(a, w)",
          "The range of 'a' is measured at run time, over all of it.", "Fix it, or measure it per token.",
          RANGE + "u = Div(x, rs)" + q("u", "a") + W + "[site] y = MatMul(a, w)"),
    Probe("openvino-codes", "openvino", q("image", "a", "s", "z3") + K + "[site] y = Conv(a, k)",
          "The signed codes of 'a' have a zero point, so the Conv is float.", "Use unsigned codes.",
          q("image", "a", "s", "z") + K + "[site] y = Conv(a, k)"),
    Probe("unsupported-codes", "tensorrt", "[site] b = DequantizeLinear<axis = 0>(B, ws, bz) y = Add(x, b)",
          "A bias of int32 codes is refused.", "Leave the bias in float.", "[site] y = Add(x, BF)"),
    Probe("unsupported-codes", "tensorrt", "[site] y = QuantizeLinear(x, s)",
          "Codes of type uint8 are refused, or taken for int8.", "Use symmetric int8.", "[site] y = QuantizeLinear(x, s, zs)"),
    Probe("asymmetric", "tensorrt", "[site] y = QuantizeLinear(x, s, z3)",
          "Its zero point is not zero; only symmetric quantization is taken.", "Use symmetric int8.",
          "[site] y = QuantizeLinear(x, s, zs)"),
    Probe("vanishing-scale", "tensorrt", X + "[site] w = DequantizeLinear<axis = 1>(W, dead, wz) y = MatMul(a, w)",
          "A scale is not above zero.", "Raise the scales of channels without values to the smallest positive one.",
          X + W + "[site] y = MatMul(a, w)"),
    Probe("activation-channels", "tensorrt", "[site] y = QuantizeLinear<axis = 1>(x, ws, wz)",
          "An activation has a scale per channel; only weights may.", "Use one scale for the tensor.",
          "[site] c = QuantizeLinear<axis = 1>(WF, ws, wz) y = DequantizeLinear<axis = 1>(c, ws, wz)"),
    Probe("activation-channels", "tensorrt", "[site] y = DequantizeLinear<axis = 1>(codes, ws, wz)",
          "An activation has a scale per channel; only weights may.", "Use one scale for the tensor.",
          "[site] y = DequantizeLinear<axis = 1>(W, ws, wz)"),
    Probe("narrow-weights", "tensorrt",
          X + "[site] v = Cast<to = 3>(W4) w = DequantizeLinear<axis = 1>(v, ws, wz) y = MatMul(a, w)",
          "int4 codes are cast, which has no kernel.", "Let DequantizeLinear read them.",
          X + f"[site] w = {OF_CAST} y = MatMul(a, w)"),
    Probe("narrow-weights", "tensorrt", f"[site] y = {OF_BLOCKS.format(4, 'blocks', 'bz4')}",
          "int4 weights have blocks of 4, not of 64 or 128.", "Use blocks of 64 or 128.",
          "[site] y = DequantizeLinear<axis = 0, block_size = 64>(W64, blocks, bz4)"),
    Probe("narrow-weights", "tensorrt",
          f"w = {OF_BLOCKS.format(64, 'b8', 'bz8').replace('W4', 'W8')} [site] y = MatMul(x64, w)",
          "Its weight in blocks is not int4 with an even number of outputs, so it is unpacked at every run.",
          "Use one scale per output channel.",
          f"w = {OF_BLOCKS.format(64, 'blocks', 'bz4').replace('W4', 'W64')} [site] y = MatMul(x128, w)"),
    Probe("uneven-blocks", "tensorrt", f"[site] y = {OF_BLOCKS.format(64, 'uneven', 'uz4').replace('W4', 'W72')}",
          "Its blocks of 64 do not divide 72 inputs, which is refused.", "Use one scale per output channel.",
          "[site] y = DequantizeLinear<axis = 0, block_size = 64>(W64, blocks, bz4)"),
    Probe("narrow-weights", "tensorrt", IMAGE + f"[site] k = {INT4_IN_CONV} y = Conv(a, k)", STAYS, AS_INT8,
          IMAGE + K + "[site] y = Conv(a, k)"),
    Probe("narrow-weights", "tensorrt", X + f"[site] w = {OF_BLOCKS.format(4, 'blocks', 'bz4')} y = MatMul(a, w)", STAYS,
          AS_INT8, f"[site] w = {OF_CAST}" + X + "y = MatMul(a, w)"),
    Probe("quantized-result", "tensorrt", CONV + q("h", "t", name="site") + "y = Relu(t)",
          "It stands between a layer and the function behind it, which are one kernel without it.", "Take it out.",
          CONV + "t = Relu(h)" + q("t", "y", name="site")),
    Probe("cut-weight", "tensorrt", X + W + f"[site] m = MatMul(a, w) {HEADS} b = Reshape(m, heads) p, y = {HALVES}(b)",
          IS_CUT, IN_FLOAT, X + W + f"[site] m = MatMul(a, w) p, y = {HALVES}(m)"),
    Probe("cut-weight", "tensorrt",
          X + W + f"[site] m = MatMul(a, w) {HEADS} b = Add(m, BF) p, c = {HALVES}(b) y = Reshape(c, heads)", IS_CUT, IN_FLOAT,
          X + "v = QuantizeLinear<axis = 1>(WF, ws, wz) w = DequantizeLinear<axis = 1>(v, ws, wz) [site] m = MatMul(a, w)"
          f"{HEADS} b = Add(m, BF) p, c = {HALVES}(b) y = Reshape(c, heads)"),
    Probe("cut-weight", "tensorrt",
          X + W + f"[site] m = MatMul(a, w) {HEADS} one = Constant<value_ints = [1]>() u = Unsqueeze(m, one)"
          f"b = Reshape(u, heads) p, y = {HALVES}(b)",
          IS_CUT, IN_FLOAT, X + W + f"[site] m = MatMul(a, w) {HEADS} one = Constant<value_ints = [1]>()"
          "u = Unsqueeze(m, one) y = Reshape(u, heads)"),
    Probe("bit-operator", "tensorrt", '[site] y = BitShift<direction = "RIGHT">(bytes, U)', "BitShift is not taken.",
          "Store one code per byte.", "[site] y = Identity(bytes)"),
    Probe("float-skip", "tensorrt", PADDED + "[site] y = Add(h, image)",
          "The branch that is added to a quantized Conv is float, so the two are not one kernel.", AGAIN,
          PADDED + "[site] y = Add(h, a)"),
    Probe("float-skip", "tensorrt", PADDED + "t = Tanh(image) [site] y = Add(t, h)",
          "The branch that is added to a quantized Conv is float, so the two are not one kernel.", AGAIN,
          PADDED + "[site] y = Add(CF, h)"),
)  # fmt: skip


def constants() -> dict[str, np.ndarray]:
    """The constants that probes name."""
    rng = np.random.default_rng(0)
    codes = rng.integers(-7, 8, (8, 8)).astype(np.int8)
    kernel = rng.integers(-7, 8, (4, 4, 3, 3)).astype(np.int8)
    int4 = ml_dtypes.int4
    scalars = {
        "s": np.float32(2**-5), "r": np.float32(1 / 127), "low": np.float32(0), "high": np.float32(6),
        "z": np.uint8(0), "zs": np.int8(0), "z3": np.int8(3),
        "z16": np.uint16(0), "zs16": np.int16(0),
    }  # fmt: skip
    arrays = {
        "W": codes, "W4": codes.astype(int4), "W16": codes.astype(np.int16), "WF": codes.astype(np.float32),
        "W64": np.tile(codes, (16, 1)).astype(int4), "W72": np.tile(codes, (9, 1)).astype(int4),
        "W8": np.tile(codes, (8, 1)), "b8": np.full((1, 8), 0.5, np.float32), "bz8": np.zeros((1, 8), np.int8),
        "uneven": np.full((2, 8), 0.5, np.float32), "uz4": np.zeros((2, 8), int4), "U": np.ones((8, 8), np.uint8),
        "ws": rng.uniform(0.01, 0.02, 8).astype(np.float32), "dead": np.float32([1, 1, 1, 0, 1, 1, 1, 1]),
        "wz": np.zeros(8, np.int8), "wz3": np.full(8, 3, np.int8), "wz4": np.zeros(8, int4),
        "blocks": np.full((2, 8), 0.5, np.float32), "bz4": np.zeros((2, 8), int4),
        "B": np.arange(8, dtype=np.int32), "bz": np.zeros(8, np.int32), "BF": np.ones(8, np.float32),
        "K": kernel, "K4": kernel.astype(int4), "KF": kernel.astype(np.float32), "CF": np.ones((4, 1, 1), np.float32),
        "ks": rng.uniform(0.01, 0.02, 4).astype(np.float32), "kz": np.zeros(4, np.int8), "kz4": np.zeros(4, int4),
    }  # fmt: skip
    return {name: np.asarray(value) for name, value in (arrays | scalars).items()}


CONSTANTS = constants()
HEADER = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>'
INPUTS = {
    "x": "float[8,8] x", "open": "float[N,8] open", "image": "float[1,4,6,6] image", "codes": "int8[8,8] codes",
    "bytes": "uint8[8,8] bytes", "x64": "float[8,64] x64", "x128": "float[8,128] x128",
}  # fmt: skip


def build(text: str) -> ModelProto:
    """The probe as a model, with the inputs and constants that it reads; its output is y, of the type that it gets."""
    used = re.findall(r"\w+", " ".join(re.findall(r"\(([^()]*)\)", text)))
    declared = ", ".join(INPUTS[name] for name in dict.fromkeys(used) if name in INPUTS)
    model = onnx.parser.parse_model(f"{HEADER} probe ({declared}) => () {{ {text} }}")
    values = {name: CONSTANTS[name] for name in used if name in CONSTANTS}
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in values.items())
    model.graph.output.append(ValueInfoProto(name="y"))
    return model


def judge(text: str, target: str, folder: Path) -> tuple[Violation, ...]:
    onnx.save(build(text), folder / "probe.onnx")
    return lint(folder / "probe.onnx", target).violations


def ids(probe: Probe) -> str:
    return f"{probe.rule} {probe.target}"


@pytest.mark.parametrize("probe", PROBES, ids=ids)
def test_this_breaks_one_rule_and_no_other(probe: Probe, tmp_path: Path):
    broken = judge(probe.broken, probe.target, tmp_path)

    node, op = ("open", "Input") if probe.rule == "varying-axis" else ("site", op_of_site(probe.broken))
    assert broken == (Violation(node, op, probe.rule, probe.reason, probe.remedy),)


def op_of_site(text: str) -> str:
    (node,) = (node for node in build(text).graph.node if node.name == "site")
    return node.op_type


@pytest.mark.parametrize("probe", PROBES, ids=ids)
def test_this_keeps_every_rule(probe: Probe, tmp_path: Path):
    assert judge(probe.kept, probe.target, tmp_path) == ()


def rule_functions() -> Iterator[ast.FunctionDef]:
    for node in ast.parse(inspect.getsource(rules)).body:
        if isinstance(node, ast.FunctionDef) and node.returns is not None and ast.unparse(node.returns) == "Broken":
            yield node


def test_every_rule_and_every_sentence_has_a_probe():
    """A sentence is what varies in it, which may read anything, and the rest."""
    unproven = []
    for function in rule_functions():
        probes = [p for p in PROBES if p.rule == function.name.replace("_", "-")]
        for pair in (node.value for node in ast.walk(function) if isinstance(node, ast.Yield)):
            assert isinstance(pair, ast.Tuple)
            if not any(re.fullmatch(pattern(pair.elts[0]), p.reason) for p in probes):
                unproven.append(ast.unparse(pair))

    assert {p.rule for p in PROBES} == {function.name.replace("_", "-") for function in rule_functions()}
    assert unproven == []


def pattern(sentence: ast.expr) -> str:
    """A string of the source, or an f-string, as a regular expression."""
    parts = sentence.values if isinstance(sentence, ast.JoinedStr) else [sentence]
    return "".join(re.escape(part.value) if isinstance(part, ast.Constant) else ".*" for part in parts)


def test_the_files_of_targets_name_rules_and_every_rule_is_named():
    known = {function.name.replace("_", "-") for function in rule_functions()}

    named = {path.stem: tomllib.loads(path.read_text(encoding="utf-8"))["rules"] for path in targets.FOLDER.glob("*.toml")}

    assert tuple(sorted(named)) == targets.names()
    assert {name: set(rules) - known for name, rules in named.items() if set(rules) - known} == {}
    assert {rule for listed in named.values() for rule in listed} == known
    assert all(len(set(listed)) == len(listed) for listed in named.values())


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("tensort", "Did you mean 'tensorrt'?"),
        ("x", f"The targets are: {', '.join(['auto', *targets.names()])}."),
    ],
)
def test_an_unknown_target_is_refused_with_the_nearest_or_with_all(name: str, hint: str):
    with pytest.raises(RecipeError) as caught:
        targets.find(name)

    assert str(caught.value) == f"Unknown target '{name}'. {hint}"


def test_the_target_of_this_machine_is_one_of_onnx_runtime():
    assert targets.here() in ("ort-x86", "ort-x86-avx2", "ort-arm")
