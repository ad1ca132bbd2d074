"""Prices are sums over operators."""

from __future__ import annotations

import dataclasses

import pytest

from onnxcomp.numerics.prices import X86, Prices

NONE = Prices(**dict.fromkeys((field.name for field in dataclasses.fields(Prices)), 0))
PLAIN = {"integer": False, "scaled": False, "log": False, "exp": False, "spatial": False}


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
    ("options", "products", "nodes"),
    [
        ({}, 1, 3),
        ({}, 2, 4),
        ({"integer": True}, 1, 4),
        ({"scaled": True}, 1, 4),
        ({"log": True}, 1, 9),
        ({"exp": True}, 1, 10),
        ({"spatial": True}, 1, 6),
    ],
)
def test_a_branch_costs_its_nodes(options: dict[str, bool], products: int, nodes: int):
    assert only(node=1.0).branch_ns((5.0, 7.0, 0.0), products, **{**PLAIN, **options}) == nodes


@pytest.mark.parametrize(
    ("options", "price", "count"),
    [
        ({}, "float_mac", 11),
        ({"integer": True}, "int8_mac", 11),
        ({"integer": True}, "quantize", 5),
        ({"scaled": True}, "channelwise", 5 + 7),
        ({"log": True}, "log", 5),
        ({"exp": True}, "exp", 7),
        ({"spatial": True}, "detour", 7),
    ],
)
def test_a_branch_costs_its_elements(options: dict[str, bool], price: str, count: int):
    """5 elements in, 7 out, 11 multiply-accumulates."""
    assert only(**{price: 1.0}).branch_ns((5.0, 7.0, 11.0), 1, **{**PLAIN, **options}) == count
