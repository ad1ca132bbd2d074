"""Weights as unsigned codes compute the same, on any CPU, with optimizations and without."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from equality import energy
from onnx import ModelProto, TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from tiny import models

from onnxcomp.graph.unsigned import unsigned_weights
from onnxcomp.pipeline import quantize
from onnxcomp.recipe import Bits, Recipe
from onnxcomp.runtime import saturates

TINY = models()


def quantized(name: str, **recipe: object) -> ModelProto:
    return quantize(TINY[name].model, TINY[name].samples, Recipe(**recipe)).model  # pyright: ignore[reportArgumentType]


def signed_weights(model: ModelProto) -> set[str]:
    """The int8 tensors that layers multiply with."""
    stored = {t.name for t in model.graph.initializer if t.data_type == TensorProto.INT8}
    return stored & {name for node in model.graph.node for name in node.input[:2] if node.op_type != "QuantizeLinear"}


@pytest.mark.parametrize("level", ["all", "none"])
@pytest.mark.parametrize("name", ["transformer", "residual", "shared", "embedding", "depthwise", "gemm"])
def test_the_model_computes_the_same(name: str, level: str):
    model = quantized(name, target="ort-x86")
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(
        ort.GraphOptimizationLevel, f"ORT_{'ENABLE' if level == 'all' else 'DISABLE'}_ALL"
    )

    made = unsigned_weights(model)

    # What is left, if anything, is of a Conv that computes in float.
    assert signed_weights(made) < signed_weights(model)
    session = ort.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds, evaluator = [dict(feed) for feed in TINY[name].samples], ReferenceEvaluator(model)
    found, wanted = [session.run(None, feed) for feed in feeds], [evaluator.run(None, feed) for feed in feeds]
    noise, signal = (sum(energy(found, other)) for other in (wanted, [[0 * y for y in ys] for ys in wanted]))
    assert noise <= 1e-10 * signal  # the rounding of float32 alone


def test_the_model_given_is_left_as_it_is():
    model = quantized("mlp", target="ort-x86")
    before = model.SerializeToString(deterministic=True)

    assert unsigned_weights(model) is not model
    assert model.SerializeToString(deterministic=True) == before


def test_codes_and_zero_points_are_128_higher():
    model = quantized("mlp", target="openvino")

    made = unsigned_weights(model)

    before, after = ({t.name: numpy_helper.to_array(t) for t in m.graph.initializer} for m in (model, made))
    makers = {node.output[0]: node for node in made.graph.node}
    old = {node.output[0]: node for node in model.graph.node}
    layers = [node for node in made.graph.node if node.op_type == "MatMul"]
    assert layers
    for layer in layers:
        codes, scale, zero = (after[name] for name in makers[layer.input[1]].input)
        np.testing.assert_array_equal(codes.astype(int) - 128, before[old[layer.input[1]].input[0]])
        assert (codes.dtype, zero.dtype, zero.shape) == (np.uint8, np.uint8, scale.shape)
        assert (zero == 128).all()


@pytest.mark.parametrize("recipe", [{"target": "ort-arm"}, {"bits": Bits(8, None), "block": 16, "compensate": ()}])
def test_signed_activations_and_weights_in_blocks_are_left(recipe: dict[str, object]):
    model = quantized("mlp", **recipe)

    assert unsigned_weights(model) is model


def test_a_float_model_is_left():
    assert unsigned_weights(TINY["mlp"].model) is TINY["mlp"].model


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="the CPU's features are read from Linux")
def test_a_cpu_saturates_that_has_no_instructions_for_it():
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")

    assert saturates() == ("avx2" in flags and "vnni" not in flags)
