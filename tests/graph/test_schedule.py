"""The schedule: every node once, the fewest live tensors, and walking the steps is running the model."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import tiny
from equality import parse, run

from onnxcomp.graph.convert import to_graph, to_model
from onnxcomp.graph.edit import extract, outer_reads
from onnxcomp.graph.prepare import Prepared, prepare
from onnxcomp.graph.schedule import Step, schedule
from onnxcomp.graph.sites import Site, find_sites
from onnxcomp.runtime import infer_types

TINY = tiny.models()
every_model = pytest.mark.parametrize("name", TINY)


def steps_of(name: str) -> tuple[Prepared, tuple[Step, ...]]:
    prepared = prepare(TINY[name].model, infer_types)
    return prepared, schedule(prepared.graph, {site.name: site for site in find_sites(prepared.graph)})


def part(graph: gs.Graph, step: Step) -> gs.Graph:
    return extract(graph, list(step.live_in), list(step.computed))


@every_model
def test_every_node_runs_exactly_once(name: str):
    prepared, steps = steps_of(name)

    ran = [node.name for step in steps if step.computed for node in part(prepared.graph, step).nodes]

    assert sorted(ran) == sorted(node.name for node in prepared.graph.nodes)


@every_model
def test_walking_the_steps_part_by_part_equals_running_the_whole_model(name: str):
    prepared, steps = steps_of(name)
    feed = TINY[name].samples[0]
    live = dict(feed)

    for step in steps:
        assert set(step.live_in) <= set(live)
        live = {key: live[key] for key in step.live_in}
        if step.computed:
            model = to_model(part(prepared.graph, step), prepared.model)
            wanted = {t.name for t in model.graph.input}
            live |= run(model, {key: live[key] for key in live if key in wanted})

    for key, expected in run(prepared.model, feed).items():
        np.testing.assert_array_equal(live[key], expected)


@every_model
def test_a_tensor_is_alive_exactly_from_its_maker_to_its_last_reader(name: str):
    """Told anew from the nodes: a name is alive at a cut if it was made before it and is read at it or later."""
    prepared, steps = steps_of(name)
    graph = prepared.graph
    heads = {site.name for site in find_sites(graph)}
    tensors, results = graph.tensors(), [t.name for t in graph.outputs]
    starts = [0, *(i for i, node in enumerate(graph.nodes) if node.name in heads)]

    for step, start in zip(steps, starts, strict=True):
        made = {t.name for node in graph.nodes[:start] for t in node.outputs} | {t.name for t in graph.inputs}
        later = graph.nodes[start:]
        read = {t.name for node in later for t in [*node.inputs, *outer_reads(node, tensors)]} | set(results)
        assert set(step.live_in) == made & read
        assert len(step.live_in) == len(set(step.live_in))


def test_a_step_begins_with_its_site_and_what_the_site_reads_is_alive():
    _, steps = steps_of("residual")

    assert [(s.index, s.site and s.site.name, s.reads, s.live_in, s.computed) for s in steps] == [
        (0, None, (), ("x",), ()),
        (1, "stem", ("x",), ("x",), ("rs",)),
        (2, "conv1", ("rs",), ("rs",), ("r1",)),
        (3, "conv2", ("r1",), ("rs", "r1"), ("y",)),
    ]


def test_a_head_without_a_site_is_a_cut():
    graph = to_graph(parse("g (float[2] x) => (float[2] y) { [a] h = Neg(x) [b] k = Exp(h) [c] y = Tanh(k) }"))

    steps = schedule(graph, {"c": None})

    assert [(s.site, s.reads, s.live_in, s.computed) for s in steps] == [
        (None, (), ("x",), ("k",)),
        (None, ("k",), ("k",), ("y",)),
    ]


def test_without_heads_the_whole_model_is_one_step():
    graph = to_graph(parse("g (float[2] x) => (float[2] y) { [a] h = Neg(x) [b] y = Exp(h) }"))

    assert schedule(graph, {}) == (Step(0, "", None, (), ("x",), ("y",)),)


def test_graph_outputs_are_alive_to_the_end():
    graph = to_graph(parse("g (float[2] x) => (float[2] h, float[2] y) { [a] h = Neg(x) [b] k = Exp(x) [c] y = Tanh(k) }"))

    steps = schedule(graph, {"b": None, "c": None})

    assert [s.live_in for s in steps] == [("x",), ("x", "h"), ("h", "k")]


def test_an_input_that_is_not_read_again_is_dropped():
    graph = to_graph(parse("g (float[2] x, float[2] z) => (float[2] y) { [a] h = Neg(z) [b] y = Add(h, x) }"))

    steps = schedule(graph, {"b": Site("b", "Add", "join", ("h", "x"), "y", "y", 1)})

    assert [s.live_in for s in steps] == [("x", "z"), ("x", "h")]


def test_what_a_control_flow_body_reads_stays_alive():
    text = """g (float[2] x, bool c) => (float[2] y) {
        [neg] h = Neg(x) [exp] e = Exp(x)
        [if] y = If (c) <
            then_branch = inner () => (float[2] a) { a = Neg(h) },
            else_branch = other () => (float[2] b) { b = Identity(e) }
        >
    }"""

    steps = schedule(to_graph(parse(text)), {"if": None})

    assert steps[1].live_in == ("c", "h", "e")
