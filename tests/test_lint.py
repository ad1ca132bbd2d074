"""Linting any ONNX file, on the command line too; and which targets there are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import ModelProto, numpy_helper, parser
from tiny import Tiny, models

from onnxcomp import cli, recipe as recipes, runtime, targets
from onnxcomp.errors import ModelError, RecipeError, UsageError
from onnxcomp.lint import lint
from onnxcomp.pipeline import quantize
from onnxcomp.recipe import Bits, Recipe

TINY = models()
HEADER = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>'
CODES = "Codes of type uint8 are refused, or taken for int8."
ONE_INPUT = "Its input 'w' is not quantized, so it is computed in float."


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.main, [str(a) for a in arguments], prog_name="onnxcomp")


def save(path: Path, body: str, **weights: np.ndarray) -> Path:
    """A model on x [2, 4] that makes y [2, 4]."""
    model = parser.parse_model(f"{HEADER} net (float[2,4] x) => (float[2,4] y) {{ {body} }}")
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items())
    onnx.save(model, path)
    return path


SCALE = {"s": np.float32(0.5), "z": np.uint8(0)}
QUANTIZED = "c = QuantizeLinear(x, s, z)  a = DequantizeLinear(c, s, z)"


@pytest.fixture
def half_quantized(tmp_path: Path) -> Path:
    """A MatMul of codes and float: nodes without names or with one name, the weight a Constant node."""
    weight = "w = Constant<value = float[4,4] {1,0,0,0, 0,1,0,0, 0,0,1,0, 0,0,0,1}>()"
    body = f"{weight} [same] c = QuantizeLinear(x, s, z) [same] a = DequantizeLinear(c, s, z) y = MatMul(a, w)"
    return save(tmp_path / "half.onnx", body, **SCALE)


def test_nodes_without_a_name_of_their_own_are_called_after_what_they_make(half_quantized: Path):
    found = lint(half_quantized, "ort-x86")

    assert [(v.node, v.op, v.rule) for v in found.violations] == [("y", "MatMul", "float-operand")]
    assert [(k.site, k.op, k.integer, k.reason) for k in found.kernels] == [
        ("y", "MatMul", False, "Its weight 'w' is not quantized.")
    ]
    assert found.notes == ()


def test_the_answer_as_text_is_a_line_and_a_table(half_quantized: Path):
    found = run("lint", half_quantized, "--target", "portable")

    assert (found.exit_code, found.stderr) == (0, "")
    assert found.stdout == (
        f"{half_quantized} for portable: 1 broken rule, 0 of 1 quantized layer on integers\n\n"
        "Node  Operator  Rule            What, and what to do\n"
        f"y     MatMul    half-quantized  {ONE_INPUT} Quantize both of its factors.\n"
    )


def test_the_answer_as_json_holds_every_violation_and_kernel(half_quantized: Path):
    found = run("lint", half_quantized, "--target", "tensorrt", "--json")

    answer = json.loads(found.stdout)
    assert (answer["path"], answer["target"], answer["notes"]) == (str(half_quantized), "tensorrt", [])
    assert [(v["node"], v["rule"]) for v in answer["violations"]] == [
        ("same", "unsupported-codes"), ("a", "unsupported-codes"), ("y", "half-quantized"),
    ]  # fmt: skip
    assert answer["violations"][0] | {"node": ""} == {
        "node": "", "op": "QuantizeLinear", "rule": "unsupported-codes", "reason": CODES, "remedy": "Use symmetric int8.",
    }  # fmt: skip
    assert answer["kernels"] == [{"site": "y", "op": "MatMul", "integer": False, "reason": ONE_INPUT}]


@pytest.mark.parametrize("form", [(), ("--json",)], ids=["text", "json"])
def test_strict_prints_the_same_answer_and_leaves_with_6(half_quantized: Path, form: tuple[str, ...]):
    easy, strict = (run("lint", half_quantized, "--target", "portable", *form, *more) for more in ((), ("--strict",)))

    assert (easy.exit_code, strict.exit_code) == (0, 6)
    assert strict.stdout == easy.stdout
    assert strict.stderr == ""


def test_strict_leaves_with_0_where_nothing_is_broken(tmp_path: Path):
    clean = save(tmp_path / "clean.onnx", f"{QUANTIZED} y = Relu(a)", **SCALE)

    found = run("lint", clean, "--target", "portable", "--strict")

    assert (found.exit_code, found.stdout) == (
        0,
        f"{clean} for portable: 0 broken rules, 0 of 0 quantized layers on integers\n",
    )


def test_a_file_that_onnx_runtime_cannot_load_is_judged_by_the_types_in_it(tmp_path: Path):
    unknown = save(tmp_path / "unknown.onnx", f"{QUANTIZED} [odd] y = com.microsoft.NoSuchOperator(a)", **SCALE)

    found = run("lint", unknown, "--target", "portable", "--json")

    answer = json.loads(found.stdout)
    assert [(v["node"], v["rule"]) for v in answer["violations"]] == [("odd", "foreign-operator")]
    (note,) = answer["notes"]
    assert note.startswith("Types and shapes are those in the file. ONNX Runtime cannot load the model: ")
    assert found.stderr == f"{note}\n"
    assert found.exit_code == 0


def test_a_file_that_is_no_model_and_a_target_that_is_none_are_errors(tmp_path: Path):
    (tmp_path / "text.onnx").write_text("no model")

    with pytest.raises(ModelError, match=r"text\.onnx"):
        lint(tmp_path / "text.onnx")
    found = run("lint", tmp_path / "text.onnx", "--target", "qnm")
    assert (found.exit_code, found.stderr) == (2, "RecipeError: Unknown target 'qnm'. Did you mean 'qnn'?\n")


def test_a_float_model_breaks_no_rule_of_onnx_runtime(tmp_path: Path):
    onnx.save(TINY["residual"].model, tmp_path / "float.onnx")

    found = lint(tmp_path / "float.onnx", "ort-x86")

    assert (found.violations, found.kernels) == ((), ())


# --- targets ---------------------------------------------------------------------------------------------------------


def test_the_targets_are_listed_with_what_they_take():
    answer = json.loads(run("targets", "--json").stdout)

    assert [target["name"] for target in answer] == list(targets.names())
    assert all(target["summary"] and target["needs"] for target in answer)
    takes = {target["name"]: target["takes"] for target in answer}
    assert takes["ort-x86"] == (
        "activations uint8, ranges fixed, dynamic, token; narrow weights stored as 2 to 6 bits each, "
        "or in blocks of 16, 32, 64, 128 beside float activations; bias int32"
    )
    assert takes["tensorrt"] == (
        "activations int8, symmetric, ranges fixed, token; narrow weights stored as int8, "
        "or in blocks of 64, 128 beside float activations; bias float; float16"
    )
    assert takes["qnn"] == (
        "activations uint8 or uint16, ranges fixed; narrow weights stored as int4; bias int32; fixed shapes"
    )


def test_the_list_says_which_target_this_machine_is():
    found = run("targets")

    marked = [line for line in found.stdout.splitlines() if line.endswith("(this machine)")]
    assert [line.split()[0] for line in marked] == [targets.here()]


# --- what a target does not take -------------------------------------------------------------------------------------


def refused(tiny: Tiny, recipe: Recipe, *, data: bool = True) -> str:
    with pytest.raises(RecipeError) as caught:
        quantize(tiny.model, tiny.samples if data else None, recipe)
    return str(caught.value)


@pytest.mark.parametrize(
    ("target", "activations"),
    [("portable", "dynamic"), ("qnn", "token"), ("nnapi", "dynamic"), ("xnnpack", "token"), ("tensorrt", "dynamic")],
)
def test_ranges_at_run_time_are_refused_where_the_target_has_none(target: str, activations: str):
    text = refused(TINY["linear"], Recipe(target=target, activations=activations))

    assert text == f"{target} takes no ranges measured at run time ('{activations}'). Calibrate with --data."


@pytest.mark.parametrize("target", [name for name in targets.names() if name != "qnn"])
def test_activations_of_16_bits_are_refused_but_for_qnn(target: str):
    text = refused(TINY["linear"], Recipe(target=target, bits=Bits(8, 16)))

    assert text == f"{target} takes activations of 2 to 8 bits, not 16."


def test_weights_of_16_bits_are_no_bits():
    with pytest.raises(RecipeError) as caught:
        Bits.parse("w16a8")

    assert str(caught.value) == ("bits = 'w16a8' is not understood. Write wXaY, X and Y from 2 to 8 (or Y 16), such as w4a8.")


@pytest.mark.parametrize("target", ["portable", "qnn"])
def test_without_data_a_target_of_fixed_ranges_gets_float_activations(target: str):
    result = quantize(TINY["mlp"].model, None, Recipe(target=target))

    assert {site.activations for site in result.report.sites} == {"float"}


def test_without_data_tensorrt_measures_a_range_per_token():
    result = quantize(TINY["mlp"].model, None, Recipe(target="tensorrt"))

    assert {site.activations for site in result.report.sites} == {"token"}


# --- options ---------------------------------------------------------------------------------------------------------


def test_half_is_a_key_of_a_recipe_and_an_option(tmp_path: Path):
    recipe = Recipe("fast", target="tensorrt", half=True)
    onnx.save(TINY["linear"].model, tmp_path / "m.onnx")
    np.savez(tmp_path / "data.npz", x=np.concatenate([feed["x"] for feed in TINY["linear"].samples]))

    assert recipes.loads(recipes.dumps(recipe)) == recipe
    path = tmp_path / "fast.toml"
    path.write_text(recipes.dumps(replace(recipe, half=False)), encoding="utf-8")
    found = run(
        "quantize", tmp_path / "m.onnx", "--data", tmp_path / "data.npz", "--recipe", path, "--half", "-o", tmp_path / "q"
    )

    assert found.exit_code == 0, found.stderr
    assert onnx.TensorProto.FLOAT16 in kinds(onnx.load(tmp_path / "q"))


def kinds(model: ModelProto) -> set[int]:
    return {tensor.data_type for tensor in model.graph.initializer}


def test_half_on_a_target_without_it_is_an_error_of_usage(tmp_path: Path):
    onnx.save(TINY["linear"].model, tmp_path / "m.onnx")

    found = run("quantize", tmp_path / "m.onnx", "--target", "ort-x86", "--half")

    text = "RecipeError: ort-x86 takes no float16 beside codes. Leave --half out, or use --target tensorrt."
    assert (found.exit_code, found.stderr.splitlines()[-1]) == (2, text)
    assert list(tmp_path.iterdir()) == [tmp_path / "m.onnx"]


def test_an_execution_provider_that_is_not_there_is_an_error_of_usage(tmp_path: Path):
    onnx.save(TINY["linear"].model, tmp_path / "m.onnx")

    found = run("bench", tmp_path / "m.onnx", "--provider", "npu")

    text = r"^UsageError: The installed ONNX Runtime has no execution provider 'npu', only: .*\bcpu\b.*\.$"
    assert found.exit_code == 2
    with pytest.raises(UsageError, match=text.replace("UsageError: ", "")), runtime.provider("npu"):
        pass


def test_a_provider_holds_for_the_command_alone(tmp_path: Path):
    onnx.save(TINY["linear"].model, tmp_path / "m.onnx")

    with runtime.provider("CPU"):
        inside = runtime.Session(tmp_path / "m.onnx").native.get_providers()

    assert inside == ["CPUExecutionProvider"]
    found = run("bench", tmp_path / "m.onnx", "--shape", "x=1x16", "--provider", "cpu", "--rounds", 1)
    assert found.exit_code == 0, found.stderr
