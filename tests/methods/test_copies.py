"""Offset copies: the float model stays what it is, a narrow quantizer sees more, and what has bits enough is left alone."""

from __future__ import annotations

import numpy as np
from equality import parse

from onnxcomp.graph.convert import to_model
from onnxcomp.graph.edit import Graph
from onnxcomp.graph.prepare import Prepared, prepare
from onnxcomp.graph.sites import find_sites
from onnxcomp.methods.copies import copy_inputs
from onnxcomp.numerics.affine import Scheme
from onnxcomp.numerics.arrays import energies, sqnr_db
from onnxcomp.numerics.ranges import choose
from onnxcomp.numerics.statistics import Histogram
from onnxcomp.runtime import Session, infer_types

RNG = np.random.default_rng(0)
FEEDS = [{"x": RNG.uniform(-1, 1, size=(4, 3, 8, 8)).astype(np.float32)}]


def prepared(channels: int = 3, more: str = "") -> Prepared:
    w = RNG.normal(size=(4, channels, 3, 3)).astype(np.float32)
    text = (
        f"g (float[N,{channels},8,8] x) => (float[N,4,H,W] y) {{ c = Conv<pads = [1, 1, 1, 1]>(x, w) {more or 'y = Relu(c)'} }}"
    )
    return prepare(parse(text, {"w": w}), infer_types)


def outputs(graph: Graph, like: Prepared) -> np.ndarray:
    return Session(to_model(graph, like.model).SerializeToString()).run(FEEDS[0])["y"]


def test_copies_of_the_input_change_nothing_in_float():
    p = prepared()
    want, sites = outputs(p.graph, p), find_sites(p.graph)

    changed, found = copy_inputs(p.graph, sites, {sites[0].name: 4}, FEEDS)

    # float32 sums of some hundred terms: 2^-20 of the signal is 120 dB
    assert sqnr_db(*energies(want, outputs(p.graph, p))) > 100
    assert changed[0].x == p.graph.nodes[-2].inputs[0].name
    assert p.graph.nodes[-2].inputs[1].shape == (4, 12, 3, 3)
    assert found[sites[0].name].reason == "4 copies, each shifted by a part of a step"


def test_the_mean_of_the_copies_codes_is_as_fine_as_two_bits_more():
    p = prepared()
    sites = find_sites(p.graph)

    _, found = copy_inputs(p.graph, sites, {sites[0].name: 4}, FEEDS)

    fit, x = found[sites[0].name].fit, FEEDS[0]["x"]
    assert fit is not None
    q = choose(Histogram.of(x), Scheme(4))
    x = x[np.abs(x) < 0.75]
    mean = np.mean([q.fake(x + d) for d in fit["offsets"][::3]], axis=0)
    # a step a quarter as wide: a sixteenth of the squared error, where nothing is clipped; a third more for 1500 samples
    assert np.square(mean - x).mean() < np.square(q.fake(x) - x).mean() / 12


def test_six_bits_many_channels_and_other_readers_are_left_alone():
    for p, bits in (
        (prepared(), 6),
        (prepared(channels=8), 4),
        (prepared(more="s = Sin(x) t = ReduceMean(s) y = Add(c, t)"), 4),
    ):
        sites = find_sites(p.graph)

        changed, found = copy_inputs(p.graph, sites, {site.name: bits for site in sites}, FEEDS)

        assert changed == sites
        assert not found
