"""Running models and comparing them: what the tests of graph preparation share."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import ModelProto, checker, numpy_helper, parser

from onnxcomp import runtime
from onnxcomp.graph.prepare import Prepared, prepare

Feeds = Mapping[str, np.ndarray]


def parse(text: str, weights: Feeds | None = None, opset: int = 17, domains: str = "") -> ModelProto:
    """A model from ONNX text (graph and functions), whose undefined names are the weights."""
    ir_version = 7 if opset < 15 else 8 if opset < 19 else 10 if opset < 25 else 13
    model = parser.parse_model(f'<ir_version: {ir_version}, opset_import: ["" : {opset}{domains}]> {text}')
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), k) for k, v in (weights or {}).items())
    return model


def run(model: ModelProto, feeds: Feeds, *, optimize: bool = False) -> dict[str, np.ndarray]:
    """The outputs in ONNX Runtime on one thread, by default without its optimizations."""
    return runtime.Session(model.SerializeToString(), optimize=optimize, threads=1).run(feeds)


def prepare_and_compare(model: ModelProto, feeds: Feeds, *, tolerance: float = 0.0) -> Prepared:
    """The prepared model, after checking what always holds of it.

    It passes the full checker, declares the same inputs and outputs (initializers aside), comes out the same twice, and
    gives the same outputs, exactly or within `tolerance`, the input model being left as it was.
    """
    before = model.SerializeToString(deterministic=True)

    prepared = prepare(model, runtime.infer_types)
    again = prepare(model, runtime.infer_types)

    assert model.SerializeToString(deterministic=True) == before
    assert again.model.SerializeToString(deterministic=True) == prepared.model.SerializeToString(deterministic=True)
    checker.check_model(prepared.model, full_check=True)
    stored = {tensor.name for tensor in model.graph.initializer}
    assert list(prepared.model.graph.input) == [v for v in model.graph.input if v.name not in stored]
    assert list(prepared.model.graph.output) == list(model.graph.output)
    wanted, found = run(model, feeds), run(prepared.model, feeds)
    for name, want in wanted.items():
        assert found[name].dtype == want.dtype
        assert found[name].shape == want.shape
        if tolerance == 0.0:
            np.testing.assert_array_equal(found[name], want, name)
        else:
            assert np.max(np.abs(found[name] - want)) <= tolerance, name
    return prepared


def ops(model: ModelProto) -> list[str]:
    """The operators of the main graph, in order."""
    return [node.op_type for node in model.graph.node]


def stored(model: ModelProto) -> dict[str, np.ndarray]:
    """The initializers by name."""
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def types(model: ModelProto) -> dict[str, onnx.TypeProto]:
    """The types of the tensors between nodes, by name."""
    return {value.name: value.type for value in model.graph.value_info}
