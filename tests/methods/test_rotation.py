"""Rotation: the rotated model equals the float one, its outliers are gone, and what is not worth it is left alone."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
from onnx import ModelProto, numpy_helper

from onnxcomp.graph.convert import to_model
from onnxcomp.graph.edit import Graph
from onnxcomp.graph.prepare import Prepared, prepare
from onnxcomp.graph.sites import find_sites
from onnxcomp.methods import rotation
from onnxcomp.methods.rotation import rotate_folded, rotate_inputs
from onnxcomp.numerics.arrays import energies, sqnr_db
from onnxcomp.runtime import Session, infer_types

TRANSFORMER = tiny.transformer()
FEED = TRANSFORMER.samples[0]


def prepared(proto: ModelProto = TRANSFORMER.model) -> Prepared:
    return prepare(proto, infer_types)


def with_head(text: str = "embed") -> tiny.Tiny:
    """The transformer behind an embedding, so that nothing of its stream is an input."""
    proto = ModelProto()
    proto.CopyFrom(TRANSFORMER.model)
    rng = np.random.default_rng(5)
    outlier = tiny.weight(rng, 16, 16, fan_in=16)
    outlier[:, 3] *= 40
    proto.graph.initializer.append(numpy_helper.from_array(outlier, text))
    node = proto.graph.node.add(op_type="MatMul", name="embedding", input=["x", text], output=["embedded"])
    proto.graph.node.remove(node)
    proto.graph.node.insert(0, node)
    for other in proto.graph.node[1:]:
        other.input[:] = ["embedded" if name == "x" else name for name in other.input]
    return tiny.Tiny("embedded", proto, TRANSFORMER.samples)


def outputs(graph: Graph, like: ModelProto) -> dict[str, np.ndarray]:
    return Session(to_model(graph, like).SerializeToString()).run(FEED)


def agreement(p: Prepared, rotated: Graph) -> float:
    want, found = outputs(p.graph, p.model)["y"], outputs(rotated, p.model)["y"]
    return sqnr_db(*energies(want, found))


def test_the_rotated_model_equals_the_float_one():
    p = prepared(with_head().model)
    rotated, notes = rotate_folded(p.graph, p.model, FEED)
    assert agreement(p, rotated) > rotation.EQUAL_DB
    assert len(notes) == 1
    assert notes[0].startswith("Residual streams rotated: 1, attention layers: 1; equal to ")


def test_an_outlier_channel_of_the_stream_is_spread():
    p = prepared(with_head().model)
    rotated, _ = rotate_folded(p.graph, p.model, FEED)

    def peak(graph: Graph) -> float:
        w = next(node for node in graph.nodes if node.name == "embedding").inputs[1].values
        columns = np.linalg.norm(w, axis=0)
        return float(columns.max() / columns.mean())

    # one of 16 channels holds nearly everything: 16 times the mean before; spread over all, less than 3 times it
    assert peak(p.graph) > 10
    assert peak(rotated) < 3


def test_a_norm_keeps_neither_scale_nor_shift():
    p = prepared(with_head().model)
    rotated, _ = rotate_folded(p.graph, p.model, FEED)
    norms = [node for node in rotated.nodes if node.op == "LayerNormalization"]
    assert len(norms) == 3
    for node in norms:
        assert len(node.inputs) == 2
        assert (node.inputs[1].values == 1).all()


def test_the_values_of_each_head_are_mixed_among_themselves():
    p = prepared()
    rotated, notes = rotate_folded(p.graph, p.model, FEED)
    assert agreement(p, rotated) > rotation.EQUAL_DB
    assert notes[0] == "Residual streams not rotated: 1. The first, because 'x' is an input of the model."
    assert notes[1].startswith("Residual streams rotated: 0, attention layers: 1; equal to ")
    before, after = (next(n for n in g.nodes if n.name == "v").inputs[1].values for g in (p.graph, rotated))
    assert not np.array_equal(before, after)
    for head in (slice(0, 8), slice(8, 16)):
        # an orthogonal mix within the head: its energy per row stays, up to float32 rounding of 8 products
        np.testing.assert_allclose(np.square(before[:, head]).sum(1), np.square(after[:, head]).sum(1), rtol=1e-5)


def test_the_graph_that_is_given_stays_as_it_was():
    p = prepared(with_head().model)
    before = to_model(p.graph, p.model).SerializeToString(deterministic=True)
    rotate_folded(p.graph, p.model, FEED)
    assert to_model(p.graph, p.model).SerializeToString(deterministic=True) == before


def test_a_result_that_is_not_equal_is_dropped(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rotation, "EQUAL_DB", 199.0)  # beyond float32
    p = prepared(with_head().model)
    same, notes = rotate_folded(p.graph, p.model, FEED)
    assert same is p.graph
    assert notes[-1].startswith("Nothing is rotated: the rotated model agrees to ")


def mlp_with_outliers() -> tiny.Tiny:
    """fc2 of the tiny MLP reads one channel of far larger values."""
    small = tiny.mlp()
    for tensor in small.model.graph.initializer:
        if tensor.name == "w1":
            w = numpy_helper.to_array(tensor).copy()
            w[:, 0] *= 16
            tensor.CopyFrom(numpy_helper.from_array(w, "w1"))
    return small


def test_an_input_with_outliers_is_mixed_and_the_model_stays_equal():
    p = prepared(mlp_with_outliers().model)
    graph, feed = p.graph.copy(), mlp_with_outliers().stacked(12)[0]
    sites, found = rotate_inputs(graph, p.model, find_sites(graph), {"fc1": 4, "fc2": 4}, feed)
    assert list(found) == ["fc2"]  # fc1 reads the model's input, which no activation made
    assert found["fc2"].gain_db is not None
    assert found["fc2"].gain_db > rotation.INPUT_GAIN_DB
    assert found["fc2"].reason == "mixing lowers the input's error by the 1 dB that it must for its time"
    assert next(s for s in sites if s.name == "fc2").x == "fc2/rotation/reshape-2"
    want, got = (Session(to_model(g, p.model).SerializeToString()).run(feed)["y"] for g in (p.graph, graph))
    assert sqnr_db(*energies(want, got)) > rotation.EQUAL_DB


def test_the_matrix_in_front_of_a_layer_is_no_layer_itself():
    p = prepared(mlp_with_outliers().model)
    graph, feed = p.graph.copy(), mlp_with_outliers().stacked(12)[0]
    rotate_inputs(graph, p.model, find_sites(graph), {"fc1": 4, "fc2": 4}, feed)
    assert [site.name for site in find_sites(graph)] == ["fc1", "fc2"]


def test_an_input_that_gains_too_little_is_left_alone():
    p = prepared(tiny.mlp().model)
    graph, feed = p.graph.copy(), tiny.mlp().stacked(12)[0]
    sites, found = rotate_inputs(graph, p.model, find_sites(graph), {"fc1": 8, "fc2": 8}, feed)
    assert found["fc2"].fit is None
    assert found["fc2"].reason == "mixing does not lower the input's error by the 16 dB that it must for its time"
    assert sites == find_sites(graph)
    assert len(graph.nodes) == len(p.graph.nodes)
