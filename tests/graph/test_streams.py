"""Residual streams and attention heads: what belongs to one, what writes and reads it, and why some are left alone."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
from equality import parse
from onnx import ModelProto

from onnxcomp.graph.prepare import prepare
from onnxcomp.graph.streams import Stream, find_streams
from onnxcomp.runtime import infer_types

RNG = np.random.default_rng(0)
WEIGHTS = {
    "embed": tiny.weight(RNG, 16, 8, fan_in=16), "shift": tiny.bias(RNG, 8), "positions": tiny.bias(RNG, 5, 8),
    "gain": tiny.bias(RNG, 8), "b": tiny.bias(RNG, 8), "gain2": tiny.bias(RNG, 8), "index": np.arange(5),
    "w1": tiny.weight(RNG, 8, 32, fan_in=8), "w2": tiny.weight(RNG, 32, 8, fan_in=32), "wh": tiny.weight(RNG, 8, 10, fan_in=8),
    "table": tiny.weight(RNG, 20, 8, fan_in=1), "two": np.float32(2), "eps": np.float32(1e-5), "last": np.array([-1]),
    "tokens": np.array([1]),
}  # fmt: skip
LAYER_NORMS = """ [norm1] n1 = LayerNormalization<axis = -1>(p, gain, b)
    [fc1] h = MatMul(n1, w1)
    g = Relu(h)
    [fc2] m = MatMul(g, w2)
    r = Add(p, m)
    [norm2] n2 = LayerNormalization<axis = -1>(r, gain2)
    t = Gather<axis = 1>(n2, index)
    [head] y = MatMul(t, wh) }"""
RMS_NORM = """ s = Pow(p, two)
    v = ReduceMean<keepdims = 1>(s, last)
    ve = Add(v, eps)
    d = Sqrt(ve)
    n = Div(p, d)
    [scale] z = Mul(n, gain)
    [head] y = MatMul(z, wh) }"""
PATCHES = "g (float[N,5,16] x) => (float[N,5,10] y) { e = MatMul(x, embed) eb = Add(e, shift) p = Add(eb, positions)"
TEXT = "g (int64[N,T] x) => (float[N,T,10] y) { p = Gather(table, x)"


def build(text: str) -> ModelProto:
    return parse(text, {k: v for k, v in WEIGHTS.items() if any(f"{a}{k}{b}" in text for a in "( " for b in ",)")}, opset=18)


def streams(proto: ModelProto) -> list[Stream]:
    return find_streams(prepare(proto, infer_types).graph)


def constants(stream: Stream) -> set[str]:
    return {node.inputs[index].name for node, index, _ in stream.written}


def norms(stream: Stream) -> list[tuple[str, list[str]]]:
    return [(node.name, [layer.name for layer in layers]) for node, layers in stream.norms]


def test_a_pre_norm_transformer_has_one_stream_from_its_embedding_to_its_head():
    (stream,) = streams(build(PATCHES + LAYER_NORMS))
    assert (stream.width, stream.refusal) == (8, "")
    assert constants(stream) == {"embed", "shift", "positions", "w2"}
    assert sorted(norms(stream)) == [("norm1", ["fc1"]), ("norm2", ["head"])]


def test_an_rms_norm_in_primitive_operators_is_seen_through():
    (stream,) = streams(build(TEXT + RMS_NORM))
    assert (stream.width, stream.refusal) == (8, "")
    assert constants(stream) == {"table"}
    assert norms(stream) == [("scale", ["head"])]


def test_a_layer_may_read_the_stream_without_a_norm():
    (stream,) = streams(
        build(PATCHES + LAYER_NORMS.replace("MatMul(g, w2)", "MatMul(k, w2) [own] o = MatMul(p, w1) k = Add(g, o)"))
    )
    assert [node.name for node in stream.read] == ["own"]


def test_the_mean_over_tokens_may_end_the_stream():
    ended = LAYER_NORMS.replace("[norm2] n2 = LayerNormalization<axis = -1>(r, gain2)", "")
    ended = ended.replace("t = Gather<axis = 1>(n2, index)", "t = ReduceMean<keepdims = 0>(r, tokens)")
    (stream,) = streams(build(PATCHES.replace("float[N,5,10] y", "float[N,10] y") + ended))
    assert (stream.refusal, [node.name for node in stream.read]) == ("", ["head"])


REFUSED = [
    (PATCHES + LAYER_NORMS,
     ("r = Add(p, m)", "k = ReduceMean<keepdims = 0>(p, last) u = Unsqueeze(k, last) v = Mul(m, u) r = Add(p, v)"),
     "(ReduceMean) reads it"),
    (PATCHES + LAYER_NORMS, ("r = Add(p, m)", "r = Add(n1, m)"), "what the norm gives is read by r (Add)"),
    (PATCHES + LAYER_NORMS, ("p = Add(eb, positions)", "k = Add(eb, positions) p = Relu(k)"), "(Relu) writes to it"),
    (PATCHES + LAYER_NORMS, ("[N,5,10] y)", "[N,5,10] y, float[N,5,8] p)"), "'p' is an output of the model"),
    (PATCHES.replace("16", "8") + LAYER_NORMS, ("MatMul(x, embed)", "Identity(x)"), "'x' is an input of the model"),
    (PATCHES + LAYER_NORMS, ("r = Add(p, m)", "u = Softmax(p) k = Mul(u, m) r = Add(p, k)"), "(Softmax) reads it"),
    (TEXT + RMS_NORM, ("n = Div(p, d)", "c = Concat<axis = -1>(p, p) k = MatMul(c, embed) q = Add(p, k) n = Div(q, d)"),
     "'c' has other channels"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "change", "reason"), REFUSED)
def test_what_cannot_be_rotated_says_why(text: str, change: tuple[str, str], reason: str):
    assert reason in streams(build(text.replace(*change)))[0].refusal


def test_a_network_without_norms_has_no_stream():
    assert streams(tiny.residual().model) == []
