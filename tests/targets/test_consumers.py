"""Every method's file, as every target writes it, means the same to runtimes that have never heard of this library."""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny
from equality import fitting, of_opset_21, parse, run
from onnx.reference import ReferenceEvaluator

from onnxcomp import targets
from onnxcomp.errors import VerificationError
from onnxcomp.methods.base import Compensation
from onnxcomp.methods.bias import BiasCompensation
from onnxcomp.methods.nbc import NonlinearBipolarCompensation
from onnxcomp.methods.noisyquant import NoisyQuant
from onnxcomp.methods.xint import XInt
from onnxcomp.numerics.arrays import energies, sqnr_db
from onnxcomp.pipeline import quantize
from onnxcomp.recipe import Bits, Recipe
from onnxcomp.targets import openvino

TINY = tiny.models()
METHODS: dict[str, Compensation] = {
    "bias": BiasCompensation(keep="always"),
    "channels": BiasCompensation(keep="always", tokens=False),
    "block": BiasCompensation(keep="always", level="block"),
    "output": BiasCompensation(keep="always", level="output"),
    "nbc": NonlinearBipolarCompensation(keep="always"),
    "nbc-int8": NonlinearBipolarCompensation(keep="always", weight="int8"),
    "nbc-low-rank": NonlinearBipolarCompensation(keep="always", weight="low-rank"),
    "uniform": NoisyQuant(keep="always", mode="uniform"),
    "offset": NoisyQuant(keep="always"),
    "xint": XInt(keep="always", activation_terms=2),
}
TOGETHER = (NoisyQuant(), XInt(budget=1.2), BiasCompensation(), NonlinearBipolarCompensation())
LEAST_DB = 45.0
"""What codes leave that fall the other way where a float sum is added up in another order, some of a thousand at 8 bits."""
CASES = itertools.product(targets.names(), ("transformer", "residual"), (*METHODS, "together"))
Feeds = list[dict[str, np.ndarray]]
every_file = pytest.mark.parametrize(("target", "name", "how"), list(CASES))


@cache
def written(
    target: str, name: str, how: str
) -> tuple[onnx.ModelProto, list[dict[str, np.ndarray]], list[dict[str, np.ndarray]]]:
    """The file, samples that it takes, and what ONNX Runtime without optimizations makes of them."""
    compensate = TOGETHER if how == "together" else (METHODS[how],)
    model = quantize(TINY[name].model, TINY[name].samples, Recipe(bits=Bits(4, 8), target=target, compensate=compensate)).model
    feeds = fitting(TINY[name])
    return model, feeds, [run(model, feed) for feed in feeds]


def agreement(want: Feeds, found: Feeds) -> float:
    pairs = [energies(a[key], b[key]) for a, b in zip(want, found, strict=True) for key in a]
    return sqnr_db(sum(signal for signal, _ in pairs), sum(noise for _, noise in pairs))


@every_file
def test_the_reference_implementation_computes_the_same(target: str, name: str, how: str):
    model, feeds, want = written(target, name, how)
    evaluator, outputs = ReferenceEvaluator(of_opset_21(model)), [output.name for output in model.graph.output]

    found = [dict(zip(outputs, map(np.asarray, evaluator.run(None, dict(feed))), strict=True)) for feed in feeds]

    assert agreement(want, found) > LEAST_DB


@pytest.mark.skipif(not openvino.is_installed(), reason="needs OpenVINO: pip install 'onnxcomp[openvino]'")
@every_file
def test_openvino_computes_the_same(target: str, name: str, how: str, tmp_path: Path):
    model, feeds, want = written(target, name, how)
    onnx.save(model, tmp_path / "model.onnx")
    compiled = openvino.compile_model(tmp_path / "model.onnx")

    assert agreement(want, [openvino.run(compiled, feed) for feed in feeds]) > LEAST_DB


def test_a_model_that_openvino_does_not_take_is_one_line():
    text = """g (double[N,16] x) => (double[N,8] y) { c = Cast<to = 1>(x) d = MatMul(c, w) y = Cast<to = 11>(d) }"""
    model = parse(text, {"w": np.ones((16, 8), np.float32)}, opset=17)
    data = np.random.default_rng(0).normal(size=(16, 16))

    with pytest.raises(VerificationError, match=r"^openvino 20\S+ does not take the model: .*f64.*\. Nothing was written\.$"):
        quantize(model, data, Recipe(target="openvino"))
