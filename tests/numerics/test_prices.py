"""Prices are sums over operators."""

from __future__ import annotations

import dataclasses

import pytest

from onnxcomp.numerics.prices import X86, Prices

NONE = Prices(**dict.fromkeys((field.name for field in dataclasses.fields(Prices)), 0))


def only(**prices: float) -> Prices:
    return dataclasses.replace(NONE, **prices)


def test_every_price_is_positive():
    assert all(getattr(X86, field.name) > 0 for field in dataclasses.fields(Prices))


@pytest.mark.parametrize(("spatial", "prices"), [(False, only(stream=2.0)), (True, only(feature=2.0))])
def test_a_block_costs_its_products_and_its_elements(spatial: bool, prices: Prices):
    assert prices.block_ns(100, 7.0, spatial=spatial) == 14.0
    assert only(int8_mac=0.5).block_ns(100, 7.0, spatial=spatial) == 50.0


def test_only_a_transformers_block_costs_its_nodes():
    assert only(nodes=10, node=0.5).block_ns(0, 7.0, spatial=False) == 5.0
    assert only(nodes=10, node=0.5).block_ns(0, 7.0, spatial=True) == 0.0


@pytest.mark.parametrize(
    ("parts", "spatial", "nodes"),
    [
        (["weight"], False, 3),
        (["codes", "scale"], False, 3),
        (["left", "right"], False, 4),
        (["weight", "input_scale"], False, 4),
        (["weight", "factor"], False, 4),
        (["weight", "log"], False, 9),
        (["weight", "unit"], False, 10),
        (["weight"], True, 6),
    ],
)
def test_a_branch_costs_its_nodes(parts: list[str], spatial: bool, nodes: int):
    assert only(node=1.0).branch_ns(parts, 5.0, 7.0, 0.0, spatial=spatial) == nodes


@pytest.mark.parametrize(
    ("part", "price", "count"),
    [
        ("bias", "float_mac", 11),
        ("input_scale", "int8_mac", 11),
        ("input_scale", "quantize", 5),
        ("factor", "channelwise", 5 + 7),
        ("log", "log", 5),
        ("unit", "exp", 7),
        ("spatial", "detour", 7),
    ],
)
def test_a_branch_costs_its_elements(part: str, price: str, count: int):
    """5 elements in, 7 out, 11 multiply-accumulates."""
    parts = ["weight", part]
    assert only(**{price: 1.0}).branch_ns(parts, 5.0, 7.0, 11.0, spatial=part == "spatial") == count
