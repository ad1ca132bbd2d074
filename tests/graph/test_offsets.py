"""Offsets: what stands in front of a quantizer goes into the constant behind it, channel by channel, or stays."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from equality import ops, parse, run, stored
from onnx import ModelProto, checker, shape_inference

from onnxcomp.errors import ModelError
from onnxcomp.graph.convert import to_graph, to_model
from onnxcomp.graph.edit import Tape, apply
from onnxcomp.graph.offsets import fold_offset
from onnxcomp.graph.tidy import Fold
from onnxcomp.runtime import Session

F = np.float32
N = np.array([0.5, -1, 2, 0.25], F)
B = np.array([1, -2, 4, 8], F)
WEIGHTS = {
    "w": np.arange(-8, 8, dtype=F).reshape(4, 4) / 4, "b": B, "g": np.ones(4, F), "o": np.eye(4, 3, dtype=F),
    "kernel": np.arange(16, dtype=F).reshape(4, 4, 1, 1) / 8, "c": B.reshape(4, 1, 1), "s": np.array(3, F),
    "u": np.ones((3, 1), F), "t": np.ones((1, 4), F), "q_s": np.array(0.25, F), "q_z": np.array(128, np.uint8),
    "w12": (np.arange(48, dtype=F).reshape(4, 12) % 7 - 3) / 4, "b12": np.arange(12, dtype=F) / 4,
    "w34": np.ones((3, 4), F), "w42": np.ones((4, 2), F), "b2": np.ones(2, F),
    "heads": np.array([0, 0, 2, 2]), "packed": np.array([0, 0, 3, 2, 2]), "one_head": np.array([0, 0, 1, 2]),
    "joined": np.array([0, 0, 4]), "mixed": np.array([-1, 3, 4]), "both": np.array([0, 0]), "swap": np.array([1, 0]),
    "zero": np.array([0]), "four": np.array([4]), "eight": np.array([8]), "twelve": np.array([12]), "last": np.array([-1]),
    "two": np.array([2]), "i0": np.array(0), "i1": np.array(1), "i2": np.array(2),
}  # fmt: skip


def model(body: str, x: str = "N,3,4", y: str = "N,3,3", more: str = "") -> ModelProto:
    """A model from x to y that uses whatever WEIGHTS its body names."""
    words = {word.strip("(),") for word in body.replace("(", " ").replace(")", " ").split()}
    used = {key: array for key, array in WEIGHTS.items() if key in words}
    text = f"g (float[{x}] x) => (float[{y}] y{more}) {{ {body} }}"
    return shape_inference.infer_shapes(parse(text, used, opset=21, domains=', "onnxcomp" : 1'))


def noisy(like: ModelProto, tensor: str, consumer: str, noise: np.ndarray = N) -> tuple[gs.Graph, str]:
    """The graph with `noise` added to `tensor` in front of one consumer."""
    graph, tape = to_graph(like), Tape("fc/noisyquant")
    new = tape("Add", tensor, tape.constant("noise", noise))
    apply(graph, "noisyquant", tape, {tensor: new}, (consumer,))
    return graph, tape.nodes[0].name


class Runner:
    """Runs parts as the walk does."""

    def __init__(self, like: ModelProto) -> None:
        self.like = like

    def __call__(self, part: gs.Graph, feeds: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        return Session(to_model(part, self.like).SerializeToString(), optimize=False, threads=1).run(feeds)


def fold(
    like: ModelProto, tensor: str = "h", consumer: str = "fc", noise: np.ndarray = N, tolerance: float = 0.0
) -> tuple[Fold | None, ModelProto]:
    """What was folded, and the model, checked and equal to the one with the Add."""
    graph, add = noisy(like, tensor, consumer, noise)
    before = to_model(graph, like)

    done = fold_offset(graph, add, "noisyquant", Runner(like))

    after = to_model(graph, like)
    if not any(node.domain == "onnxcomp" for node in after.graph.node):
        checker.check_model(after, full_check=True)
        shape = [d.dim_value or 2 for d in like.graph.input[0].type.tensor_type.shape.dim]
        x = np.random.default_rng(0).integers(-8, 9, size=shape).astype(F) / 4
        for name, expected in run(before, {"x": x}).items():
            assert np.abs(run(after, {"x": x})[name] - expected).max() <= tolerance
    assert (done is None) == any(node.name == add for node in graph.nodes)
    return done, after


# --- straight into a constant ----------------------------------------------------------------------------------------

NORM = "h = LayerNormalization(x, g, b) [fc] y = MatMul(h, o)"
LINEAR = "m = MatMul(x, w) [add] h = Add(m, b) [fc] y = MatMul(h, o)"
NEAR = 64 * 2.0**-22
"""A sum of four products below 64 in another order: each rounding is below 64 * 2^-24."""


def test_the_shift_of_a_layer_norm_takes_it_in():
    done, after = fold(model(NORM), tolerance=NEAR)

    assert ops(after) == ["LayerNormalization", "MatMul"]
    assert stored(after)["b"].tolist() == (B + N).tolist()
    assert done is not None
    assert (done.index, done.method, done.name) == (2, "noisyquant", "b")
    assert done.before is not None
    assert done.before.tolist() == B.tolist()
    assert done.added.tolist() == N.tolist()


def test_the_tensor_is_then_named_for_what_it_holds():
    _, after = fold(model(NORM), tolerance=NEAR)

    assert [list(n.output) for n in after.graph.node] == [["h/with-noisyquant"], ["y"]]


def test_a_layer_norm_without_a_shift_gets_one():
    done, after = fold(model("h = LayerNormalization(x, g) [fc] y = MatMul(h, o)"), tolerance=NEAR)

    assert ops(after) == ["LayerNormalization", "MatMul"]
    assert done is not None
    assert (done.name, done.before) == ("", None)
    assert stored(after)["fc/noisyquant.noise"].tolist() == N.tolist()


@pytest.mark.parametrize("operands", ["m, b", "b, m"])
def test_the_add_of_a_layer_takes_it_in(operands: str):
    done, after = fold(model(LINEAR.replace("m, b", operands)))

    assert ops(after) == ["MatMul", "Add", "MatMul"]
    assert stored(after)["b"].tolist() == (B + N).tolist()
    assert done is not None
    assert done.node == "add"


@pytest.mark.parametrize(("layer", "total"), [("Gemm(x, w, b)", B + N), ("Gemm(x, w)", N)])
def test_a_gemm_takes_it_in(layer: str, total: np.ndarray):
    done, after = fold(model(f"h = {layer} [fc] y = MatMul(h, o)", "N,4", "N,3"))

    assert done is not None
    assert ops(after) == ["Gemm", "MatMul"]
    assert total.tolist() in [a.tolist() for a in stored(after).values()]


@pytest.mark.parametrize(("layer", "total"), [("Conv(x, kernel, b)", B + N), ("Conv(x, kernel)", N)])
def test_a_conv_takes_it_in(layer: str, total: np.ndarray):
    shape = "N,4,2,2"
    done, after = fold(model(f"h = {layer} [fc] y = Conv(h, kernel)", shape, shape), noise=N.reshape(4, 1, 1))

    assert done is not None
    assert ops(after) == ["Conv", "Conv"]
    assert total.tolist() in [a.tolist() for a in stored(after).values()]


def test_the_add_behind_a_conv_keeps_its_trailing_axes():
    shape = "N,4,2,2"
    done, after = fold(
        model("m = Conv(x, kernel) h = Add(m, c) [fc] y = Conv(h, kernel)", shape, shape), noise=N.reshape(4, 1, 1)
    )

    assert done is not None
    assert stored(after)["c"].tolist() == (B + N).reshape(4, 1, 1).tolist()


def test_the_bias_in_a_sum_with_a_table_takes_it_in():
    done, after = fold(model("t0 = MatMul(u, t) [total] s0 = Add(b, t0) m = MatMul(x, w) h = Add(m, s0) [fc] y = MatMul(h, o)"))

    assert done is not None
    assert done.node == "total"
    assert stored(after)["b"].tolist() == (B + N).tolist()


def test_a_constant_that_others_read_is_copied():
    done, after = fold(model("m = MatMul(x, w) n = Mul(m, b) h = Add(n, b) [fc] y = MatMul(h, o)"))

    assert done is not None
    assert stored(after)["b"].tolist() == B.tolist()
    assert stored(after)["fc/noisyquant.noise"].tolist() == (B + N).tolist()


def test_sums_are_taken_in_float64_and_rounded_once():
    like = model(LINEAR)
    graph, add = noisy(like, "h", "fc", np.full(4, 2.0**-24 + 2.0**-26, F))
    graph.tensors()["b"].values = np.ones(4, F)

    fold_offset(graph, add, "noisyquant", Runner(like))

    # 1 + 2^-24 + 2^-26 lies above the middle between 1 and its neighbour 1 + 2^-23.
    assert graph.tensors()["b"].values.tolist() == [1 + 2.0**-23] * 4


def test_whoever_asks_for_the_shape_alone_is_no_obstacle():
    body = "h = LayerNormalization(x, g, b) n = Shape(h) [fc] z = MatMul(h, w) y = Reshape(z, n)"

    assert fold(model(body, y="N,3,4"), tolerance=NEAR)[0] is not None


# --- it stays --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        "h = LayerNormalization(x, g, b) [other] e = Tanh(h) [fc] z = MatMul(h, w) y = Add(z, e)",
        "m = MatMul(x, w) a = Add(m, b) h = Relu(a) [fc] y = MatMul(h, w)",
        "h = MatMul(x, w) [fc] y = MatMul(h, w)",
        "m = MatMul(x, w) h = Add(m, s) [fc] y = MatMul(h, w)",
        "m = MatMul(x, w) h = Add(m, x) [fc] y = MatMul(h, w)",
        "n = LayerNormalization<axis = 1>(x, w34, w34) h = Identity(n) [fc] y = MatMul(h, w)",
        "m = MatMul(x, w) a = Add(m, b) h = onnxcomp.FakeQuantize<bits = 8>(a, q_s, q_z) [fc] y = MatMul(h, w)",
    ],
    ids=["another reader", "an activation", "no bias", "one number", "no constant", "more than channels", "quantized"],
)
def test_it_stays_where_the_tensor_is_more_or_less_than_a_constant_away(body: str):
    assert fold(model(body, y="N,3,4"))[0] is None


def test_it_stays_where_the_tensor_is_an_output_of_the_model():
    assert fold(model(LINEAR, more=", float[N,3,4] h"))[0] is None


def test_it_stays_in_front_of_the_models_input():
    assert fold(model("[fc] y = MatMul(x, o)"), tensor="x")[0] is None


# --- through attention -----------------------------------------------------------------------------------------------


def heads(x: str, y: str) -> str:
    return f"{y}1 = Reshape({x}, heads) {y} = Transpose<perm = [0, 2, 1, 3]>({y}1) "


MIX = "kt = Transpose<perm = [0, 1, 3, 2]>(k) s0 = MatMul(q, kt) p = Softmax(s0) a = MatMul(p, v) "
OUT = "a1 = Transpose<perm = [0, 2, 1, 3]>(a) h = Reshape(a1, joined) [fc] y = MatMul(h, o) "
VALUE = "[v_bias] vb = Add(vm, b) "


def attention(mix: str = MIX, value: str = VALUE, out: str = OUT) -> str:
    """Two heads of two channels, q, k and v from layers of their own; `value` makes vb of vm."""
    layers = "qm = MatMul(x, w) qb = Add(qm, b) km = MatMul(x, w) kb = Add(km, b) vm = MatMul(x, w) "
    return layers + value + heads("qb", "q") + heads("kb", "k") + heads("vb", "v") + mix + out


def packed(split: str) -> str:
    """Two heads of two channels, q, k and v from one layer; `split` makes q, k and v of z."""
    return "m = MatMul(x, w12) [qkv] z = Add(m, b12) " + split + MIX + OUT


SPLIT = "z1 = Reshape(z, packed) qs, ks, vs = Split<axis = 2, num_outputs = 3>(z1) " + "".join(
    f"{n}2 = Squeeze({n}s, two) {n} = Transpose<perm = [0, 2, 1, 3]>({n}2) " for n in "qkv"
)
GATHER = "z1 = Reshape(z, packed) z2 = Transpose<perm = [2, 0, 3, 1, 4]>(z1) " + "".join(
    f"{n} = Gather<axis = 0>(z2, i{i}) " for i, n in enumerate("qkv")
)
SLICE = "qb = Slice(z, zero, four, last) kb = Slice(z, four, eight, last) vb = Slice(z, eight, twelve, last) " + "".join(
    heads(f"{n}b", n) for n in "qkv"
)
SOFT = 2.0**-14
"""Softmax's rows sum to 1 within 3 * 2^-24, the values are below 64, their products with four weights add up."""


def test_the_bias_of_the_values_takes_it_in():
    done, after = fold(model(attention()), tolerance=SOFT)

    assert done is not None
    assert done.node == "v_bias"
    assert "Add" in ops(after)
    assert stored(after)["fc/noisyquant.noise"].tolist() == (B + N).tolist()  # b is the queries' and the keys' as well
    assert stored(after)["b"].tolist() == B.tolist()


@pytest.mark.parametrize("split", [SPLIT, GATHER, SLICE], ids=["split", "gather", "slice"])
def test_a_packed_bias_takes_it_in_at_the_values_channels(split: str):
    done, after = fold(model(packed(split)), tolerance=SOFT)

    assert done is not None
    assert done.added.tolist() == [0] * 8 + N.tolist()
    assert stored(after)["b12"].tolist() == (WEIGHTS["b12"] + np.concatenate([np.zeros(8), N])).tolist()


def test_channels_are_traced_not_counted():
    """The values' heads are exchanged on their way, by a Gather."""
    body = attention(out="a2 = Gather<axis = 1>(a, swap) " + OUT.replace("(a)", "(a2)"))

    done, _ = fold(model(body), tolerance=SOFT)

    assert done is not None
    assert done.added.tolist() == [*N[2:], *N[:2]]


def test_all_tensors_on_the_way_are_renamed_and_no_other():
    _, after = fold(model(packed(SPLIT)), tolerance=SOFT)

    names = {name for node in after.graph.node for name in node.output}
    noisy = {n.removesuffix("/with-noisyquant") for n in names if n.endswith("/with-noisyquant")}
    assert noisy == {"z", "z1", "vs", "v2", "v", "a", "a1", "h"}
    assert {"q", "k", "p", "y", "qs", "ks"} <= names


def test_a_shape_that_is_asked_of_another_tensor_is_followed():
    body = "n = Shape(x) " + attention().replace("Reshape(a1, joined)", "Reshape(a1, n)")

    assert fold(model(body), tolerance=SOFT)[0] is not None


def test_a_sequence_of_any_length_is_traced():
    assert fold(model(attention(), x="N,T,4", y="N,T,3"), tolerance=SOFT)[0] is not None


def test_one_head_without_any_move_is_traced():
    body = "m = MatMul(x, w) z = Add(m, b) kt = Transpose<perm = [0, 2, 1]>(x) s0 = MatMul(x, kt) p = Softmax(s0) "

    done, after = fold(model(body + "h = MatMul(p, z) [fc] y = MatMul(h, o)"), tolerance=SOFT)

    assert done is not None
    assert stored(after)["b"].tolist() == (B + N).tolist()


QUANTIZED = "onnxcomp.FakeQuantize<bits = 8>"


@pytest.mark.parametrize(
    "body",
    [
        attention(MIX.replace("p = Softmax", "p = Relu")),
        attention(MIX.replace("Softmax(", "Softmax<axis = 2>(")),
        attention(MIX.replace("a = MatMul(p, v)", "f = Add(p, s) a = MatMul(f, v)")),
        attention(value="vb = Identity(vm) "),
        attention(value=VALUE.replace("vb", "d") + "vb = Tanh(d) "),
        attention(value=VALUE + "e = Tanh(vb) "),
        attention(MIX + "e = Tanh(a) "),
        attention(MIX.replace("(p, v)", "(p, q)")),
        attention(MIX.replace("a = ", f"vq = {QUANTIZED}(v, q_s, q_z) a = ").replace("(p, v)", "(p, vq)")),
        attention(MIX.replace("a = ", f"pq = {QUANTIZED}(p, q_s, q_z) a = ").replace("(p, v)", "(pq, v)")),
        attention(out="h = Reshape(a, mixed) [fc] y = MatMul(h, o)"),
    ],
    ids=[
        "no softmax", "softmax over queries", "rows that do not sum to 1", "no bias", "an activation behind the bias",
        "values read elsewhere", "the product read elsewhere", "values that are queries too", "quantized values",
        "quantized probabilities", "heads mixed with tokens",
    ],
)  # fmt: skip
def test_it_stays_where_it_would_change_something_else(body: str):
    assert fold(model(body))[0] is None


def test_it_stays_where_a_channel_serves_two_heads():
    """Both heads read the same two values: channels 0, 1, 0, 1."""
    value = "m2 = MatMul(x, w42) n2 = Add(m2, b2) n3 = Reshape(n2, one_head) n4 = Gather<axis = 2>(n3, both) "
    value += "vb = Reshape(n4, joined) "

    assert fold(model(attention(value=value)))[0] is None


def test_it_stays_where_the_part_does_not_run():
    like = model(attention())
    graph, add = noisy(like, "h", "fc")

    def fails(part: gs.Graph, feeds: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        raise ModelError("ONNX Runtime cannot run the model: the made-up lengths do not fit.")

    assert fold_offset(graph, add, "noisyquant", fails) is None


def test_it_stays_where_a_length_is_an_input_of_the_model():
    body = attention().replace("Reshape(a1, joined)", "Reshape(a1, asked)")
    like = model(body)
    like.graph.input.append(parse("g (int64[3] asked) => (int64[3] z) { z = Identity(asked) }").graph.input[0])
    graph, add = noisy(like, "h", "fc")

    assert fold_offset(graph, add, "noisyquant", Runner(like)) is None
