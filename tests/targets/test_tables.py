"""Embedding tables: which are stored as codes without being asked for, and in how many bits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from equality import stored
from tiny import Tiny, bias, build, weight

from onnxcomp.account import frozen
from onnxcomp.pipeline import quantize
from onnxcomp.recipe import Bits, Recipe, SiteRule, find


def language(words: int) -> Tiny:
    rng = np.random.default_rng(0)
    text = """<ir_version: 10, opset_import: ["" : 21]> g (int64[N,T] ids) => (float[N,T,24] y) {
        [words] e = Gather(table, ids) [places] p = Gather(few, ids) s = Add(e, p) [head] y = MatMul(s, w) }"""
    weights = {"table": bias(rng, words, 64), "few": bias(rng, 50, 64), "w": weight(rng, 64, 24, fan_in=64)}
    return build("language", text, weights, [{"ids": rng.integers(0, 50, size=(1, 6))} for _ in range(8)])


LANGUAGE = language(1024)


@pytest.mark.parametrize(
    ("options", "tables"),
    [
        ({}, {"words": "w8b64"}),
        ({"bits": Bits(4, 8)}, {"words": "w8b64"}),
        ({"bits": Bits(4, None), "zero_points": True}, {"words": "w8b64"}),
        ({"bits": Bits(4, None), "site": (SiteRule("words", bits=Bits(4, None), block=32),)}, {"words": "w4b32"}),
        ({"bits": Bits(4, None), "embeddings": True}, {"words": "w4b32", "places": "w4b32"}),
        ({"embeddings": True}, {"words": "w8b64", "places": "w8b64"}),
        ({"embeddings": False}, {}),
        ({"exclude": ("words",)}, {}),
        *(({"target": name}, {"words": "w8b64"}) for name in ("openvino", "openvino-avx2", "portable", "xnnpack")),
        *(({"target": name}, {}) for name in ("tensorrt", "nnapi", "qnn")),
        ({"compensate": find("xint").compensate}, {"words": "w8b64"}),
    ],
)
def test_large_tables_have_eight_bits_by_default_where_the_target_takes_them(options: dict[str, Any], tables: dict[str, str]):
    recipe = replace(Recipe(target="ort-x86"), **options)

    result = quantize(LANGUAGE.model, LANGUAGE.samples, recipe)

    assert {s.name: s.bits for s in result.report.sites if s.kind == "table"} == tables
    again = quantize(LANGUAGE.model, LANGUAGE.samples, frozen(result.report))
    assert again.model.graph == result.model.graph


def test_a_small_table_is_left_alone():
    tiny = language(1023)

    assert [s.name for s in quantize(tiny.model, tiny.samples, Recipe(target="ort-x86")).report.sites] == ["head"]


def test_eight_bits_of_a_table_lose_next_to_nothing():
    plain, stored = (
        quantize(LANGUAGE.model, LANGUAGE.samples, Recipe(target="ort-x86", embeddings=how)) for how in (False, "auto")
    )

    # Rounding to 8 bits, alone, leaves 44 dB or more of normal numbers whose range is below 6 standard deviations.
    assert stored.report.verification.sqnr_db > plain.report.verification.sqnr_db - 1
    assert stored.report.output_bytes < 0.5 * plain.report.output_bytes


@pytest.mark.parametrize(("bits", "dtype"), [("w8a8", np.uint8), ("w8a16", np.uint16)])
def test_where_all_is_codes_a_table_has_those_of_what_is_picked_from_it(bits: str, dtype: type):
    result = quantize(LANGUAGE.model, LANGUAGE.samples, Recipe(target="qnn", bits=Bits.parse(bits)))

    nodes, values = result.model.graph.node, stored(result.model)
    makers = {output: node for node in nodes for output in node.output}
    for gather in (node for node in nodes if node.op_type == "Gather"):
        codes, *read = makers[gather.input[0]].input
        (quantize_node,) = (node for node in nodes if gather.output[0] in node.input)
        assert (makers[gather.input[0]].op_type, values[codes].dtype) == ("DequantizeLinear", dtype)
        assert [values[name] for name in read] == [values[name] for name in quantize_node.input[1:]]
    assert not any(a.dtype == np.float32 and a.size > 64 for a in values.values())
    assert result.report.verification.expected_db == 200
    assert result.report.verification.sqnr_db > 35
