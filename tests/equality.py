"""Running models and comparing them: what the tests of graph preparation share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import ModelProto, ValueInfoProto, checker, numpy_helper, parser
from tiny import Tiny

from onnxcomp import runtime
from onnxcomp.graph.prepare import Prepared, prepare
from onnxcomp.pipeline import Result
from onnxcomp.report.model import Decision

Feeds = Mapping[str, np.ndarray]


def edits(result: Result) -> list[Decision]:
    """What was decided, but for the codes that have to be others on a CPU without VNNI."""
    return [d for d in result.report.decisions if d.method != "saturation"]


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


def energy(left: Sequence[Sequence[np.ndarray]], right: Sequence[Sequence[np.ndarray]]) -> list[float]:
    """Squared difference, per output, over all samples."""
    pairs = zip(left, right, strict=True)
    differences = [[np.square(np.float64(a) - b).sum() for a, b in zip(x, y, strict=True)] for x, y in pairs]
    return [float(column) for column in np.sum(differences, axis=0)]


def assert_same_function(
    found: Sequence[Sequence[np.ndarray]], plain: Sequence[Sequence[np.ndarray]], reference: Sequence[Sequence[np.ndarray]]
) -> None:
    """Two runtimes may round a sum to two sides of a code's edge. Such a flip costs one step at one value, where
    quantization costs up to half a step at every value: so they differ by less than quantization itself does.

    What one runtime found, what another, and what the float model gives: the outputs of every sample.
    """
    signal = energy(reference, [[0 * y for y in ys] for ys in reference])
    for difference, error, power in zip(energy(found, plain), energy(plain, reference), signal, strict=True):
        # Where nothing is lost by quantizing, float32 sums of at most 100 terms: (100 * 2^-24)^2 of the signal.
        assert difference <= max(error, (100 * 2.0**-24) ** 2 * power)


def fitting(tiny: Tiny) -> list[dict[str, np.ndarray]]:
    """Some samples that every file takes: of the shape of the first, at which axes may be fixed."""
    return [s for s in tiny.samples if s["x"].shape == tiny.samples[0]["x"].shape][:3]


def of_opset_21(model: ModelProto) -> ModelProto:
    """The model as it was before its opset was lowered: the reference implementation knows DequantizeLinear from 19 on."""
    newer = ModelProto()
    newer.CopyFrom(model)
    newer.opset_import[0].version, newer.ir_version = 21, 10
    return newer


def signature(value: ValueInfoProto) -> tuple[str, int, list[int | str]]:
    """Name, element type and dimensions."""
    tensor = value.type.tensor_type
    return value.name, tensor.elem_type, [d.dim_param or d.dim_value for d in tensor.shape.dim]
