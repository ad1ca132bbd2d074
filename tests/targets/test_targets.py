"""What every target's files have in common, and what each encoding promises, on tiny models."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
from equality import assert_same_function, fitting, of_opset_21, run, stored
from onnx import ModelProto, NodeProto, TensorProto
from onnx.reference import ReferenceEvaluator
from tiny import mlp, models

from onnxcomp import runtime, targets
from onnxcomp.errors import RecipeError
from onnxcomp.lint import lint
from onnxcomp.methods.base import Compensation
from onnxcomp.methods.bias import BiasCompensation
from onnxcomp.methods.nbc import NonlinearBipolarCompensation
from onnxcomp.methods.noisyquant import NoisyQuant
from onnxcomp.methods.xint import XInt
from onnxcomp.pipeline import Result, quantize
from onnxcomp.recipe import NAMED, Bits, Recipe, method_name
from onnxcomp.report.model import Lint
from onnxcomp.strip import strip

TINY = models()
MODELS = ("transformer", "residual", "gemm", "conv_1d")
TARGETS = {name: targets.find(name) for name in targets.names()}
HALF = "w8a8-half"
CASES = [
    (target, name, how)
    for target in TARGETS
    for name in MODELS
    for how in ("w8a8", "w4a4", *({"qnn": ("w8a16",), "tensorrt": (HALF,)}.get(target, ())))
]
every_case = pytest.mark.parametrize(("target", "name", "how"), CASES)
CODES = {TensorProto.UINT8, TensorProto.INT8, TensorProto.UINT16, TensorProto.INT16, TensorProto.INT4, TensorProto.INT32}


@cache
def quantized(target: str, name: str, how: str) -> Result:
    """The tiny model for the target, once for all the laws."""
    recipe = Recipe(target=target, bits=Bits.parse(how.removesuffix("-half")), half=how == HALF)
    return quantize(TINY[name].model, TINY[name].samples, recipe)


def judged(model: ModelProto, target: str, folder: Path) -> Lint:
    onnx.save(model, folder / "model.onnx")
    return lint(folder / "model.onnx", target)


def outputs(model: ModelProto, feeds: list[dict[str, np.ndarray]], *, optimize: bool = False) -> list[list[np.ndarray]]:
    return [list(run(model, feed, optimize=optimize).values()) for feed in feeds]


def quantizers(model: ModelProto) -> list[NodeProto]:
    return [node for node in model.graph.node if node.op_type == "QuantizeLinear"]


# --- every target ----------------------------------------------------------------------------------------------------


@every_case
def test_a_target_finds_nothing_wrong_with_its_own_files(target: str, name: str, how: str, tmp_path: Path):
    found = judged(quantized(target, name, how).model, target, tmp_path)

    assert (found.violations, found.notes) == ((), ())
    assert found.kernels
    assert all(kernel.integer for kernel in found.kernels)


@every_case
def test_every_site_is_integer_as_the_rules_have_foretold(target: str, name: str, how: str):
    report = quantized(target, name, how).report

    assert [site.name for site in report.sites if not site.integer] == []
    assert [note for note in report.notes if "foretold" in note] == []
    assert report.target == target
    rules = f"the rules of {target}, which did not run here"
    if TARGETS[target].kernels == "onnxruntime":
        assert report.kernels_by.startswith("onnxruntime ")
    else:  # OpenVINO and TensorRT are asked where they are installed
        assert report.kernels_by == rules or report.kernels_by.startswith(TARGETS[target].kernels or rules)


@every_case
def test_a_file_is_of_standard_operators_of_its_own_opset(target: str, name: str, how: str):
    model = quantized(target, name, how).model

    onnx.checker.check_model(model, full_check=True)
    assert [entry.domain for entry in model.opset_import] == [""]
    assert all(onnx.defs.has(n.op_type, max_inclusive_version=model.opset_import[0].version) for n in model.graph.node)
    assert len({node.name for node in model.graph.node}) == len(model.graph.node)


@every_case
def test_the_reference_implementation_computes_the_same(target: str, name: str, how: str):
    model = quantized(target, name, how).model
    feeds = fitting(TINY[name])
    evaluator = ReferenceEvaluator(of_opset_21(model))

    found = [[np.asarray(y) for y in evaluator.run(None, dict(feed))] for feed in feeds]

    assert_same_function(found, outputs(model, feeds), outputs(TINY[name].model, feeds))


# --- what the encodings promise --------------------------------------------------------------------------------------


@every_case
def test_activation_codes_are_signed_or_wide_where_the_encoding_says_so(target: str, name: str, how: str):
    encoding, model = TARGETS[target].encoding, quantized(target, name, how).model
    zero_points = stored(model)

    found = {zero_points[node.input[2]].dtype for node in quantizers(model)}

    widths = {8, 16} if how == "w8a16" else {8}
    assert {np.dtype(f"{'int' if encoding.signed else 'uint'}{width}") for width in widths} >= found
    assert np.dtype(np.uint16) in found or how != "w8a16"
    if encoding.symmetric:
        assert not any(zero_points[node.input[2]].any() for node in quantizers(model))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", MODELS)
def test_weights_of_four_bits_are_stored_as_the_encoding_says(target: str, name: str):
    model = quantized(target, name, "w4a4").model
    read = {node.input[0]: node.op_type for node in model.graph.node if node.op_type in ("Cast", "DequantizeLinear")}

    packed = {read[i.name] for i in model.graph.initializer if i.data_type == TensorProto.INT4 and i.name in read}

    assert packed == {"cast": {"Cast"}, "native": {"DequantizeLinear"}, "int8": set()}[TARGETS[target].encoding.packed]


@every_case
def test_only_the_encoding_that_wants_them_has_biases_of_32_bits(target: str, name: str, how: str):
    biases = [i.name for i in quantized(target, name, how).model.graph.initializer if i.data_type == TensorProto.INT32]

    has_conv = "conv" in name or name == "residual"
    assert bool(biases) is (
        TARGETS[target].encoding.bias == "int32" and (has_conv or TARGETS[target].encoding.where == "units")
    )


@pytest.mark.parametrize(("target", "name", "how"), [case for case in CASES if TARGETS[case[0]].encoding.where == "inputs"])
def test_around_inputs_quantizers_stand_in_front_of_layers_and_residual_adds_alone(target: str, name: str, how: str):
    model = quantized(target, name, how).model
    readers = {tensor: [n for n in model.graph.node if tensor in n.input] for n in model.graph.node for tensor in n.output}

    fed = []
    for node in quantizers(model):
        (dequantize,) = readers[node.output[0]]
        fed += readers[dequantize.output[0]]

    assert {node.op_type for node in fed if node.name != "join"} <= {"Conv", "MatMul", "Gemm"}
    assert [node.op_type for node in fed if node.name == "join"] == ["Add"] * (name == "residual")


@pytest.mark.parametrize(("target", "name", "how"), [case for case in CASES if TARGETS[case[0]].encoding.where == "units"])
def test_in_units_every_operator_reads_codes_and_makes_codes(target: str, name: str, how: str):
    model = onnx.shape_inference.infer_shapes(quantized(target, name, how).model)
    graph = model.graph
    floats = {v.name for v in (*graph.value_info, *graph.input) if v.type.tensor_type.elem_type == TensorProto.FLOAT}
    readers: dict[str, set[str]] = {}
    for node in graph.node:
        for tensor in node.input:
            readers.setdefault(tensor, set()).add(node.op_type)
    makers = {output: node.op_type for node in graph.node for output in node.output}

    open_ends = {t for t in floats if makers.get(t) != "DequantizeLinear" and readers.get(t) != {"QuantizeLinear"}}

    # between a layer and the ReLU that is one unit with it
    assert {t for t in open_ends if not readers[t] <= {"Relu", "Clip"}} == set()


@every_case
def test_axes_are_fixed_at_the_first_sample_where_the_runtime_wants_that(target: str, name: str, how: str):
    graph = quantized(target, name, how).model.graph
    shapes = {v.name: [d.dim_value or d.dim_param for d in v.type.tensor_type.shape.dim] for v in (*graph.input, *graph.output)}

    if TARGETS[target].fixed:
        first = TINY[name].samples[0]
        expected = {k: list(v.shape) for k, v in (first | run(TINY[name].model, first)).items()}
    else:
        before = TINY[name].model.graph
        values = (*before.input, *before.output)
        expected = {v.name: [d.dim_value or d.dim_param for d in v.type.tensor_type.shape.dim] for v in values}
    assert shapes == expected


@pytest.mark.parametrize(
    ("name", "how", "opset"),
    [
        ("transformer", "w8a8", 20),  # Gelu
        ("residual", "w8a8", 13),
        ("gemm", "w8a8", 13),
        ("conv_1d", "w8a8", 18),  # the axes of ReduceMean are an input
        ("residual", "w4a4", 21),  # int4
    ],
)
def test_a_portable_file_has_the_oldest_opset_that_holds_it(name: str, how: str, opset: int):
    model = quantized("portable", name, how).model

    assert model.opset_import[0].version == opset
    assert model.ir_version == onnx.helper.find_min_ir_version_for(list(model.opset_import))


def test_float16_is_everywhere_but_in_codes_and_at_the_ends():
    model = quantized("tensorrt", "transformer", HALF).model

    kinds = Counter(i.data_type for i in model.graph.initializer)
    assert kinds[TensorProto.FLOAT] == 0
    assert kinds.keys() - {TensorProto.INT64} == {TensorProto.FLOAT16, TensorProto.INT8}
    ends = [v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)]
    assert ends == [TensorProto.FLOAT] * 2


@pytest.mark.parametrize("target", [name for name, target in TARGETS.items() if not target.half])
def test_a_target_without_float16_refuses_it(target: str):
    with pytest.raises(RecipeError) as caught:
        quantize(TINY["gemm"].model, TINY["gemm"].samples, Recipe(target=target, half=True))

    assert str(caught.value) == f"{target} takes no float16 beside codes. Leave --half out, or use --target tensorrt."


@pytest.mark.parametrize("target", ["portable", "tensorrt"])
def test_a_float_bias_of_a_channel_without_weights_survives_the_runtime_that_makes_it_an_integer(target: str):
    """ONNX Runtime stores it in steps of the input's scale times the weight's, which is next to nothing."""
    tiny = TINY["outputs"]

    model = quantize(tiny.model, tiny.samples, Recipe(target=target)).model

    plain, reference = (outputs(m, tiny.samples) for m in (model, tiny.model))
    assert_same_function(outputs(model, tiny.samples, optimize=True), plain, reference)


# --- signed and unsigned codes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*MODELS, "silu"])
@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
def test_signed_codes_stand_for_the_same_values_as_unsigned_ones(name: str, bits: str):
    """The encodings of these two targets differ in nothing else, but for large tables."""
    signed, unsigned = TARGETS["xnnpack"].encoding, TARGETS["nnapi"].encoding
    assert replace(signed, signed=False, embeddings=False) == unsigned
    tiny, recipe = (
        TINY[name],
        Recipe(bits=Bits.parse(bits), compensate=(), rotation="none", equalization="none", moments="none"),
    )

    files = [quantize(tiny.model, tiny.samples, replace(recipe, target=target)).model for target in ("xnnpack", "nnapi")]

    # Without VNNI the narrow signed codes are computed in float at calibration, whose sums are rounded in another order.
    apart = 1e-5 if runtime.saturates() and bits == "w4a4" else 0.0
    for left, right in zip(*(outputs(model, fitting(tiny)) for model in files), strict=True):
        for a, b in zip(left, right, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=apart * float(np.abs(b).max()))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("how", ["w8a8", "w4a4"])
def test_onnx_runtime_gets_the_same_function_on_arm_as_on_x86(name: str, how: str):
    arm, x86 = (outputs(quantized(target, name, how).model, fitting(TINY[name])) for target in ("ort-arm", "ort-x86"))

    assert_same_function(arm, x86, outputs(TINY[name].model, fitting(TINY[name])))


# --- methods ---------------------------------------------------------------------------------------------------------

METHODS: dict[str, Compensation] = {
    "bias": BiasCompensation(keep="always"),
    "nbc": NonlinearBipolarCompensation(keep="always"),
    "linear": NonlinearBipolarCompensation(keep="always", alpha=float("inf"), weight="int8"),
    "offset": NoisyQuant(keep="always"),
    "uniform": NoisyQuant(mode="uniform", keep="always"),
    "xint": XInt(keep="always"),
}
PLAIN = Recipe(bits=Bits(4, 4), activations="static", rounding="nearest", compensate=())


@cache
def compensated(target: str, name: str, how: str) -> Result:
    recipe = replace(NAMED["best"], bits=Bits(4, 4)) if how == "best" else replace(PLAIN, compensate=(METHODS[how],))
    return quantize(TINY[name].model, TINY[name].samples, replace(recipe, target=target))


@pytest.mark.parametrize("target", ["ort-arm", "tensorrt"])
@pytest.mark.parametrize(("name", "how"), [*(("transformer", how) for how in ("best", *METHODS)), ("residual", "best")])
def test_every_method_is_written_for_signed_codes_too(target: str, name: str, how: str, tmp_path: Path):
    result = compensated(target, name, how)
    feeds = fitting(TINY[name])

    broken = judged(result.model, target, tmp_path).violations
    assert [v for v in broken if "/nbc/" not in v.node] == []  # what a branch computes in float may read codes
    evaluator = ReferenceEvaluator(result.model)
    found = [[np.asarray(y) for y in evaluator.run(None, dict(feed))] for feed in feeds]
    assert_same_function(found, outputs(result.model, feeds), outputs(TINY[name].model, feeds))
    assert any(d.adopted for d in result.report.decisions)


LAST = {"linear_3d": "fc", "gemm": "fc2"}


@pytest.mark.parametrize("target", ["ort-arm", "ort-x86", "tensorrt"])
@pytest.mark.parametrize("name", LAST)
@pytest.mark.parametrize("how", ["bias", "offset"])
def test_a_method_is_taken_out_of_a_file_of_signed_codes(target: str, name: str, how: str):
    """At the last layer alone, so that no range was fitted behind it."""
    tiny, method = TINY[name], replace(METHODS[how], where=LAST[name])
    recipe = replace(PLAIN, target=target)
    result = quantize(tiny.model, tiny.samples, replace(recipe, compensate=(method,)))
    assert any(d.adopted for d in result.report.decisions)

    left = strip(result.model, [method_name(method)]).model

    plain = quantize(tiny.model, tiny.samples, recipe).model
    assert left.graph == plain.graph
    assert result.model.graph != plain.graph


@pytest.mark.parametrize("name", LAST)
@pytest.mark.parametrize("how", ["bias", "offset"])
def test_a_method_is_taken_out_of_a_float16_file(name: str, how: str):
    tiny, method = TINY[name], replace(METHODS[how], where=LAST[name])
    recipe = replace(PLAIN, target="tensorrt", half=True)
    result = quantize(tiny.model, tiny.samples, replace(recipe, compensate=(method,)))
    assert any(d.adopted for d in result.report.decisions)

    left = strip(result.model, [method_name(method)]).model

    plain = quantize(tiny.model, tiny.samples, recipe).model
    for a, b in zip(outputs(left, tiny.samples), outputs(plain, tiny.samples), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("saturates", [False, True])
def test_a_file_for_the_runtime_at_hand_is_proven_with_its_defaults(monkeypatch: pytest.MonkeyPatch, *, saturates: bool):
    asked = dict[str, bool]()

    def verify(*_: object, faithful: bool) -> object:
        asked["faithful"] = faithful
        raise StopIteration

    monkeypatch.setattr("onnxcomp.pipeline.verify", verify)
    monkeypatch.setattr("onnxcomp.runtime.saturates", lambda: saturates)
    net, here = mlp(), targets.here()
    assert here == ("ort-x86-avx2" if saturates else "ort-x86")
    for target, block, faithful in (
        (here, 0, False), ("ort-x86", 0, saturates), ("ort-x86-avx2", 0, False), (here, 16, True), ("ort-arm", 0, True),
        ("tensorrt", 0, True),
    ):  # fmt: skip
        bits = "w4" if block else "w8a8"
        with pytest.raises(StopIteration):
            quantize(net.model, net.samples, Recipe(bits=bits, block=block, target=target))  # pyright: ignore[reportArgumentType]
        assert asked == {"faithful": faithful}
