"""The laws that hold for every tiny model under every recipe, whatever the methods are."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from equality import assert_same_function, edits, energy, signature
from onnx import ModelProto, TensorProto
from onnx.reference import ReferenceEvaluator
from tiny import SAMPLES, Tiny, build, feeds, models

from onnxcomp import recipe as recipes
from onnxcomp.errors import RecipeError, UnsupportedSite
from onnxcomp.graph.prepare import prepare
from onnxcomp.graph.unsigned import unsigned_weights
from onnxcomp.methods.bias import BiasCompensation
from onnxcomp.methods.noisyquant import NoisyQuant
from onnxcomp.methods.rotation import rotate_folded
from onnxcomp.methods.xint import XInt
from onnxcomp.pipeline import Result, quantize
from onnxcomp.recipe import NAMED, Bits, Recipe, SiteRule
from onnxcomp.runtime import infer_types

Feed = Mapping[str, np.ndarray]

ROOT = Path(__file__).resolve().parents[1]
TINY = models()
RECIPES: dict[str, Recipe] = {
    **NAMED,
    "best-w4a4": replace(NAMED["best"], bits=Bits(4, 4)),
    "offset-w4a4": Recipe("offset", bits=Bits(4, 4), activations="static", compensate=(NoisyQuant(keep="always"),)),
    "xint-static": Recipe(
        "xint-static", bits=Bits(4, 4), compensate=(XInt(activation_terms=2, saturation=2), BiasCompensation())
    ),
    "xint-tensor": Recipe(
        "xint-tensor", bits=Bits(4, 4), activations="token", compensate=(XInt(activation_terms=2, granularity="tensor"),)
    ),
    "blocks": Recipe(
        "blocks", bits=Bits(4, 4), compensate=tuple(BiasCompensation(level=level) for level in ("block", "output"))
    ),
    "w4a4": Recipe("w4a4", bits=Bits(4, 4)),
    "w6a6-minmax": Recipe("w6a6-minmax", bits=Bits(6, 6), ranges="minmax", symmetric=True),
    "w4a8-token": Recipe("w4a8-token", bits=Bits(4, 8), activations="token"),
    "symmetric": Recipe("symmetric", symmetric=True),
    "products": Recipe("products", ranges="percentile", products=True),
    "dynamic": Recipe("dynamic", bits=Bits(8, 6), activations="dynamic"),
    "w4": Recipe("w4", bits=Bits(4, 8), activations="float"),
    "w4-blocks": Recipe("w4-blocks", bits=Bits(4, None), block=32, embeddings=True),
    "w3-blocks": Recipe("w3-blocks", bits=Bits(3, None), block=16, zero_points=True, embeddings=True, compensate=()),
}
NO_DATA = "no-data"

every_model = pytest.mark.parametrize("name", TINY)
every_recipe = pytest.mark.parametrize("how", [*RECIPES, NO_DATA])


@cache
def quantized(name: str, how: str) -> Result:
    """The tiny model under a recipe, quantized once for all the laws."""
    tiny = TINY[name]
    if how == NO_DATA:
        return quantize(tiny.model)
    return quantize(tiny.model, tiny.samples, RECIPES[how])


def run(model: ModelProto, samples: Sequence[Feed], *, optimized: bool) -> list[list[np.ndarray]]:
    """What the runtime makes of every sample."""
    options = ort.SessionOptions()
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [[np.asarray(y) for y in session.run(None, dict(feed))] for feed in samples]


@cache
def float_outputs(name: str) -> list[list[np.ndarray]]:
    return run(TINY[name].model, TINY[name].samples, optimized=False)


@cache
def plain_outputs(name: str, how: str) -> list[list[np.ndarray]]:
    return run(quantized(name, how).model, TINY[name].samples, optimized=False)


@every_recipe
@every_model
def test_the_full_checker_passes(name: str, how: str):
    onnx.checker.check_model(quantized(name, how).model, full_check=True)


@every_recipe
@every_model
def test_inputs_and_outputs_keep_name_type_and_shape(name: str, how: str):
    before, after = TINY[name].model.graph, quantized(name, how).model.graph

    assert [signature(v) for v in after.input] == [signature(v) for v in before.input]
    assert [signature(v) for v in after.output] == [signature(v) for v in before.output]


@every_recipe
@every_model
def test_only_standard_operators_at_the_declared_opset_are_used(name: str, how: str):
    model = quantized(name, how).model

    assert [o.domain for o in model.opset_import] == [""]
    for node in model.graph.node:
        assert node.domain == ""
        assert onnx.defs.has(node.op_type, max_inclusive_version=model.opset_import[0].version)


@every_recipe
@every_model
def test_every_float_tensor_keeps_its_name(name: str, how: str):
    """Of the prepared model, rotated or not: what folding removes is gone before quantization begins."""
    prepared = prepare(TINY[name].model, infer_types)
    floats = prepared.graph
    if how == NO_DATA or RECIPES[how].rotation != "none":
        floats, _ = rotate_folded(floats, prepared.model, TINY[name].samples[0])
    made = {tensor for node in quantized(name, how).model.graph.node for tensor in node.output}
    made |= {tensor.removesuffix("/with-noisyquant") for tensor in made}  # an offset that was folded into what makes it

    assert {tensor.name for node in floats.nodes for tensor in node.outputs} <= made


@every_recipe
@every_model
def test_the_optimized_and_the_plain_runtime_agree(name: str, how: str):
    optimized = run(quantized(name, how).model, TINY[name].samples, optimized=True)

    assert_same_function(optimized, plain_outputs(name, how), float_outputs(name))


@every_recipe
@every_model
def test_the_runtime_agrees_with_the_reference_implementation(name: str, how: str):
    evaluator = ReferenceEvaluator(quantized(name, how).model)

    found = [evaluator.run(None, dict(feed)) for feed in TINY[name].samples]

    assert_same_function([[np.asarray(y) for y in ys] for ys in found], plain_outputs(name, how), float_outputs(name))


@pytest.mark.parametrize(("more", "fewer"), [("base", "w4a4"), ("symmetric", "w6a6-minmax")])
@every_model
def test_more_bits_mean_less_error(name: str, more: str, fewer: str):
    float_ = float_outputs(name)

    errors = [sum(energy(plain_outputs(name, how), float_)) for how in (more, fewer)]

    assert errors[0] < errors[1]


@pytest.mark.parametrize("how", ["w4-blocks", "w3-blocks"])
@every_model
def test_whatever_has_a_weight_in_blocks_has_a_kernel_that_reads_its_codes(name: str, how: str):
    report = quantized(name, how).report

    assert {s.op for s in report.sites if not s.in_blocks and s.kind != "stored"} <= {"Conv"}
    assert {s.kernel for s in report.sites if s.in_blocks} <= {"MatMulNBits", "Gather"}
    assert not any("foretold" in note or "would object" in note for note in report.notes)


@pytest.mark.parametrize("how", ["auto", "base", "bc", "w4a4", "w4a8-token", "products", "dynamic", NO_DATA])
@every_model
def test_whatever_has_quantized_activations_runs_as_an_integer_kernel(name: str, how: str):
    """Symmetric codes are the exception: a ReLU behind a Conv cannot be absorbed by a zero point in the middle."""
    slow = {s.name: s.reason for s in quantized(name, how).report.sites if s.activations != "float" and not s.integer}

    assert slow == {}


@pytest.mark.parametrize("how", ["w4a4", "symmetric"])
@every_model
def test_quantizing_prints_nothing(name: str, how: str, capfd: pytest.CaptureFixture[str]):
    quantize(TINY[name].model, TINY[name].samples, RECIPES[how])

    assert capfd.readouterr() == ("", "")


@every_model
@pytest.mark.parametrize("how", RECIPES)
def test_an_edit_lowers_the_held_out_error_or_is_declined_with_a_reason(name: str, how: str):
    gated = {c.keep for c in RECIPES[how].compensate} == {"if-better"}

    for decision in edits(quantized(name, how)):
        assert decision.reason
        if decision.adopted and gated:
            assert decision.gain_db is not None
            assert decision.gain_db > 0


@every_recipe
@every_model
def test_every_layer_is_in_the_report_once_as_a_site_or_as_skipped(name: str, how: str):
    report = quantized(name, how).report
    weights = {i.name for i in TINY[name].model.graph.initializer}
    layers = [n for n in TINY[name].model.graph.node if n.op_type in ("Conv", "Gemm", "MatMul") and n.input[1] in weights]

    names = [s.name for s in report.sites] + [s.name for s in report.skipped]

    assert len(names) == len(set(names))
    assert {n.name or n.output[0] for n in layers} <= set(names)
    assert all(s.reason for s in report.skipped)
    assert all(s.integer or s.reason for s in report.sites)


@every_model
def test_the_report_holds_the_recipe_that_was_used(name: str):
    report = quantized(name, "base").report

    used = recipes.loads(report.recipe)

    assert replace(used, target=RECIPES["base"].target) == RECIPES["base"]


@pytest.mark.parametrize("how", RECIPES)
def test_a_recipe_written_as_toml_and_read_again_is_the_same(how: str):
    assert recipes.loads(recipes.dumps(RECIPES[how])) == RECIPES[how]


@every_model
def test_without_data_nothing_is_calibrated(name: str):
    report = quantized(name, NO_DATA).report

    assert report.samples == 0
    assert report.data_sha256 is None
    assert {site.activations for site in report.sites} <= {"dynamic", "float"}
    assert edits(quantized(name, NO_DATA)) == []


def test_two_readers_with_their_own_ranges_keep_them_apart():
    """They quantize one tensor twice at one width: the second scale must not take the first one's name."""
    tiny = TINY["transformer"]
    rules = (SiteRule("q", ranges="minmax"), SiteRule("k", ranges="percentile"))

    result = quantize(tiny.model, tiny.samples, Recipe(activations="static", percentile=90.0, site=rules, compensate=()))

    constants = {i.name: onnx.numpy_helper.to_array(i) for i in result.model.graph.initializer}
    makers = {output: node for node in result.model.graph.node for output in node.output}
    readers = {node.name: node for node in result.model.graph.node}
    q, k, v = (float(constants[makers[readers[site].input[0]].input[1]]) for site in "qkv")
    assert k < min(v, q)
    assert v != q


@every_model
def test_the_model_given_is_left_as_it_is(name: str):
    tiny = TINY[name]
    before = tiny.model.SerializeToString(deterministic=True)

    quantize(tiny.model, tiny.samples, RECIPES["w4a4"])

    assert tiny.model.SerializeToString(deterministic=True) == before


@every_model
@pytest.mark.parametrize("how", ["auto", "w4a8-token"])
def test_the_same_seed_gives_the_same_bytes(name: str, how: str):
    again = quantize(TINY[name].model, TINY[name].samples, RECIPES[how])

    assert again.model.SerializeToString() == quantized(name, how).model.SerializeToString()
    assert again.report == quantized(name, how).report


_IN_ANOTHER_PROCESS = """
import hashlib, sys
import onnxcomp
from tiny import models
for name in sys.argv[1:]:
    tiny = models()[name]
    print(hashlib.sha256(onnxcomp.quantize(tiny.model, tiny.samples).model.SerializeToString()).hexdigest())
"""


def test_neither_the_hash_seed_nor_the_process_changes_the_bytes():
    names = ("transformer", "residual", "concat")
    command = [sys.executable, "-c", _IN_ANOTHER_PROCESS, *names]

    digests = set()
    for seed in ("1", "2"):
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": paths}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        digests.add(done.stdout)

    assert len(digests) == 1


@pytest.mark.parametrize("name", [name for name, tiny in TINY.items() if tiny.stacks])
@pytest.mark.parametrize("how", ["auto", "w4a4"])
def test_the_batch_size_of_the_data_changes_nothing(name: str, how: str):
    tiny = TINY[name]

    stacked = quantize(tiny.model, tiny.stacked(5), RECIPES[how])

    assert stacked.report.samples == SAMPLES
    assert stacked.model.graph == quantized(name, how).model.graph


@pytest.mark.parametrize("name", ["mlp", "conv_bn"])
def test_a_generator_of_feeds_is_as_good_as_a_list(name: str):
    tiny = TINY[name]

    result = quantize(tiny.model, (feed for feed in tiny.samples), RECIPES["base"])

    assert result.model.graph == quantized(name, "base").model.graph


@pytest.mark.parametrize("name", ["mlp", "conv_bn", "embedding"])
def test_one_array_feeds_a_model_of_one_input(name: str):
    tiny = TINY[name]
    (key,) = tiny.samples[0]

    result = quantize(tiny.model, np.concatenate([feed[key] for feed in tiny.samples]), RECIPES["base"])

    assert result.model.graph == quantized(name, "base").model.graph


def exact(op: str) -> Tiny:
    """A layer on 8-bit codes of a power of two: weights and inputs lie on the quantizers' own grids."""
    rng = np.random.default_rng(0)
    shape = {"MatMul": "N,8", "Conv": "N,8,4,4"}[op]
    text = f"exact (float[{shape}] x) => (float[{shape}] y) {{ [layer] y = {op}(x, w) }}"
    w = rng.integers(-127, 128, size=(8, 8, 1, 1)).astype(np.float32)
    w[0], w[:, 0] = 127, 127
    samples = feeds(rng, *(8, 4, 4) if op == "Conv" else (8,))
    for feed in samples:
        feed["x"] = rng.integers(0, 256, size=feed["x"].shape).astype(np.float32) / 64
        feed["x"].flat[:2] = 0, 255 / 64
    return build(
        "exact",
        f'<ir_version: 10, opset_import: ["" : 21]> {text}',
        {"w": (w if op == "Conv" else w[:, :, 0, 0]) / 256},
        samples,
    )


@pytest.mark.parametrize("keep", ["if-better", "always"])
def test_where_there_is_nothing_to_fix_nothing_changes(keep: str):
    tiny = exact("MatMul")
    compensate = tuple(replace(method, keep=keep) for method in NAMED["auto"].compensate)
    recipe = Recipe(ranges="minmax", target="ort-x86", compensate=compensate)

    result = quantize(tiny.model, tiny.samples, recipe)
    bare = quantize(tiny.model, tiny.samples, replace(recipe, compensate=()))

    assert not any(d.adopted for d in edits(result))
    assert result.model.graph == bare.model.graph
    # Products of integers below 2^24 over powers of two are exact in float32.
    found = run(unsigned_weights(result.model), tiny.samples, optimized=False)
    assert energy(found, run(tiny.model, tiny.samples, optimized=False)) == [0]


def test_an_operator_that_is_no_site_is_refused_by_name():
    tiny = TINY["transformer"]

    with pytest.raises(UnsupportedSite) as caught:
        quantize(tiny.model, tiny.samples, Recipe(include=("norm1",)))

    assert str(caught.value) == (
        "norm1: it is no Conv, Gemm or MatMul with a constant weight, so it cannot be quantized. Leave 'norm1' out of include."
    )


def test_a_pattern_that_matches_nothing_is_refused_with_a_suggestion():
    tiny = TINY["transformer"]

    with pytest.raises(RecipeError, match=r"^Pattern 'prjo' matches no site\. Did you mean 'proj'\?$"):
        quantize(tiny.model, tiny.samples, Recipe(exclude=("prjo",)))


def test_an_excluded_site_keeps_its_float_weight():
    tiny = TINY["mlp"]

    result = quantize(tiny.model, tiny.samples, Recipe(exclude=("fc2",)))

    kept = {i.name: i for i in result.model.graph.initializer if i.data_type == TensorProto.FLOAT}
    (original,) = (i for i in tiny.model.graph.initializer if i.name == "w2")
    assert np.array_equal(onnx.numpy_helper.to_array(kept["w2"]), onnx.numpy_helper.to_array(original))
    assert [s.name for s in result.report.sites if s.kind == "layer"] == ["fc1"]
