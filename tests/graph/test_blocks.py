"""Blocks: which residual connections count, how they are grouped, where a block begins and ends, what it reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny
from conftest import ROOT
from equality import parse, run
from onnx import ModelProto

from onnxcomp.graph.blocks import Block, find_blocks
from onnxcomp.graph.convert import to_model
from onnxcomp.graph.edit import extract
from onnxcomp.graph.prepare import Prepared, prepare
from onnxcomp.graph.sites import find_sites
from onnxcomp.runtime import infer_types

F = np.float32
RNG = np.random.default_rng(0)


def constant(*shape: int) -> np.ndarray:
    return (RNG.normal(size=shape) / 4).astype(F)


WEIGHTS = {
    "w": constant(8, 8), "wide": constant(16, 8), "narrow": constant(8, 16), "gain": np.ones(8, F), "table": constant(5, 8),
    "k1": constant(4, 4, 1, 1), "k3": constant(4, 4, 3, 3), "kw": constant(8, 4, 3, 3), "kw1": constant(8, 4, 1, 1),
    "k8": constant(8, 8, 3, 3), "kd": constant(4, 4, 3), "kd1": constant(4, 4, 1), "k84": constant(4, 8, 1, 1),
    "w4": constant(4, 4), "square": constant(40, 40), "flat": np.array([0, 40]), "back": np.array([0, 5, 8]),
    "zero": np.array([0]), "two": np.array([2]), "one": np.array([1]), "end": np.array([99]), "six": np.asarray(F(6)),
}  # fmt: skip
"""What the models below may name: matrices, Conv kernels of 4 and 8 channels, a norm's gain, a table [T, C], indices."""


def model(body: str, shape: str = "N,5,8", more: str = "") -> ModelProto:
    """A model of this body from s to y, with something before and behind, and of the weights that it names."""
    used = {k: v for k, v in WEIGHTS.items() if any(f"{a}{k}{b}" in body for a in "( " for b in ",)")}
    return parse(f"g (float[{shape}] x{more}) => (float out) {{ s = Relu(x){body} out = Neg(y) }}", used, opset=21)


def norm(x: str, y: str) -> str:
    return f" {y} = LayerNormalization<axis = -1>({x}, gain)"


def attention(x: str, y: str, mask: str = "") -> str:
    """One head, with the values as their own keys and an output layer."""
    scores = f" {y}_m = Add({y}_p, {mask}) {y}_s = Softmax({y}_m)" if mask else f" {y}_s = Softmax({y}_p)"
    return (
        f" {y}_q = MatMul({x}, w) {y}_v = MatMul({x}, w) {y}_t = Transpose<perm = [0, 2, 1]>({y}_v)"
        f" {y}_p = MatMul({y}_q, {y}_t){scores} {y}_a = MatMul({y}_s, {y}_v) {y} = MatMul({y}_a, w)"
    )


def mlp(x: str, y: str) -> str:
    """Two layers and the residual connection around them."""
    return f" {y}_h = MatMul({x}, w) {y}_g = Relu({y}_h) {y}_o = MatMul({y}_g, w) {y} = Add({x}, {y}_o)"


def pre_norm(i: int, x: str, y: str) -> str:
    return (
        f"{norm(x, f'n{i}')}{attention(f'n{i}', f'a{i}')} r{i} = Add({x}, a{i}){norm(f'r{i}', f'o{i}')}"
        f" h{i} = MatMul(o{i}, w) g{i} = Relu(h{i}) m{i} = MatMul(g{i}, w) {y} = Add(m{i}, r{i})"
    )


def post_norm(i: int, x: str, y: str) -> str:
    return f"{attention(x, f'a{i}')} r{i} = Add({x}, a{i}){norm(f'r{i}', f'n{i}')}{mlp(f'n{i}', f'm{i}')}{norm(f'm{i}', y)}"


IMAGE, ODD, ANY_SIZE = "N,4,16,16", "N,4,9,13", "N,4,H,W"
PAD = "pads = [1, 1, 1, 1]"
HALF = f"{PAD}, strides = [2, 2]"


def conv(i: int, x: str, y: str, kernel: str = "k3") -> str:
    """A residual connection around two Convs of one width, a Relu behind the join."""
    return (
        f" c{i} = Conv<{PAD}>({x}, {kernel}) d{i} = Relu(c{i}) e{i} = Conv<{PAD}>(d{i}, {kernel})"
        f" j{i} = Add({x}, e{i}) {y} = Relu(j{i})"
    )


def down(i: int, x: str, y: str) -> str:
    """From 4 channels to 8, at half the size, with a Conv as the shortcut."""
    return (
        f" c{i} = Conv<{HALF}>({x}, kw) d{i} = Relu(c{i}) e{i} = Conv<{PAD}>(d{i}, k8)"
        f" f{i} = Conv<strides = [2, 2]>({x}, kw1) j{i} = Add(e{i}, f{i}) {y} = Relu(j{i})"
    )


MODELS = {
    "pre": model(pre_norm(0, "s", "t") + pre_norm(1, "t", "u") + norm("u", "y")),
    "post": model(post_norm(0, "s", "t") + post_norm(1, "t", "u") + " y = MatMul(u, w)"),
    "decoder": model(attention("s", "a") + " r = Add(s, a)" + attention("r", "b") + " t = Add(r, b)" + mlp("t", "y")),
    "mlps": model(mlp("s", "t") + " m = MatMul(t, w) y = Sum(t, m)"),
    "parallel": model(norm("s", "n") + attention("n", "a") + " m = MatMul(n, w) b = Add(a, m) y = Add(s, b)"),
    "one_by_one": model(attention("s", "a") + " b = Add(s, a) m = MatMul(s, w) y = Add(b, m)"),
    "rotary": model(
        " q = MatMul(s, w) h = Mul(q, table) g = Neg(q) i = Mul(g, table) j = Add(h, i) p = MatMul(j, w) y = Add(s, p)"
    ),
    "mask": model(
        " f = Cast<to = 1>(mask) o = Log(f)" + attention("s", "a", "o") + " r = Add(s, a)" + mlp("r", "y"),
        more=", int64[N,1,5] mask",
    ),
    "prompt": model(pre_norm(0, "s", "t") + " u = Add(t, z)" + pre_norm(1, "u", "y"), more=", float[N,5,8] z"),
    "merging": model(
        mlp("s", "t") + " a = Slice(t, zero, end, one, two) b = Slice(t, one, end, one, two)"
        " c = Concat<axis = -1>(a, b) u = MatMul(c, wide)" + mlp("u", "y"), "N,6,8",
    ),
    "shrinking": model(attention("s", "a") + " t = Add(s, a) u = Slice(t, zero, end, one, two)" + mlp("u", "y"), "N,T,8"),
    "pooling": model(mlp("s", "t") + " u = ReduceMean<keepdims = 1>(t, one)" + mlp("u", "y")),
    "other_attention": model(
        " q = MatMul(s, w) k = Transpose<perm = [0, 2, 1]>(q) l = MatMul(k, s) a = MatMul(q, l) t = Add(s, a)" + mlp("t", "u")
        + ' e = Einsum<equation = "nic,njc->nij">(u, u) f = Softmax(e) g = Einsum<equation = "nij,njc->nic">(f, u)'
        " h = MatMul(g, w) v = Add(u, h)" + mlp("v", "y")
    ),
    "stages": model(conv(0, "s", "t") + conv(1, "t", "u") + down(2, "u", "v") + conv(3, "v", "y", "k8"), IMAGE),
    "any_size": model(conv(0, "s", "t") + down(1, "t", "u") + conv(2, "u", "y", "k8"), ANY_SIZE),
    "plain_between": model(conv(0, "s", "t") + f" u = Conv<{HALF}>(t, kw) v = Clip(u, , six)" + conv(1, "v", "y", "k8"), IMAGE),
    "floor_between": model(conv(0, "s", "t") + " u = Conv<strides = [2, 2]>(t, kw)" + conv(1, "u", "y", "k8"), ODD),
    "wider_between": model(conv(0, "s", "t") + " u = Conv(t, kw1)" + conv(1, "u", "y", "k8"), IMAGE),
    "cropped_between": model(conv(0, "s", "t") + " u = Conv(t, k3)" + conv(1, "u", "y"), IMAGE),
    "up_again": model(
        conv(0, "s", "t") + f" u = Conv<{HALF}>(t, kw)" + conv(1, "u", "v", "k8")
        + f" z = ConvTranspose<output_padding = [1, 1], {HALF}>(v, kw) o = Concat<axis = 1>(t, z) p = Conv(o, k84)"
        + conv(2, "p", "y"), IMAGE,
    ),
    "global_skip": model(conv(0, "s", "t") + conv(1, "t", "u") + " v = Conv(u, k1) y = Add(s, v)", IMAGE),
    "conv_1d": model(" c = Conv<pads = [1, 1]>(s, kd) d = Relu(c) e = Conv(d, kd1) t = Add(s, e) y = Clip(t)", "N,4,6"),
    "channels_last_inside": model(
        f" c = Conv<{PAD}>(s, k3) d = Transpose<perm = [0, 2, 3, 1]>(c) e = MatMul(d, w4)"
        " f = Transpose<perm = [0, 3, 1, 2]>(e) y = Add(s, f)", IMAGE,
    ),
    "towers": model(
        conv(0, "s", "t") + " o = Conv(x, k1)" + conv(1, "o", "p") + conv(2, "p", "u") + conv(3, "t", "v")
        + " y = Concat<axis = 1>(u, v)", IMAGE,
    ),
    "wider": model(" t = MatMul(s, narrow) u = MatMul(s, narrow) y = Add(t, u)"),
    "body": model(
        """ t = MatMul(s, w) c = Tanh(z) u = If (b) <
            then_branch = p () => (float[N,5,8] p) { p = Mul(t, c) }, else_branch = q () => (float[N,5,8] q) { q = Neg(t) }
        > v = MatMul(u, w) y = Add(s, v)""",
        more=", float[N,5,8] z, bool b",
    ),
    "no_layer": model(" t = Tanh(s) y = Add(s, t)"),
    "doubled": model(" t = MatMul(s, w) y = Add(t, t)"),
    "two_sources": model(" t = MatMul(s, w) u = MatMul(z, w) y = Add(t, u)", more=", float[N,5,8] z"),
    "reshaped": model(" r = Reshape(s, flat) m = MatMul(r, square) b = Reshape(m, back) y = Add(s, b)"),
    "its_shape": model(" t = MatMul(s, w) a = Shape(s) b = Cast<to = 1>(a) c = ReduceMax<keepdims = 0>(b) y = Add(t, c)"),
    "three": model(" t = MatMul(s, w) u = MatMul(s, w) y = Sum(s, t, u)"),
}  # fmt: skip


def found(name: str) -> tuple[Block, ...]:
    return blocks(prepare(MODELS[name], infer_types))


def blocks(prepared: Prepared) -> tuple[Block, ...]:
    return find_blocks(prepared.graph, find_sites(prepared.graph))


# --- which residual connections count, what is one block, and where it begins and ends --------------------------------


@pytest.mark.parametrize("name", ["no_layer", "doubled", "two_sources", "reshaped", "its_shape", "three", "any_size"])
def test_these_additions_are_no_residual_connections(name: str):
    assert found(name) == ()


@pytest.mark.parametrize("name", ["linear", "mlp", "conv_bn", "depthwise", "mnist", "silu", "concat"])
def test_a_model_without_a_residual_stream_has_no_blocks(name: str):
    assert blocks(prepare(tiny.models()[name].model, infer_types)) == ()


@pytest.mark.parametrize(
    ("name", "ends", "why"),
    [
        ("rotary", ["sy"], "an addition inside a residual connection is none"),
        ("parallel", ["sy"], "nor is the sum of attention and MLP before it joins the stream"),
        ("one_by_one", ["sy"], "nor the first of two that join it one by one"),
        ("global_skip", ["su"], "nor a skip over several"),
        ("pre", ["st", "tu"], "attention and the MLP behind it are one block"),
        ("other_attention", ["su", "uy"], "also without a Softmax or a MatMul"),
        ("decoder", ["sr", "ry"], "attention without an MLP behind it is a block of its own"),
        ("mlps", ["st", "ty"], "so is every MLP where nothing mixes tokens"),
        ("post", ["st", "tu"], "a norm behind every addition is inside the last block too"),
        ("prompt", ["st", "uy"], "what is added from outside between blocks is in neither"),
        ("merging", ["st", "uy"], "nor what joins tokens"),
        ("shrinking", ["st", "uy"], "nor what drops tokens"),
        ("pooling", ["st", "uy"], "nor what pools them"),
        ("stages", ["su", "uy"], "neighbours of one shape are a stage, with the Relu behind"),
        ("conv_1d", ["sy"], "or the Clip"),
        ("plain_between", ["st", "ty"], "a Conv between stages is part of the later"),
        ("wider_between", ["st", "ty"], "also where the size stays"),
        ("floor_between", ["st", "uy"], "but not where it makes (length - 1) // 2, which no stride does"),
        ("cropped_between", ["st", "uy"], "nor 14 of 16"),
        ("up_again", ["st", "tv", "py"], "nor on the way up, around other stages"),
        ("towers", ["ou", "sv"], "towers side by side have blocks of their own, in order of their ends"),
    ],
)
def test_blocks_go_from_stream_to_stream(name: str, ends: list[str], why: str):
    assert [block.x + block.y for block in found(name)] == ends, why


# --- what is known of it ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["stages", "plain_between"])
def test_strides_are_known_from_the_sizes(name: str):
    assert [(b.channels, b.strides) for b in found(name)] == [((4, 4), (1, 1)), ((4, 8), (2, 2))]


def test_a_mask_made_outside_is_a_further_input():
    (block,) = found("mask")

    assert (block.inputs, block.y) == (("s", "o"), "y")


def test_what_bodies_read_is_read_by_the_block():
    (block,) = found("body")

    assert block.inputs == ("s", "b", "c")


@pytest.mark.parametrize(
    ("name", "axis", "rank", "strides"),
    [("pre", -1, 3, ()), ("conv_1d", 1, 3, (1,)), ("stages", 1, 4, (1, 1)), ("channels_last_inside", 1, 4, (1, 1))],
)
def test_the_channel_axis_is_that_of_the_stream(name: str, axis: int, rank: int, strides: tuple[int, ...]):
    block = found(name)[0]

    assert (block.channel_axis, block.rank, block.strides) == (axis, rank, strides)


def test_a_wider_shortcut_changes_the_channels():
    (block,) = found("wider")

    assert (block.channels, block.channel_axis) == ((8, 16), -1)


def test_tokens_are_fixed_where_every_length_but_the_first_is_known():
    assert [block.fixed_tokens for block in found("pre")] == [True, True]
    assert [block.fixed_tokens for name in ("shrinking", "stages") for block in found(name)] == [False] * 4


def test_the_last_layer_is_the_one_that_the_stream_is_added_to():
    (block,) = blocks(prepare(tiny.transformer().model, infer_types))

    assert (block.x, block.y, block.name) == ("e", "r2", "block-0")
    assert block.last is not None
    assert (block.last.name, block.last.y) == ("fc2", "m1")


def test_where_a_norm_or_another_reader_comes_between_there_is_no_last_layer():
    read_twice = model(" h = MatMul(s, w) m = MatMul(h, w) t = Add(s, m) u = Neg(m) y = Add(t, u)")

    assert [block.last for block in found("post")] == [None, None]
    assert [block.last for block in blocks(prepare(read_twice, infer_types))] == [None]


def test_nor_where_its_output_is_one_of_the_model():
    shown = model(mlp("s", "y"))
    shown.graph.output.append(onnx.helper.make_tensor_value_info("y_o", onnx.TensorProto.FLOAT, None))

    assert [block.last for block in blocks(prepare(shown, infer_types))] == [None]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/enc.0/attn", "/enc.0/mlp", "/enc.1/attn", "/enc.1/mlp"], ["/enc.0", "/enc.1"]),
        (["/enc/1/attn", "/enc/1/mlp", "/enc/10", "/enc/10"], ["/enc/1", "/enc/10"]),
        (["/enc/a", "/enc/b", "/enc/c", "/enc/c"], ["block-0", "block-1"]),
        (["/a", "/b", "/c", "/c"], ["block-0", "block-1"]),
        (["", "", "", ""], ["block-0", "block-1"]),
    ],
)
def test_a_name_is_the_path_of_the_sites_where_every_block_has_one_of_its_own(paths: list[str], names: list[str]):
    named = model(pre_norm(0, "s", "t") + pre_norm(1, "t", "y"))
    for node in named.graph.node:
        kind, number = node.output[0][0], node.output[0][1:2]
        if kind in "ahm" and number:
            node.name = f"{paths[2 * int(number) + (kind != 'a')]}/{node.output[0]}"

    assert [block.name for block in blocks(prepare(named, infer_types))] == names


# --- the law ---------------------------------------------------------------------------------------------------------


def check(prepared: Prepared, feeds: dict[str, np.ndarray]) -> None:
    """Blocks are in order and share no node, and each, fed with what it says it reads, gives its y and the same numbers."""
    graph = prepared.graph
    named = {name for block in blocks(prepared) for name in (*block.inputs, block.y)} - set(feeds)
    whole = extract(graph, list(feeds), sorted(named | {tensor.name for tensor in graph.outputs}))
    values = feeds | run(to_model(whole, prepared.model), {t.name: feeds[t.name] for t in whole.inputs})
    position = {tensor.name: index for index, node in enumerate(graph.nodes) for tensor in node.outputs}
    seen: set[str] = set()
    last = -1
    for block in blocks(prepared):
        part = extract(graph, list(block.inputs), [block.y])
        nodes = {node.name for node in part.nodes}
        assert sorted(t.name for t in part.inputs) == sorted(block.inputs)
        assert not nodes & seen
        assert last < position[block.y]
        assert np.ndim(values[block.x]) == np.ndim(values[block.y]) == block.rank
        axis = block.channel_axis
        assert (values[block.x].shape[axis], values[block.y].shape[axis]) == block.channels
        if axis == 1:
            steps = zip(values[block.x].shape[2:], block.strides, strict=True)
            assert values[block.y].shape[2:] == tuple(-(-length // step) for length, step in steps)
        else:
            assert values[block.x].shape[:-1] == values[block.y].shape[:-1]
        again = run(to_model(part, prepared.model), {name: values[name] for name in block.inputs})
        np.testing.assert_array_equal(again[block.y], values[block.y])
        seen |= nodes
        last = position[block.y]


@pytest.mark.parametrize("name", MODELS)
def test_every_block_gives_its_output_from_its_inputs(name: str, rng: np.random.Generator):
    prepared = prepare(MODELS[name], infer_types)
    sizes = {"N": 2, "T": 7, "H": 9, "W": 13}
    feeds = {}
    for tensor in prepared.graph.inputs:
        shape = [sizes.get(length, length) for length in tensor.shape]
        feeds[tensor.name] = rng.normal(size=shape).astype(F) if tensor.dtype == F else np.ones(shape, tensor.dtype)

    check(prepared, feeds)


@pytest.mark.parametrize("name", ["transformer", "embedding", "relu_mlp", "residual"])
def test_the_blocks_of_the_tiny_models_do_so_too(name: str):
    subject = tiny.models()[name]
    prepared = prepare(subject.model, infer_types)

    assert len(blocks(prepared)) == 1
    check(prepared, subject.samples[0])


# --- real models -----------------------------------------------------------------------------------------------------


def check_file(path: Path, rng: np.random.Generator) -> list[str]:
    """The names of the file's blocks, the law checked on random numbers."""
    prepared = prepare(onnx.load(path), infer_types)
    feeds = {}
    for tensor in prepared.graph.inputs:
        shape = [length if isinstance(length, int) else 1 if i == 0 else 9 for i, length in enumerate(tensor.shape)]
        feeds[tensor.name] = rng.normal(size=shape).astype(F) if tensor.dtype == F else rng.integers(1, 9, shape)
    check(prepared, feeds)
    return [block.name for block in blocks(prepared)]


@pytest.mark.parametrize(
    ("file", "names"),
    [("vit_digits", [f"/blocks/{i}" for i in range(4)]), ("cnn_digits", [f"block-{i}" for i in range(3)])],
)
def test_the_blocks_of_our_models(file: str, names: list[str], rng: np.random.Generator):
    assert check_file(ROOT / "models" / f"{file}.onnx", rng) == names


@pytest.mark.real
@pytest.mark.parametrize(
    ("file", "names"),
    [
        ("vit_tiny_patch16_224", [f"/blocks.{i}" for i in range(12)]),
        ("kwt1", [f"/blocks.{i}" for i in range(12)]),
        ("stories260k", [f"/layers.{i}" for i in range(5)]),
        ("mobilenet_v2_1.0_224", [f"block-{i}" for i in range(5)]),
        ("cifar10_resnet20", ["/layer1", "/layer2", "/layer3"]),
        ("mnist", []),
    ],
)
def test_the_blocks_of_real_models(file: str, names: list[str], data_dir: Path, rng: np.random.Generator):
    assert check_file(data_dir / f"{file}.onnx", rng) == names
