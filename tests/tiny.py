"""Tiny models for the laws of test_conformance.py: ONNX text, weights from a seeded generator, and samples to feed.

Weights are scaled by 1/sqrt(fan-in), so activations are of order 1. A sample is a feed of batch size 1.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from tiny_build import SAMPLES, Tiny, Weights, arrays, bias, build, conv, dense, feeds, header, weight


def models() -> dict[str, Tiny]:
    """Every tiny model by name; the same bytes at every call."""
    return {make.__name__: make() for make in _MODELS}


def linear() -> Tiny:
    """MatMul and its bias, 2-D."""
    rng = np.random.default_rng(1)
    text = """ tiny (float[N,16] x) => (float[N,12] y) {
        [fc] h = MatMul(x, w)
        [fc_bias] y = Add(h, b)
    }"""
    return build("linear", header(17) + text, dense(rng, "", 16, 12), feeds(rng, 16))


def linear_3d() -> Tiny:
    """MatMul without a bias on [batch, tokens, channels], behind a LayerNorm."""
    rng = np.random.default_rng(2)
    text = """ tiny (float[N,T,16] x) => (float[N,T,12] y) {
        [norm] h = LayerNormalization<axis = -1>(x, gain, shift)
        [fc] y = MatMul(h, w)
    }"""
    weights = {"gain": np.ones(16, np.float32), "shift": bias(rng, 16), "w": weight(rng, 16, 12, fan_in=16)}
    return build("linear_3d", header(20) + text, weights, feeds(rng, 7, 16))


_GELU = """
        {y}_s = Div({x}, root2)
        {y}_e = Erf({y}_s)
        {y}_p = Add({y}_e, one)
        {y}_m = Mul({x}, {y}_p)
        {y} = Mul({y}_m, half)"""
_GELU_WEIGHTS = {"root2": np.float32(np.sqrt(2.0)), "one": np.float32(1), "half": np.float32(0.5)}


def mlp() -> Tiny:
    """Two linear layers and a GELU in primitive form."""
    rng = np.random.default_rng(3)
    text = f""" tiny (float[N,16] x) => (float[N,8] y) {{
        [fc1] h = MatMul(x, w1)
        [fc1_bias] hb = Add(b1, h){_GELU.format(x="hb", y="g")}
        [fc2] z = MatMul(g, w2)
        [fc2_bias] y = Add(z, b2)
    }}"""
    weights = dense(rng, "1", 16, 32) | dense(rng, "2", 32, 8) | arrays(_GELU_WEIGHTS)
    return build("mlp", header(13) + text, weights, feeds(rng, 16))


def transformer() -> Tiny:
    """One pre-norm block with a class token; batch and sequence are dynamic, and the samples differ in length."""
    rng = np.random.default_rng(4)
    text = f""" tiny (float[N,T,16] x) => (float[N,10] y) {{
        batch = Shape<start = 0, end = 1>(x)
        token_shape = Concat<axis = 0>(batch, token_tail)
        token = Expand(class_token, token_shape)
        e = Concat<axis = 1>(token, x)
        [norm1] n1 = LayerNormalization<axis = -1, epsilon = 1e-6>(e, gain1, shift1)
        [q] q0 = MatMul(n1, wq)
        [q_bias] q1 = Add(q0, bq)
        [k] k0 = MatMul(n1, wk)
        [k_bias] k1 = Add(k0, bk)
        [v] v0 = MatMul(n1, wv)
        [v_bias] v1 = Add(v0, bv)
        q2 = Reshape(q1, heads)
        k2 = Reshape(k1, heads)
        v2 = Reshape(v1, heads)
        q3 = Transpose<perm = [0, 2, 1, 3]>(q2)
        k3 = Transpose<perm = [0, 2, 3, 1]>(k2)
        v3 = Transpose<perm = [0, 2, 1, 3]>(v2)
        [scores] s0 = MatMul(q3, k3)
        s1 = Div(s0, root)
        s2 = Softmax<axis = -1>(s1)
        [values] a0 = MatMul(s2, v3)
        a1 = Transpose<perm = [0, 2, 1, 3]>(a0)
        a2 = Reshape(a1, flat)
        [proj] p0 = MatMul(a2, wp)
        [proj_bias] p1 = Add(p0, bp)
        r1 = Add(e, p1)
        [norm2] n2 = LayerNormalization<axis = -1, epsilon = 1e-6>(r1, gain2, shift2)
        [fc1] f0 = MatMul(n2, w1)
        [fc1_bias] f1 = Add(f0, b1){_GELU.format(x="f1", y="g")}
        [fc2] m0 = MatMul(g, w2)
        [fc2_bias] m1 = Add(m0, b2)
        r2 = Add(r1, m1)
        [norm3] n3 = LayerNormalization<axis = -1, epsilon = 1e-6>(r2, gain3, shift3)
        c = Gather<axis = 1>(n3, zero)
        [head] y = Gemm(c, wh, bh)
    }}"""
    weights: Weights = {"class_token": weight(rng, 1, 1, 16, fan_in=1)}
    for i in (1, 2, 3):
        weights |= {f"gain{i}": 1 + bias(rng, 16), f"shift{i}": bias(rng, 16)}
    for key in "qkvp":
        weights |= dense(rng, key, 16, 16)
    weights |= dense(rng, "1", 16, 32) | dense(rng, "2", 32, 16) | dense(rng, "h", 16, 10)
    weights |= {"token_tail": np.array([1, 16]), "heads": np.array([0, 0, 2, 8]), "flat": np.array([0, 0, 16])}
    weights |= arrays({"zero": np.int64(0), "root": np.float32(np.sqrt(8.0))} | _GELU_WEIGHTS)
    lengths = [5 + 3 * i // SAMPLES for i in range(SAMPLES)]
    samples = [{"x": rng.normal(size=(1, length, 16)).astype(np.float32)} for length in lengths]
    return build("transformer", header(17) + text, weights, samples)


def _batch_norm(rng: np.random.Generator, key: str, channels: int) -> Weights:
    return {
        f"{key}_scale": 1 + bias(rng, channels), f"{key}_shift": bias(rng, channels),
        f"{key}_mean": bias(rng, channels), f"{key}_var": 1 + np.abs(bias(rng, channels)),
    }  # fmt: skip


def relu_mlp() -> Tiny:
    """Linear layers without bias around a ReLU, a residual Add straight behind a MatMul, nodes without names."""
    rng = np.random.default_rng(15)
    text = """ tiny (float[N,16] x) => (float[N,16] y) {
        h = MatMul(x, w1)
        r = Relu(h)
        g = MatMul(r, w2)
        y = Add(g, h)
    }"""
    weights = {"w1": weight(rng, 16, 16, fan_in=16), "w2": weight(rng, 16, 16, fan_in=16)}
    return build("relu_mlp", header(17) + text, weights, feeds(rng, 16))


def conv_bn() -> Tiny:
    """Conv, BatchNormalization and ReLU, twice, then pooling and a Gemm with transB."""
    rng = np.random.default_rng(5)
    text = """ tiny (float[N,3,8,8] x) => (float[N,5] y) {
        [conv1] c1 = Conv<pads = [1, 1, 1, 1]>(x, w1)
        [bn1] n1 = BatchNormalization(c1, n1_scale, n1_shift, n1_mean, n1_var)
        r1 = Relu(n1)
        [conv2] c2 = Conv<strides = [2, 2]>(r1, w2, b2)
        [bn2] n2 = BatchNormalization(c2, n2_scale, n2_shift, n2_mean, n2_var)
        r2 = Relu(n2)
        p = GlobalAveragePool(r2)
        f = Flatten(p)
        [fc] y = Gemm<transB = 1>(f, wf, bf)
    }"""
    weights = {"w1": weight(rng, 8, 3, 3, 3, fan_in=27)} | conv(rng, "2", 12, 8, 3, 3)
    weights |= _batch_norm(rng, "n1", 8) | _batch_norm(rng, "n2", 12)
    weights |= {"wf": weight(rng, 5, 12, fan_in=12), "bf": bias(rng, 5)}
    return build("conv_bn", header(13) + text, weights, feeds(rng, 3, 8, 8))


def residual() -> Tiny:
    """A convolutional residual block."""
    rng = np.random.default_rng(6)
    text = """ tiny (float[N,4,6,6] x) => (float[N,8] y) {
        [stem] s = Conv<pads = [1, 1, 1, 1]>(x, w0, b0)
        rs = Relu(s)
        [conv1] c1 = Conv<pads = [1, 1, 1, 1]>(rs, w1, b1)
        r1 = Relu(c1)
        [conv2] c2 = Conv<pads = [1, 1, 1, 1]>(r1, w2, b2)
        [join] j = Add(c2, rs)
        rj = Relu(j)
        p = GlobalAveragePool(rj)
        y = Flatten<axis = 1>(p)
    }"""
    weights = conv(rng, "0", 8, 4, 3, 3) | conv(rng, "1", 8, 8, 3, 3) | conv(rng, "2", 8, 8, 3, 3)
    return build("residual", header(18) + text, weights, feeds(rng, 4, 6, 6))


def depthwise() -> Tiny:
    """An inverted bottleneck: pointwise, strided depthwise and pointwise Conv with ReLU6 written as Clip."""
    rng = np.random.default_rng(7)
    text = """ tiny (float[N,4,9,9] x) => (float[N,6,5,5] y) {
        [expand] c1 = Conv(x, w1, b1)
        r1 = Clip(c1, zero, six)
        [depthwise] c2 = Conv<group = 16, pads = [1, 1, 1, 1], strides = [2, 2]>(r1, w2, b2)
        r2 = Clip(c2, zero, six)
        [project] y = Conv(r2, w3, b3)
    }"""
    weights = conv(rng, "1", 16, 4, 1, 1) | conv(rng, "2", 16, 1, 3, 3) | conv(rng, "3", 6, 16, 1, 1)
    weights["w1"] *= 2  # so that some activations reach 6
    weights |= arrays({"zero": np.float32(0), "six": np.float32(6)})
    return build("depthwise", header(17) + text, weights, feeds(rng, 4, 9, 9))


def conv_1d() -> Tiny:
    """A grouped and a dilated 1-D Conv."""
    rng = np.random.default_rng(8)
    text = """ tiny (float[N,4,24] x) => (float[N,6] y) {
        [conv1] c1 = Conv<group = 2, pads = [2, 2]>(x, w1, b1)
        r1 = Relu(c1)
        [conv2] c2 = Conv<dilations = [2]>(r1, w2)
        p = ReduceMean<axes = [2], keepdims = 0>(c2)
        [fc] y = Gemm(p, wf)
    }"""
    weights = conv(rng, "1", 8, 2, 5) | {"w2": weight(rng, 8, 8, 3, fan_in=24), "wf": weight(rng, 8, 6, fan_in=8)}
    return build("conv_1d", header(13) + text, weights, feeds(rng, 4, 24))


def mnist() -> Tiny:
    """An old CNN: opset 8, batch 1, auto_pad, the Conv's bias a separate Add, max pooling, a Gemm with transB."""
    rng = np.random.default_rng(9)
    text = """ tiny (float[1,1,8,8] x) => (float[1,10] y) {
        [conv1] c1 = Conv<kernel_shape = [5, 5], auto_pad = "SAME_UPPER">(x, w1)
        [conv1_bias] d1 = Add(c1, b1)
        r1 = Relu(d1)
        p1 = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(r1)
        f = Reshape(p1, flat)
        [fc] y = Gemm<transB = 1>(f, wf, bf)
    }"""
    weights = {
        "w1": weight(rng, 6, 1, 5, 5, fan_in=25), "b1": bias(rng, 6, 1, 1),
        "flat": np.array([1, 96]), "wf": weight(rng, 10, 96, fan_in=96), "bf": bias(rng, 10),
    }  # fmt: skip
    return build("mnist", '<ir_version: 7, opset_import: ["" : 8]>' + text, weights, feeds(rng, 1, 8, 8))


def shared() -> Tiny:
    """Two MatMuls on one initializer."""
    rng = np.random.default_rng(10)
    text = """ tiny (float[N,16] x) => (float[N,16] y) {
        [first] a = MatMul(x, w)
        t = Tanh(a)
        [second] c = MatMul(t, w)
        [second_bias] y = Add(c, b)
    }"""
    return build("shared", header(17) + text, dense(rng, "", 16, 16), feeds(rng, 16))


def gemm() -> Tiny:
    """A Gemm with alpha, beta and transA, behind a Transpose that keeps the batch in front for the user."""
    rng = np.random.default_rng(11)
    text = """ tiny (float[N,16] x) => (float[N,12] y) {
        xt = Transpose<perm = [1, 0]>(x)
        [fc1] h = Gemm<alpha = 0.5, beta = 2.0, transA = 1>(xt, w1, b1)
        r = Relu(h)
        [fc2] y = Gemm<alpha = 1.5, transB = 1>(r, w2, b2)
    }"""
    weights = {
        "w1": weight(rng, 16, 20, fan_in=4), "b1": bias(rng, 20),
        "w2": weight(rng, 12, 20, fan_in=20), "b2": bias(rng, 1, 12),
    }  # fmt: skip
    return build("gemm", header(17) + text, weights, feeds(rng, 16))


def silu() -> Tiny:
    """Conv with SiLU, written as Sigmoid and Mul, between two Convs."""
    rng = np.random.default_rng(12)
    text = """ tiny (float[N,3,6,6] x) => (float[N,4,6,6] y) {
        [conv1] c1 = Conv<pads = [1, 1, 1, 1]>(x, w1, b1)
        g1 = Sigmoid(c1)
        s1 = Mul(c1, g1)
        [conv2] y = Conv<pads = [1, 1, 1, 1]>(s1, w2, b2)
    }"""
    weights = conv(rng, "1", 8, 3, 3, 3) | conv(rng, "2", 4, 8, 3, 3)
    return build("silu", header(21) + text, weights, feeds(rng, 3, 6, 6))


def hard_swish() -> Tiny:
    """HardSwish in primitive operators behind each of three Convs, scaled and shifted in front of the second."""
    rng = np.random.default_rng(22)
    text = """ tiny (float[N,3,6,6] x) => (float[N,4,6,6] y) {
        [conv1] c1 = Conv<pads = [1, 1, 1, 1]>(x, w1, b1)
        m1 = Mul(c1, two)
        a1 = Add(m1, three)
        g1 = Clip(a1, zero, six)
        h1 = Mul(m1, g1)
        s1 = Div(h1, six)
        k1 = Mul(s1, half)
        d1 = Add(k1, half)
        [conv2] c2 = Conv<group = 8, pads = [1, 1, 1, 1]>(d1, w2, b2)
        a2 = Add(c2, three)
        g2 = Clip(a2, zero, six)
        q2 = Div(g2, six)
        s2 = Mul(c2, q2)
        [conv3] y = Conv(s2, w3, b3)
    }"""
    weights = conv(rng, "1", 8, 3, 3, 3) | conv(rng, "2", 8, 1, 3, 3) | conv(rng, "3", 4, 8, 1, 1)
    weights["w2"] *= 2
    numbers = {"zero": 0.0, "half": 0.5, "two": 2.0, "three": 3.0, "six": 6.0}
    weights |= arrays({name: np.float32(value) for name, value in numbers.items()})
    return build("hard_swish", header(17) + text, weights, feeds(rng, 3, 6, 6))


def concat() -> Tiny:
    """Two Convs side by side, joined by Concat, one of them also a graph output."""
    rng = np.random.default_rng(13)
    text = """ tiny (float[N,3,6,6] x) => (float[N,4,6,6] left, float[N,5] y) {
        [conv_l] left = Conv<pads = [1, 1, 1, 1]>(x, wl, bl)
        [conv_r] right = Conv(x, wr, br)
        j = Concat<axis = 1>(left, right)
        r = Relu(j)
        [conv_j] c = Conv(r, wj, bj)
        p = GlobalAveragePool(c)
        y = Flatten(p)
    }"""
    weights = conv(rng, "l", 4, 3, 3, 3) | conv(rng, "r", 4, 3, 1, 1) | conv(rng, "j", 5, 8, 1, 1)
    return build("concat", header(17) + text, weights, feeds(rng, 3, 6, 6))


def outputs() -> Tiny:
    """A Conv's output, before and behind its ReLU, among the graph's outputs; one channel is dead."""
    rng = np.random.default_rng(16)
    text = """ tiny (float[N,3,5,5] x) => (float[N,4,5,5] c1, float[N,4,5,5] r1, float[N,4,5,5] y) {
        [conv1] c1 = Conv(x, w1, b1)
        r1 = Relu(c1)
        [conv2] c2 = Conv(r1, w2)
        y = Relu(c2)
    }"""
    weights = conv(rng, "1", 4, 3, 1, 1) | {"w2": weight(rng, 4, 4, 1, 1, fan_in=4)}
    weights["w1"][1] = 0
    return build("outputs", header(17) + text, weights, feeds(rng, 3, 5, 5))


def embedding() -> Tiny:
    """A language model's ends: integer ids, Gather, a linear layer, RMSNorm in primitive form and a MatMul head."""
    rng = np.random.default_rng(14)
    text = """ tiny (int64[N,T] ids) => (float[N,T,20] logits) {
        e = Gather(table, ids)
        [up] u = MatMul(e, wu)
        r = Add(u, e)
        square = Pow(r, two)
        mean = ReduceMean<axes = [-1], keepdims = 1>(square)
        shifted = Add(mean, eps)
        root = Sqrt(shifted)
        unit = Div(r, root)
        n = Mul(unit, gain)
        [head] logits = MatMul(n, wh)
    }"""
    weights = {
        "table": weight(rng, 20, 16, fan_in=1), "wu": weight(rng, 16, 16, fan_in=16),
        "gain": 1 + bias(rng, 16), "wh": weight(rng, 16, 20, fan_in=16),
    }  # fmt: skip
    samples = [{"ids": rng.integers(0, 20, size=(1, 6))} for _ in range(SAMPLES)]
    scalars = arrays({"two": np.float32(2), "eps": np.float32(1e-5)})
    return build("embedding", header(17) + text, weights | scalars, samples)


def recurrent() -> Tiny:
    """A recurrent layer and a transposed Conv, whose weights are large, behind and in front of layers."""
    rng = np.random.default_rng(17)
    text = """ tiny (float[N,3,8] x) => (float[N,3,16] y) {
        [conv] c = Conv<pads = [1, 1]>(x, wc, bc)
        r = Relu(c)
        t = Transpose<perm = [2, 0, 1]>(r)
        [lstm] s, last = LSTM<hidden_size = 16>(t, w, state, bias)
        q = Squeeze(s, one)
        u = Transpose<perm = [1, 2, 0]>(q)
        [up] v = ConvTranspose<strides = [2]>(u, k, bk)
        [out] y = Conv(v, wo, bo)
    }"""
    recur = {"w": weight(rng, 1, 64, 16, fan_in=16), "state": weight(rng, 1, 64, 16, fan_in=16)}
    up = {"k": weight(rng, 16, 32, 2, fan_in=16), "bk": bias(rng, 32), "one": np.array([1])}
    ends = conv(rng, "c", 16, 3, 3) | conv(rng, "o", 3, 32, 1)
    return build("recurrent", header(17) + text, recur | {"bias": bias(rng, 1, 128)} | up | ends, feeds(rng, 3, 8))


_MODELS: tuple[Callable[[], Tiny], ...] = (
    linear, linear_3d, mlp, transformer, embedding, shared, gemm, relu_mlp,
    conv_bn, residual, depthwise, conv_1d, mnist, silu, hard_swish, concat, outputs, recurrent,
)  # fmt: skip
