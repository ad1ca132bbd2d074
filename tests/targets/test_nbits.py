"""Weights in blocks, and tables of codes: how they are written down, what computes them, and which targets refuse them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from abstract import attribute, lower, node
from equality import ops, run, stored
from onnx import ModelProto, TensorProto
from tiny import Tiny, bias, build, dense, feeds, weight

from onnxcomp import runtime
from onnxcomp.account import frozen
from onnxcomp.errors import RecipeError
from onnxcomp.graph.weights import tensor_bytes
from onnxcomp.methods.xint import XInt
from onnxcomp.pipeline import Result, quantize
from onnxcomp.recipe import Bits, Recipe, SiteRule
from onnxcomp.report import text
from onnxcomp.strip import strip
from onnxcomp.targets import openvino, tensorrt

Array = np.ndarray


def blocks(codes: str, scale: str, y: str, bits: int = 4, axis: int = 0, size: int = 16) -> str:
    return f" {y} = onnxcomp.Dequantize<bits = {bits}, axis = {axis}, block = {size}>({codes}, {scale}) "


def product(body: str, **constants: object) -> ModelProto:
    """A graph on x [N, 40], whose weight W [40, 8] has the scales ws [3, 8]."""
    return lower(f"(float[N,40] x) => (float[N,8] y) {{ {body} }}", constants)


def codes(rng: np.random.Generator, bits: int, *shape: int) -> Array:
    return rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), size=shape).astype(np.int8)


def scales(*shape: int) -> Array:
    """Powers of two, so that products are exact."""
    return np.resize(np.float32([0.5, 1, 2, 4, 8]), shape)


# --- products --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_weight_in_blocks_is_read_by_dequantize_linear_and_computes_its_formula(rng: np.random.Generator, bits: int):
    w, ws = codes(rng, bits, 40, 8), scales(3, 8)
    x = rng.integers(-8, 8, size=(5, 40)).astype(np.float32)

    model = product(blocks("W", "ws", "w", bits) + "h = MatMul(x, w) y = Add(h, b)", W=w, ws=ws, b=np.ones(8, np.float32))

    assert ops(model) == ["DequantizeLinear", "MatMul", "Sum"]
    (found,) = (i for i in model.graph.initializer if i.name == "W")
    assert found.data_type == (TensorProto.INT4 if bits <= 4 else TensorProto.INT8)
    read = node(model, "DequantizeLinear")
    assert (attribute(read, "axis"), attribute(read, "block_size"), len(read.input)) == (0, 16, 2)
    expected = x @ (w * np.repeat(ws, 16, axis=0)[:40]) + 1
    for optimize in (True, False):  # with faithful sessions activations stay float
        np.testing.assert_allclose(run(model, {"x": x}, optimize=optimize)["y"], expected, rtol=2e-6, atol=1e-4)
    assert [n.op_type for n in runtime.optimized(model.SerializeToString())] == ["MatMulNBits", "Sum"]


def test_zero_points_are_stored_as_wide_as_the_codes(rng: np.random.Generator):
    zero, x = codes(rng, 4, 3, 8), rng.integers(-8, 8, size=(5, 40)).astype(np.float32)
    w = codes(rng, 4, 40, 8)

    model = product(
        "w = onnxcomp.Dequantize<bits = 4, axis = 0, block = 16>(W, ws, wz) y = MatMul(x, w)", W=w, ws=scales(3, 8), wz=zero
    )

    (found,) = (i for i in model.graph.initializer if i.name == "wz")
    assert found.data_type == TensorProto.INT4
    expected = x @ ((w - np.repeat(zero, 16, axis=0)[:40].astype(np.float32)) * np.repeat(scales(3, 8), 16, axis=0)[:40])
    np.testing.assert_allclose(run(model, {"x": x})["y"], expected, rtol=2e-6, atol=1e-4)


def test_products_that_share_a_weight_get_codes_of_their_own(rng: np.random.Generator):
    body = blocks("W", "ws", "w") + "h = MatMul(x, w) e = Exp(x) g = MatMul(e, w) y = Sum(g, h)"

    model = product(body, W=codes(rng, 4, 40, 8), ws=scales(3, 8))

    assert ops(model).count("DequantizeLinear") == 2
    assert {"W", "W.2"} <= {i.name for i in model.graph.initializer}
    assert [n.op_type for n in runtime.optimized(model.SerializeToString())].count("MatMulNBits") == 2


@pytest.mark.parametrize(("bits", "width"), [(2, 4), (3, 4), (5, 8), (6, 8)])
def test_codes_of_a_width_without_a_type_take_their_bits_and_the_kernel_of_the_next_one(
    rng: np.random.Generator, bits: int, width: int
):
    w, ws = codes(rng, bits, 64, 512), scales(4, 512)
    text = "(float[N,64] x) => (float[N,512] y) { " + blocks("W", "ws", "w", bits) + " y = MatMul(x, w) }"

    model = lower(text, {"W": w, "ws": ws})

    assert sum(tensor_bytes(i) for i in model.graph.initializer if i.name.startswith("W.")) == w.size * bits // 8
    (kernel,) = runtime.optimized(model.SerializeToString())
    assert (kernel.op_type, attribute(kernel, "bits")) == ("MatMulNBits", width)
    x = rng.integers(-8, 8, size=(2, 64)).astype(np.float32)
    np.testing.assert_allclose(run(model, {"x": x})["y"], x @ (w * np.repeat(ws, 16, axis=0)), rtol=2e-6, atol=1e-3)


# --- tables ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("zeros", [False, True])
def test_rows_of_a_table_are_gathered_as_codes(rng: np.random.Generator, bits: int, size: int, zeros: bool):
    table, ws = codes(rng, bits, 10, 32), scales(10, 32 // size)
    wz = codes(rng, bits, 10, 32 // size) if zeros else np.zeros_like(ws, np.int8)
    text = (
        f"e = onnxcomp.Dequantize<bits = {bits}, axis = 1, block = {size}>(T, ws{', wz' if zeros else ''}) y = Gather(e, ids)"
    )
    ids = rng.integers(0, 10, size=(2, 3))

    model = lower(f"(int64[N,M] ids) => (float[N,M,32] y) {{ {text} }}", {"T": table, "ws": ws} | ({"wz": wz} if zeros else {}))

    assert (
        sum(tensor_bytes(i) for i in model.graph.initializer if i.name.startswith("T")) == 320 * (bits if bits < 7 else 8) // 8
    )
    expected = (table - np.repeat(wz, size, axis=1).astype(np.float32)) * np.repeat(ws, size, axis=1)
    np.testing.assert_array_equal(run(model, {"ids": ids})["y"], expected[ids])


def test_two_readers_of_a_table_get_rows_of_the_same_codes(rng: np.random.Generator):
    body = blocks("T", "ws", "e", 4, 1) + "[one] a = Gather(e, ids) [two] b = Gather(e, more) y = Sub(a, b)"
    text = f"(int64[N] ids, int64[N] more) => (float[N,32] y) {{ {body} }}"

    model = lower(text, {"T": codes(rng, 4, 10, 32), "ws": scales(10, 2)})

    assert [i.name for i in model.graph.initializer if i.name.startswith("T")] == ["T.bits0"]
    assert np.abs(run(model, {"ids": np.arange(10), "more": np.arange(10)})["y"]).max() == 0


# --- whole models ----------------------------------------------------------------------------------------------------


def wide() -> Tiny:
    """Two layers of 128 inputs, the second without a bias."""
    rng = np.random.default_rng(0)
    text = """ wide (float[N,T,128] x) => (float[N,T,64] y) {
        [fc1] h = MatMul(x, w1)
        [fc1_bias] g = Add(h, b1)
        r = Relu(g)
        [fc2] y = MatMul(r, w2)
    }"""
    weights = dense(rng, "1", 128, 128) | {"w2": weight(rng, 128, 64, fan_in=128)}
    return build("wide", f'<ir_version: 8, opset_import: ["" : 17]>{text}', weights, feeds(rng, 5, 128))


WIDE = wide()


def in_blocks(target: str, bits: int = 4, block: int = 64, **options: object) -> Result:
    return quantize(WIDE.model, WIDE.samples, Recipe(bits=Bits(bits, None), block=block, target=target, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("target", ["ort-x86", "ort-x86-avx2", "ort-arm", "openvino", "portable"])
def test_a_target_that_takes_blocks_reads_their_codes_and_foretells_it(target: str, bits: int):
    report = in_blocks(target, bits, 32).report

    kernel = {"openvino": "FullyConnected" if openvino.is_installed() else "MatMul", "portable": "MatMul"}
    assert {(s.name, s.bits, s.kernel, s.integer) for s in report.sites} == {
        (name, f"w{bits}b32", kernel.get(target, "MatMulNBits"), True) for name in ("fc1", "fc2")
    }
    assert not any("object" in note or "foretold" in note for note in report.notes)
    stored = bits if target[0] == "o" and bits != 7 else max(bits, 4)
    assert (
        report.sites[1].weight_bytes == 128 * 64 * (stored if 128 * 64 * (4 - bits) > 8000 or bits > 3 else 4) // 8 + 4 * 64 * 4
    )


@pytest.mark.parametrize("function", ["Relu(h)", "Clip(h, low, high)", "LeakyRelu(h)"])
def test_a_function_behind_a_product_in_blocks_does_not_hide_its_codes(function: str):
    rng = np.random.default_rng(0)
    body = f"[fc] h = MatMul(x, w) r = {function} y = Neg(r)"
    text = f'<ir_version: 10, opset_import: ["" : 21]> g (float[N,64] x) => (float[N,64] y) {{ {body} }}'
    weights = {"w": weight(rng, 64, 64, fan_in=64), "low": np.float32(-1), "high": np.float32(1)}
    tiny = build("function", text, weights, feeds(rng, 64))

    (site,) = quantize(tiny.model, tiny.samples, Recipe(bits=Bits(4, None), target="ort-x86")).report.sites

    assert (site.kernel, site.reason) == ("MatMulNBits", "")


@pytest.mark.parametrize(
    ("target", "options", "bits"),
    [
        ("ort-x86", {}, "w4b32"),
        ("openvino", {"bits": Bits(3, None)}, "w3b32"),
        ("tensorrt", {}, "w4b64"),
        ("ort-x86", {"bits": Bits(4, 8), "activations": "float"}, "w4b32"),
        ("ort-x86", {"block": 0}, "w4"),
        ("ort-x86", {"bits": Bits(5, None)}, "w5"),
        ("ort-x86", {"compensate": (XInt(),)}, "w4"),
        ("qnn", {}, "w4"),
        ("ort-x86", {"bits": Bits(4, 8), "activations": "dynamic"}, "w4a8"),
    ],
)
def test_narrow_weights_beside_float_activations_are_in_blocks_by_default(target: str, options: dict, bits: str):
    recipe = replace(Recipe(bits=Bits(4, None), target=target, sensitive="asked"), **options)

    assert {site.bits.split(" ")[0] for site in quantize(WIDE.model, WIDE.samples, recipe).report.sites} == {bits}


def test_tensorrt_takes_int4_in_blocks_of_64_and_128():
    report = in_blocks("tensorrt", 3, 64).report

    assert {s.integer for s in report.sites} == {True}
    assert not any("object" in note or "foretold" in note for note in report.notes)
    assert {s.kernel for s in report.sites} == {"runtime_fusion" if tensorrt.installed() is not None else "MatMul"}


@pytest.mark.parametrize("target", ["openvino", "portable", "tensorrt"])
def test_where_the_last_block_would_be_shorter_there_is_a_scale_per_channel(target: str):
    rng = np.random.default_rng(0)
    text = '<ir_version: 10, opset_import: ["" : 21]> g (float[N,72] x) => (float[N,8] y) { [fc] y = MatMul(x, w) }'
    tiny = build("uneven", text, {"w": weight(rng, 72, 8, fan_in=72)}, feeds(rng, 72))

    (site,) = quantize(tiny.model, tiny.samples, Recipe(bits=Bits(4, None), block=64, target=target)).report.sites

    assert site.bits == "w4"


def test_a_bias_behind_a_product_in_blocks_is_folded_and_taken_out_again():
    plain, biased = in_blocks("ort-x86", compensate=()), in_blocks("ort-x86")
    adopted = {d.site for d in biased.report.decisions if d.adopted}

    assert adopted
    assert {d.method for d in biased.report.decisions} == {"bias"}
    stripped = strip(biased.model, ["bias"]).model
    kernels = [n.op_type for n in runtime.optimized(stripped.SerializeToString())]
    assert kernels.count("MatMulNBits") == 2
    assert [n.op_type for n in plain.model.graph.node].count("DequantizeLinear") == 2


def test_an_embedding_is_a_site_that_patterns_and_rules_name():
    rng = np.random.default_rng(0)
    graph = """<ir_version: 10, opset_import: ["" : 21]> g (int64[N,T] ids) => (float[N,T,24] y) {
        [words] e = Gather(table, ids) [head] y = MatMul(e, w) }"""
    weights = {"table": bias(rng, 50, 32), "w": weight(rng, 32, 24, fan_in=32)}
    tiny = build("embedding", graph, weights, [{"ids": rng.integers(0, 50, size=(1, 6))} for _ in range(8)])
    recipe = Recipe(bits=Bits(4, None), block=16, embeddings=True, site=(SiteRule("words", bits=Bits(8, None)),))

    result = quantize(tiny.model, tiny.samples, recipe)
    report, again = result.report, quantize(tiny.model, tiny.samples, frozen(result.report))
    without = quantize(tiny.model, tiny.samples, Recipe(bits=Bits(4, None), block=16)).report

    assert [(s.name, s.kind, s.bits, s.kernel) for s in report.sites] == [
        ("words", "table", "w8b16", "Gather"), ("head", "layer", "w4b16", "MatMulNBits")
    ]  # fmt: skip
    assert report.sites[0].weight_bytes == 50 * 32 + 50 * 2 * 4
    assert [s.name for s in without.sites] == ["head"]
    assert again.model.graph == result.model.graph


@pytest.mark.parametrize("target", ["ort-x86", "qnn", "tensorrt"])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"bits": Bits(4, 8)}, {
            "ort-x86": "fc1: weights in blocks stand beside float activations alone. Write bits = 'w4'.",
            "qnn": "qnn takes no weights of 4 bits in blocks of 32. Leave block out.",
            "tensorrt": "tensorrt takes no weights of 4 bits in blocks of 32, only blocks of 64, 128 and 4 bits or fewer.",
        }),
        ({"bits": Bits(8, None), "block": 128}, {
            "qnn": "qnn takes no weights of 8 bits in blocks of 128. Leave block out.",
            "tensorrt": "tensorrt takes no weights of 8 bits in blocks of 128, only blocks of 64, 128 and 4 bits or fewer.",
        }),
        ({"zero_points": True, "block": 64}, {
            "tensorrt": "zero_points = true cannot be written: tensorrt takes symmetric weights. Leave it out.",
            "qnn": "qnn takes no weights of 4 bits in blocks of 64. Leave block out.",
        }),
        ({"zero_points": True, "block": 0}, {
            "ort-x86": "zero_points = true cannot be written: Only weights in blocks have them. Leave it out.",
        }),
        ({"compensate": (XInt(),)}, {
            "ort-x86": "fc1: the terms of xint have one scale per output channel. Leave xint or block out.",
        }),
    ],
    ids=["activations", "bits", "zero points", "no block", "xint"],
)  # fmt: skip
def test_what_cannot_be_written_in_blocks_is_refused_in_a_sentence(
    target: str, options: dict[str, object], expected: dict[str, str]
):
    if target not in expected:
        return
    given = {"bits": Bits(4, None), "block": 32, "target": target} | options

    with pytest.raises(RecipeError) as caught:
        quantize(WIDE.model, WIDE.samples, Recipe(**given))  # type: ignore[arg-type]

    assert str(caught.value) == expected[target]


def test_a_target_without_tables_of_codes_refuses_embeddings():
    text = (
        '<ir_version: 10, opset_import: ["" : 21]> g (int64[N] ids) => (float[N,8] y) { e = Gather(t, ids) y = MatMul(e, w) }'
    )
    rng = np.random.default_rng(0)
    tiny = build("table", text, {"t": bias(rng, 50, 32), "w": weight(rng, 32, 8, fan_in=32)}, [{"ids": np.arange(4)}] * 4)

    with pytest.raises(RecipeError) as caught:
        quantize(tiny.model, tiny.samples, Recipe(embeddings=True, target="qnn"))

    assert str(caught.value) == "qnn takes no embedding tables of codes. Leave embeddings = true out."


@pytest.mark.parametrize(("bits", "least"), [(3, "1.23"), (4, "1.18"), (5, "1.23"), (8, "1.18")])
def test_a_file_with_blocks_says_what_it_needs(bits: int, least: str):
    """Run in 1.18 to 1.31: 1.18 loads no `block_size`, 1.22 and older no Cast to int4, 1.24 and older no kernel for int8."""
    first, *_, blocks, accuracy = in_blocks("ort-x86", bits, 32).report.requirements

    assert first == f"ONNX Runtime {least} or newer, with graph optimizations enabled (the default)."
    assert blocks == (
        "ONNX Runtime 1.19 or newer for weights in blocks, whose kernels read codes of 4 bits; those of more bits from 1.28 on."
    )
    assert 'session.qdq_matmulnbits_accuracy_level = "1" keeps them float.' in accuracy


def test_only_products_of_codes_need_exact_ones():
    alone, beside = (quantize(WIDE.model, WIDE.samples, Recipe(bits=Bits(4, a), target="ort-x86")) for a in (None, 8))

    assert [sum("VNNI" in need for need in made.report.requirements) for made in (alone, beside)] == [0, 1]


def test_the_report_says_how_many_weights_are_read_as_codes():
    assert "2 of 2 read the codes of their weights" in text.report(in_blocks("ort-x86").report, all_sites=True)


def test_without_data_weights_in_blocks_are_rounded_to_nearest():
    result = quantize(WIDE.model, None, Recipe(bits=Bits(4, None), block=32))

    assert {(s.bits, s.activations) for s in result.report.sites} == {("w4b32", "float")}
    assert [note for note in result.report.notes if "No data" in note] == [
        "No data were given, so weights are rounded to nearest and nothing is compensated. Pass --data for GPTQ."
    ]
    names = stored(result.model)
    assert names["w2/quantized.scale"].shape == (4, 64)
