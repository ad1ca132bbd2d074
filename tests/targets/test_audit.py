"""What ONNX Runtime makes of each way to write a quantized operator: the rules of the targets, proven by running it.

Every probe is a tiny graph whose operator `site` is audited. Its tensors are `h` (its own output), `t` (behind an
activation function), `y_q` (the codes) and `y`.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx.parser
import pytest
from onnx import ModelProto, ValueInfoProto, numpy_helper

from onnxcomp import runtime
from onnxcomp.graph.convert import to_graph
from onnxcomp.targets import fallback
from onnxcomp.targets.audit import Kernel, audit
from onnxcomp.targets.fallback import explain

SITE = {"site": ("h", "t", "y_q", "y")}


def q(x: str, y: str, scale: str = "s", zero: str = "z") -> str:
    return f" {y}_q = QuantizeLinear({x}, {scale}, {zero})  {y} = DequantizeLinear({y}_q, {scale}, {zero}) "


X, SEQ, IMAGE = q("x", "a"), q("seq", "a"), q("image", "a")
W = " w = DequantizeLinear<axis = 1>(W, ws, wz) "
W4 = " w8 = Cast<to = 3>(W4)  w = DequantizeLinear<axis = 1>(w8, ws, wz) "
B = " b = DequantizeLinear<axis = 0>(B, bs, bz) "
K = " k = DequantizeLinear<axis = 0>(K, ks, kz) "
K2 = " k2 = DequantizeLinear<axis = 0>(K, ks, kz) "
KB = " kb = DequantizeLinear<axis = 0>(KB, kbs, kbz) "
OUT = q("h", "y")
CONV = IMAGE + K + " [site] h = Conv(a, k) "
RANGE = " m = Abs(x)  mm = ReduceMax<keepdims = 0>(m)  mr = Mul(mm, r)  rs = Max(mr, eps) "
TOKEN = " m = Abs(x)  mm = ReduceMax<keepdims = 1>(m, last)  mr = Mul(mm, r)  rs = Max(mr, eps)  d = Div(x, rs) "
RESCALE = " f = Cast<to = 1>(g)  e = Mul(cs, ws)  h = Mul(f, e) "
BLOCKS = " w = DequantizeLinear<axis = 0, block_size = {}>({}, {}) "
N4, N8 = BLOCKS.format(16, "W4", "bs4"), BLOCKS.format(16, "W", "bs4")
NARROW = "Its weight is dequantized at every run: "
DYNAMIC = " c, cs, cz = DynamicQuantizeLinear(x) "


@dataclass(frozen=True)
class Probe:
    claim: str
    text: str
    kernel: str
    reason: str = ""


FUSED = (
    Probe("MatMul with float output", X + W + "[site] y = MatMul(a, w)", "MatMulIntegerToFloat"),
    Probe("MatMul with quantized output", X + W + "[site] h = MatMul(a, w)" + OUT, "QLinearMatMul"),
    Probe("MatMul and ReLU", X + W + "[site] h = MatMul(a, w) t = Relu(h)" + q("t", "y", "s", "z0"), "QLinearMatMul"),
    Probe("MatMul and Sum", X + W + "[site] h = MatMul(a, w) y = Sum(h, b32)", "MatMulIntegerToFloat"),
    Probe("MatMul and Add of rank 3", SEQ + W + "[site] h = MatMul(a, w) y = Add(h, b3)", "MatMulIntegerToFloat"),
    Probe("MatMul and Add, batch open", q("open", "a") + W + "[site] h = MatMul(a, w) y = Add(h, b32)",
          "MatMulIntegerToFloat"),
    Probe("MatMul and an int32 bias", X + W + B + "[site] h = MatMul(a, w) y = Add(h, b)", "QGemm"),
    Probe("MatMul and an int32 bias, rank 3", SEQ + W + B + "[site] h = MatMul(a, w) y = Add(h, b)", "QGemm"),
    Probe("MatMul and Add with quantized output", X + W + "[site] g = MatMul(a, w) h = Add(g, b32)" + OUT, "QGemm"),
    Probe("MatMul with one scale for the weight", X + "w = DequantizeLinear(W, s, zs) [site] y = MatMul(a, w)",
          "MatMulIntegerToFloat"),
    Probe("MatMul with a transposed weight",
          X + "v = DequantizeLinear<axis = 0>(W, ws, wz) w = Transpose<perm = [1, 0]>(v) [site] y = MatMul(a, w)",
          "MatMulIntegerToFloat"),
    Probe("MatMul of two activations", SEQ + q("open", "c") + "[site] y = MatMul(a, c)", "MatMulIntegerToFloat"),
    Probe("MatMul of signed activations", q("x", "a", "s", "zs") + W + "[site] y = MatMul(a, w)",
          "MatMulIntegerToFloat"),
    Probe("two MatMuls on one DequantizeLinear", X + W + "[site] h = MatMul(a, w) g = MatMul(a, w) y = Sum(g, h)",
          "MatMulIntegerToFloat"),
    Probe("int4 weight behind Cast", X + W4 + "[site] y = MatMul(a, w)", "MatMulIntegerToFloat"),
    Probe("4-bit activation by integer Clip",
          "c = QuantizeLinear(x, s, z) e = Clip(c, lo, hi) a = DequantizeLinear(e, s, z)" + W4
          + "[site] y = MatMul(a, w)", "MatMulIntegerToFloat"),
    Probe("range at run time", RANGE + q("x", "a", "rs") + W + "[site] y = MatMul(a, w)", "MatMulIntegerToFloat"),
    Probe("range at run time and MatMulInteger, 4-bit activation",
          RANGE + "cs = Identity(rs) c = QuantizeLinear(x, cs, z) c4 = Clip(c, lo, hi)"
          + "[site] g = MatMulInteger(c4, W, z)" + RESCALE + "y = Add(h, b32)", "MatMulIntegerToFloat"),
    Probe("range at run time per token",
          TOKEN + q("d", "a", "one") + W + "[site] g = MatMul(a, w) h = Mul(g, rs) y = Sum(h, b32)",
          "MatMulIntegerToFloat"),
    Probe("DynamicQuantizeLinear and MatMulInteger",
          DYNAMIC + "[site] g = MatMulInteger(c, W, cz, wz)" + RESCALE + "y = Add(h, b32)",
          "DynamicQuantizeMatMul"),
    Probe("DynamicQuantizeLinear and MatMulInteger on int4",
          DYNAMIC + "v = Cast<to = 3>(W4) [site] g = MatMulInteger(c, v, cz)" + RESCALE + "y = Neg(h)",
          "DynamicQuantizeMatMul"),
    Probe("DynamicQuantizeLinear and DequantizeLinear",
          DYNAMIC + "a = DequantizeLinear(c, cs, cz)" + W + "[site] h = MatMul(a, w) y = Sum(h, b32)",
          "DynamicQuantizeMatMul"),
    Probe("Gemm with an int32 bias", X + W + B + "[site] y = Gemm(a, w, b)", "QGemm"),
    Probe("Gemm with transB",
          X + B + "w = DequantizeLinear<axis = 0>(W, ws, wz) [site] y = Gemm<transB = 1>(a, w, b)", "QGemm"),
    Probe("Gemm with int4 weight behind Cast", X + W4 + B + "[site] y = Gemm(a, w, b)", "QGemm"),
    Probe("Gemm without bias", X + W + "[site] y = Gemm(a, w)", "QGemm"),
    Probe("Gemm with float bias and quantized output", X + W + "[site] h = Gemm(a, w, b32)" + OUT, "QGemm"),
    Probe("int4 weight in blocks", N4 + "[site] y = MatMul(x, w)", "MatMulNBits"),
    Probe("int8 weight in blocks and Sum", N8 + "[site] h = MatMul(x, w) y = Sum(h, b32)", "MatMulNBits"),
    Probe("int4 weight in blocks and Add of rank 3", N4 + "[site] h = MatMul(seq, w) y = Add(h, b3)", "MatMulNBits"),
    Probe("Gemm with an int4 weight in blocks", N4 + "[site] y = Gemm(x, w, b32)", "MatMulNBits"),
    Probe("int4 weight in blocks with zero points",
          "w = DequantizeLinear<axis = 0, block_size = 16>(W4, bs4, bz4) [site] y = MatMul(x, w)", "MatMulNBits"),
    Probe("int8 weight per channel, float activation", W + "[site] y = MatMul(x, w)", "MatMulNBits"),
    Probe("two products with codes of their own",
          N4 + BLOCKS.replace(" w", " v").format(16, "V4", "vs4") + "[site] h = MatMul(x, w) g = MatMul(x, v) y = Sum(g, h)",
          "MatMulNBits"),
    Probe("codes of 4 bits made when the file is loaded",
          "v = Cast<to = 22>(W4i8) w = DequantizeLinear<axis = 0, block_size = 16>(v, bs4) [site] y = MatMul(x, w)",
          "MatMulNBits"),
    Probe("Gather of codes", "[site] h = Gather(W, ids) t = Cast<to = 1>(h) y = Mul(t, s)", "Gather"),
    Probe("Conv with an int32 bias", IMAGE + K + KB + "[site] h = Conv(a, k, kb)" + OUT, "QLinearConv"),
    Probe("Conv with a float bias", IMAGE + K + "[site] h = Conv(a, k, kb32)" + OUT, "QLinearConv"),
    Probe("Conv with an int4 weight behind Cast",
          IMAGE + "k8 = Cast<to = 3>(K4) k = DequantizeLinear<axis = 0>(k8, ks, kz) [site] h = Conv(a, k)" + OUT,
          "QLinearConv"),
    Probe("Conv and ReLU, zero point qmin", CONV + "t = Relu(h)" + q("t", "y", "s", "z0"), "QLinearConv"),
    Probe("Conv and ReLU, scale at run time", RANGE + CONV + "t = Relu(h)" + q("t", "y", "rs", "z0"), "QLinearConv"),
    Probe("Conv and ReLU6, range within it", CONV + "t = Clip(h, zero, six)" + q("t", "y", "s6", "z0"), "QLinearConv"),
    Probe("Conv, ReLU and an integer Clip",
          CONV + "t = Relu(h) y_q = QuantizeLinear(t, s, z0) e = Clip(y_q, lo, hi) y = DequantizeLinear(e, s, z0)",
          "QLinearConv"),
    Probe("Conv in front of Conv", CONV + OUT + K2 + "h2 = Conv(y, k2)" + q("h2", "y2"), "QLinearConv"),
    Probe("Add", IMAGE + q("image", "c", "s6") + "[site] h = Add(a, c)" + OUT, "QLinearAdd"),
    Probe("Add and ReLU", IMAGE + q("image", "c", "s6") + "[site] h = Add(a, c) t = Relu(h)" + q("t", "y", "s", "z0"),
          "QLinearAdd"),
    Probe("Add of a uint8 constant", IMAGE + "c = DequantizeLinear(CU, s, z) [site] h = Add(a, c)" + OUT, "QLinearAdd"),
    Probe("Mul", IMAGE + q("image", "c", "s6") + "[site] h = Mul(a, c)" + OUT, "QLinearMul"),
    Probe("Concat", IMAGE + q("image", "c", "s6") + "[site] h = Concat<axis = 1>(a, c)" + OUT, "QLinearConcat"),
    Probe("Sigmoid", IMAGE + "[site] h = Sigmoid(a)" + OUT, "QLinearSigmoid"),
    Probe("Softmax", IMAGE + "[site] h = Softmax(a)" + OUT, "QLinearSoftmax"),
    Probe("LeakyRelu", IMAGE + "[site] h = LeakyRelu(a)" + OUT, "QLinearLeakyRelu"),
    Probe("AveragePool", IMAGE + "[site] h = AveragePool<kernel_shape = [2, 2]>(a)" + OUT, "QLinearAveragePool"),
    Probe("GlobalAveragePool", IMAGE + "[site] h = GlobalAveragePool(a)" + OUT, "QLinearGlobalAveragePool"),
)  # fmt: skip

FLOAT = (
    Probe("float input", K + "[site] h = Conv(image, k)" + OUT, "Conv", "Its input 'image' is not quantized."),
    Probe("Conv with a weight that folds to float",
          "k8 = Cast<to = 1>(K) k = Mul(k8, s) [site] y = Conv(image, k)", "Conv",
          "Its input 'image' is not quantized."),
    Probe("one float input of two", IMAGE + "[site] h = Add(a, image)" + OUT, "Add",
          "Its input 'image' is not quantized."),
    Probe("float constant operand", IMAGE + "[site] h = Add(a, CF)" + OUT, "Add",
          "Its constant operand 'CF' is not quantized."),
    Probe("float weight", X + "[site] y = MatMul(a, WF)", "MatMul", "Its weight 'WF' is not quantized."),
    Probe("MatMul and Add", X + W + "[site] h = MatMul(a, w) y = Add(h, b32)", "Gemm",
          "The Add behind it makes it a Gemm with a float bias."),
    Probe("MatMul and Add of rank 3 with fixed batch", SEQ + W + "[site] h = MatMul(a, w) y = Add(b32, h)", "Gemm",
          "The Add behind it makes it a Gemm with a float bias."),
    Probe("a transposed weight in blocks",
          N4 + "v = Transpose<perm = [1, 0]>(w) [site] y = MatMul(x, v)", "FusedMatMul", NARROW + "it is transposed."),
    Probe("Gemm with a transposed weight in blocks",
          N4 + "[site] y = Gemm<transB = 1>(x, w)", "Gemm", NARROW + "it is transposed."),
    Probe("two products with one weight in blocks",
          N4 + "[site] h = MatMul(x, w) g = MatMul(x, w) y = Sum(g, h)", "MatMul",
          NARROW + "its codes or scales have another reader."),
    Probe("blocks of 8", BLOCKS.format(8, "W4", "bs4") + "[site] y = MatMul(x, w)", "MatMul", NARROW + "it has blocks of 8."),
    Probe("a ReLU behind a weight in blocks", N4 + "[site] h = MatMul(x, w) act = Relu(h) y = Neg(act)", "MatMul",
          NARROW + "a Relu reads the result."),
    Probe("a weight in blocks and a quantized result", N4 + "[site] h = MatMul(x, w)" + OUT, "MatMul",
          NARROW + "the result is quantized."),
    Probe("Conv without QuantizeLinear", CONV + "y = Tanh(h)", "FusedConv",
          "Its output 'h' is read in float by Tanh."),
    Probe("Conv as graph output", IMAGE + K + "[site] y = Conv(a, k)", "Conv",
          "Its output 'y' is a graph output, so it is computed in float."),
    Probe("Conv with a second reader", CONV + OUT + "[tanh] t2 = Tanh(h)  y2 = Add(t2, y)", "Conv",
          "Its output 'h' is also read in float by tanh (Tanh)."),
    Probe("Conv and ReLU with a second reader", CONV + "t = Relu(h)" + q("t", "y", "s", "z0") + "[tanh] y2 = Tanh(t)",
          "FusedConv", "Its output 't' is also read in float by tanh (Tanh)."),
    Probe("Conv quantized twice", CONV + OUT + q("h", "y2", "s6"), "Conv",
          "Its output 'h' is quantized 2 times."),
    Probe("Conv and an Add of a constant", CONV + "t = Add(h, CF)" + q("t", "y"), "Conv",
          "Its output 'h' is read in float by Add."),
    Probe("Conv and LeakyRelu", CONV + "t = LeakyRelu(h)" + q("t", "y"), "FusedConv",
          "Its output 'h' is read in float by LeakyRelu."),
    Probe("ReLU with a zero point above qmin", CONV + "t = Relu(h)" + q("t", "y"), "FusedConv",
          "The Relu behind it stays: the zero point of its QuantizeLinear is 128, not 0."),
    Probe("ReLU6 with a range beyond it", CONV + "t = Clip(h, zero, six)" + q("t", "y", "s8", "z0"), "FusedConv",
          "The Clip to [0, 6] behind it stays: its QuantizeLinear reaches from 0 to 7.96875."),
    Probe("ReLU6 in front of a range at run time", RANGE + CONV + "t = Clip(h, zero, six)" + q("t", "y", "rs", "z0"),
          "FusedConv", "The Clip behind it stays: the range of its QuantizeLinear is not constant."),
)  # fmt: skip


def constants() -> dict[str, np.ndarray]:
    """The constants that probes name. Scales of powers of two, so the ranges in the reasons are exact."""
    rng = np.random.default_rng(0)
    codes = rng.integers(-127, 128, (8, 8)).astype(np.int8)
    kernel = rng.integers(-127, 128, (4, 4, 3, 3)).astype(np.int8)
    scalars = {
        "s": np.float32(2**-5), "s6": np.float32(6 / 256), "s8": np.float32(2**-5),
        "one": np.float32(1), "r": np.float32(1 / 127), "eps": np.float32(1e-9), "zero": np.float32(0),
        "six": np.float32(6), "z": np.uint8(128), "z0": np.uint8(0), "zs": np.int8(0),
        "lo": np.uint8(0), "hi": np.uint8(15),
    }  # fmt: skip
    arrays = {
        "last": np.array([-1]),
        "W": codes, "W4": (codes // 16).astype(ml_dtypes.int4),
        "W4i8": codes // 16, "V4": (codes // 16).astype(ml_dtypes.int4), "bz4": np.ones((1, 8), ml_dtypes.int4),
        "bs4": np.full((1, 8), 0.5, np.float32), "vs4": np.full((1, 8), 0.25, np.float32),
        "WF": codes.astype(np.float32), "ws": rng.uniform(0.01, 0.02, 8).astype(np.float32),
        "wz": np.zeros(8, np.int8),
        "B": np.arange(8, dtype=np.int32), "bz": np.zeros(8, np.int32), "b32": np.ones(8, np.float32),
        "b3": np.ones((1, 1, 8), np.float32),
        "K": kernel, "K4": (kernel // 16).astype(ml_dtypes.int4), "kz": np.zeros(4, np.int8),
        "ks": rng.uniform(0.01, 0.02, 4).astype(np.float32),
        "KB": np.arange(4, dtype=np.int32), "kbz": np.zeros(4, np.int32),
        "kb32": np.ones(4, np.float32),
        "CF": np.ones((4, 1, 1), np.float32), "CU": np.ones((4, 1, 1), np.uint8),
    }  # fmt: skip
    arrays |= {"bs": arrays["ws"] * scalars["s"], "kbs": arrays["ks"] * scalars["s"]}
    return {name: np.asarray(value) for name, value in (arrays | scalars).items()}


CONSTANTS = constants()
HEADER = '<ir_version: 10, opset_import: ["" : 21]>'
INPUTS = "float[8,8] x, float[1,8,8] seq, float[N,8,8] open, float[1,4,6,6] image, int64[N] ids"


def build(text: str) -> ModelProto:
    """The probe as a model. Its outputs are those of y, y2 that it computes; their types are left to ONNX Runtime."""
    model = onnx.parser.parse_model(f"{HEADER} probe ({INPUTS}) => () {{ {text} }}")
    used = [name for node in model.graph.node for name in node.input]
    values = {name: CONSTANTS[name] for name in used if name in CONSTANTS}
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in values.items())
    made = {name for node in model.graph.node for name in node.output}
    model.graph.output.extend(ValueInfoProto(name=name) for name in ("y", "y2") if name in made)
    return model


def audited(model: ModelProto, sites: Mapping[str, Sequence[str]] = SITE) -> tuple[Kernel, ...]:
    return audit(model.SerializeToString(), to_graph(model), sites)


def ids(probe: Probe) -> str:
    return probe.claim


@pytest.mark.parametrize("probe", FUSED, ids=ids)
def test_this_becomes_an_integer_kernel(probe: Probe):
    assert audited(build(probe.text)) == (Kernel("site", probe.kernel, True, ""),)


@pytest.mark.parametrize("probe", FLOAT, ids=ids)
def test_this_stays_float_for_a_reason(probe: Probe):
    assert audited(build(probe.text)) == (Kernel("site", probe.kernel, False, probe.reason),)


def test_every_rule_has_a_probe():
    """A rule is a sentence; what varies in it may read anything."""
    yielded = [node.value for node in ast.walk(ast.parse(inspect.getsource(fallback))) if isinstance(node, ast.Yield)]
    sentences = [pair.elts[0] for pair in yielded if isinstance(pair, ast.Tuple)]
    rules = [re.compile(pattern(sentence)) for sentence in sentences]
    unproven = {rule.pattern for rule in rules} - {rule.pattern for p in FLOAT for rule in rules if rule.fullmatch(p.reason)}

    assert rules
    assert not unproven


def pattern(sentence: ast.expr) -> str:
    """A string of the source, or an f-string, as a regular expression."""
    parts = sentence.values if isinstance(sentence, ast.JoinedStr) else [sentence]
    return "".join(re.escape(part.value) if isinstance(part, ast.Constant) else ".*" for part in parts)


def test_where_no_rule_is_broken_the_version_is_to_blame():
    graph = to_graph(build(X + W + "[site] y = MatMul(a, w)"))

    reason = explain(graph.nodes[-1], frozenset({"y"}), "9.9.9")

    assert reason == "ONNX Runtime 9.9.9 did not fuse it."


def test_a_site_that_folds_to_a_constant_has_no_kernel():
    model = build("[site] h = MatMul(WF, WF)  y = Add(x, h)")

    kernel = audited(model)

    reason = "No operator of ONNX Runtime's optimized model could be matched to it."
    assert kernel == (Kernel("site", "", False, reason),)


def test_sites_are_answered_in_the_order_given_and_by_their_own_tensors():
    text = X + W + "[one] h1 = MatMul(a, w) t1 = Sum(h1, b32) [two] y = MatMul(t1, WF)"

    kernels = audited(build(text), {"two": ("y",), "one": ("h1", "t1")})

    assert [(k.site, k.op, k.integer) for k in kernels] == [
        ("two", "MatMul", False),
        ("one", "MatMulIntegerToFloat", True),
    ]


@pytest.mark.parametrize(
    "text",
    [
        X + "w = DequantizeLinear<axis = 0>(W, ws, wz) [site] y = MatMul(a, w)",
        IMAGE + "k = DequantizeLinear<axis = 1>(K, ks, kz) [site] h = Conv(a, k)" + OUT,
    ],
    ids=["MatMul", "Conv"],
)
def test_a_scale_along_the_wrong_axis_of_a_square_weight_is_fused_and_wrong(text: str):
    """The reason why verification compares optimizations on and off."""
    model = build(text)
    rng = np.random.default_rng(1)
    feed = {name: rng.normal(size=kind.shape).astype(np.float32) for name, kind in runtime.Session(model).inputs[:1]}
    feed |= {"seq": np.zeros((1, 8, 8), np.float32), "open": np.zeros((1, 8, 8), np.float32)}
    feed |= {"ids": np.zeros(1, np.int64), "image": rng.normal(size=(1, 4, 6, 6)).astype(np.float32)}

    fused, plain = (runtime.Session(model, optimize=on).run(feed)["y"] for on in (True, False))

    assert audited(model)[0].integer
    # Scales differ by up to a factor of two, so the results differ by far more than two quantization steps.
    assert np.abs(fused - plain).max() > 2 * CONSTANTS["s"]
