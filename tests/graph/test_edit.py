"""Edits: the naming law, replacement in scope, the order of nodes, and parts cut out of a graph."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from equality import parse, run
from onnx import ModelProto, checker

from onnxcomp.graph.convert import to_graph, to_model
from onnxcomp.graph.edit import (
    DOMAIN,
    NewNode,
    Tape,
    apply,
    extract,
    insert_after,
    insert_before,
    outer_reads,
    remove,
)

ONE = np.array([1.0, 1.0], np.float32)


def diamond() -> ModelProto:
    """h = -x is read twice: y = exp(h) + tanh(h)."""
    return parse(
        "g (float[N,2] x) => (float[N,2] y) { [neg] h = Neg(x) [exp] e = Exp(h) [tanh] t = Tanh(h) [add] y = Add(e, t) }"
    )


def shift(graph: gs.Graph, tensor: str, consumers: tuple[str, ...] | None = None) -> None:
    """Add one to `tensor`."""
    tape = Tape(f"{tensor}/bias")
    new = tape("Add", tensor, tape.constant("b", ONE))
    apply(graph, "bias", tape, {tensor: new}, consumers)


def wiring(graph: gs.Graph) -> list[tuple[str, list[str], list[str]]]:
    return [(n.op, [t.name for t in n.inputs], [t.name for t in n.outputs]) for n in graph.nodes]


def is_sorted(graph: gs.Graph) -> bool:
    """Whether every node comes behind the makers of what it reads."""
    known = {t.name for t in graph.inputs}
    for node in graph.nodes:
        if any(isinstance(t, gs.Variable) and t.name not in known for t in node.inputs):
            return False
        known |= {t.name for t in node.outputs}
    return True


# --- the tape --------------------------------------------------------------------------------------------------------


def test_a_tape_names_nodes_by_prefix_operator_and_number():
    tape = Tape("fc/nbc")

    first = tape("Abs", "x")
    second = tape("Log", first, base=2)

    assert (first, second) == ("fc/nbc/abs", "fc/nbc/log-1")
    assert tape.nodes == [
        NewNode("Abs", "fc/nbc/abs", ("x",), {}, None),
        NewNode("Log", "fc/nbc/log-1", ("fc/nbc/abs",), {"base": 2}, None),
    ]


def test_a_constant_is_named_by_prefix_and_key():
    tape = Tape("fc/nbc")

    assert tape.constant("scale", ONE) == "fc/nbc.scale"
    assert tape.constants["fc/nbc.scale"].tolist() == ONE.tolist()


def test_an_abstract_node_has_the_domain_that_is_lowered():
    tape = Tape("x/quantized")

    tape.abstract("FakeQuantize", "x", bits=4)

    assert (tape.nodes[0].domain, tape.nodes[0].attrs) == (DOMAIN, {"bits": 4})


# --- the naming law --------------------------------------------------------------------------------------------------


def test_what_replaces_a_tensor_takes_its_name_and_the_old_one_is_called_before():
    graph = to_graph(diamond())

    shift(graph, "h")

    assert wiring(graph) == [
        ("Neg", ["x"], ["h/before-bias"]),
        ("Add", ["h/before-bias", "h/bias.b"], ["h"]),
        ("Exp", ["h"], ["e"]),
        ("Tanh", ["h"], ["t"]),
        ("Add", ["e", "t"], ["y"]),
    ]


def test_an_edited_graph_computes_the_edited_function(rng: np.random.Generator):
    model = diamond()
    graph = to_graph(model)
    x = rng.normal(size=(3, 2)).astype(np.float32)

    shift(graph, "h")

    edited = to_model(graph, model)
    checker.check_model(edited, full_check=True)
    np.testing.assert_array_equal(run(edited, {"x": x})["y"], run(model, {"x": x - 1})["y"])


def test_the_same_edit_twice_leaves_three_names():
    graph = to_graph(diamond())

    shift(graph, "h")
    tape = Tape("h/again")
    new = tape("Add", "h", tape.constant("b", ONE))
    apply(graph, "bias", tape, {"h": new})

    assert [outputs for _, _, outputs in wiring(graph)][:3] == [["h/before-bias"], ["h/before-bias-2"], ["h"]]
    assert is_sorted(graph)


def test_a_replaced_output_of_the_graph_keeps_its_name_type_and_shape():
    graph = to_graph(diamond())

    shift(graph, "y")

    (output,) = graph.outputs
    assert (output.name, output.dtype, output.shape) == ("y", np.float32, ["N", 2])
    assert output.inputs[0].op == "Add"
    assert output.inputs[0].inputs[0].name == "y/before-bias"


def test_a_replaced_input_of_the_graph_keeps_its_name_which_is_the_callers():
    graph = to_graph(diamond())

    shift(graph, "x")

    assert wiring(graph)[0] == ("Add", ["x", "x/bias.b"], ["x/bias/add"])
    assert [t.name for t in graph.inputs] == ["x"]


def test_a_constant_may_be_replaced_by_what_is_computed():
    model = parse("g (float[N,2] x) => (float[N,2] y) { [add] y = Add(x, w) }", {"w": ONE})
    graph, tape = to_graph(model), Tape("w/quantized")
    new = tape("Mul", tape.constant("codes", ONE), tape.constant("scale", 2 * ONE))

    apply(graph, "quantize", tape, {"w": new})

    assert wiring(graph) == [("Mul", ["w/quantized.codes", "w/quantized.scale"], ["w"]), ("Add", ["x", "w"], ["y"])]
    np.testing.assert_array_equal(run(to_model(graph, model), {"x": [[1.0, 2.0]]})["y"], [[3.0, 4.0]])


# --- in scope --------------------------------------------------------------------------------------------------------


def test_a_replacement_for_named_consumers_leaves_the_others_and_the_name_alone():
    graph = to_graph(diamond())

    shift(graph, "h", ("tanh",))

    assert wiring(graph) == [
        ("Neg", ["x"], ["h"]),
        ("Add", ["h", "h/bias.b"], ["h/bias/add"]),
        ("Exp", ["h"], ["e"]),
        ("Tanh", ["h/bias/add"], ["t"]),
        ("Add", ["e", "t"], ["y"]),
    ]


def test_a_consumer_that_reads_a_tensor_twice_is_changed_at_both_places():
    model = parse("g (float[N,2] x) => (float[N,2] y) { [neg] h = Neg(x) [mul] y = Mul(h, h) }")
    graph = to_graph(model)

    shift(graph, "h", consumers=("mul",))

    assert wiring(graph)[-1] == ("Mul", ["h/bias/add", "h/bias/add"], ["y"])


def test_new_nodes_may_read_what_they_replace():
    graph = to_graph(diamond())
    tape = Tape("h/twice")
    inner = tape("Exp", "h")
    new = tape("Add", inner, "h")

    apply(graph, "nbc", tape, {"h": new})

    assert wiring(graph)[1:3] == [
        ("Exp", ["h/before-nbc"], ["h/twice/exp"]),
        ("Add", ["h/twice/exp", "h/before-nbc"], ["h"]),
    ]


@pytest.mark.parametrize("tensor", ["x", "h", "e", "t", "y"])
@pytest.mark.parametrize("consumers", [None, ("add", "exp")])
def test_the_order_of_nodes_stays_topological(tensor: str, consumers: tuple[str, ...] | None):
    graph = to_graph(diamond())

    shift(graph, tensor, consumers=consumers)

    assert is_sorted(graph)


def test_nodes_that_read_two_places_stand_behind_the_later_one():
    graph = to_graph(diamond())
    tape = Tape("e/mixed")
    new = tape("Add", "e", tape("Neg", "h"))

    apply(graph, "mix", tape, {"e": new})

    assert [op for op, _, _ in wiring(graph)] == ["Neg", "Exp", "Neg", "Add", "Tanh", "Add"]
    assert is_sorted(graph)


# --- parts -----------------------------------------------------------------------------------------------------------


def test_a_part_holds_what_its_outputs_need_and_no_more():
    graph = to_graph(diamond())
    for tensor in graph.tensors().values():
        tensor.dtype = np.dtype(np.float32)

    part = extract(graph, ["h"], ["t"])

    assert wiring(part) == [("Tanh", ["h"], ["t"])]
    assert ([t.name for t in part.inputs], [t.name for t in part.outputs]) == (["h"], ["t"])


def test_inputs_that_a_part_does_not_read_are_left_out():
    part = extract(to_graph(diamond()), ["x", "h"], ["t"])

    assert [t.name for t in part.inputs] == ["h"]


def test_a_part_that_passes_an_input_on_has_it_as_input_and_output():
    part = extract(to_graph(diamond()), ["x", "h"], ["h", "e"])

    assert ([t.name for t in part.inputs], [t.name for t in part.outputs]) == (["h"], ["h", "e"])


def test_changing_a_part_leaves_the_graph_alone():
    graph = to_graph(diamond())
    before = wiring(graph)

    shift(extract(graph, ["x"], ["y"]), "h")

    assert wiring(graph) == before


BRANCHES = """g (float[2] x, bool c) => (float[2] y) {
    [neg] h = Neg(x)
    [exp] e = Exp(h)
    [if] y = If (c) <
        then_branch = inner () => (float[2] a) { a = Add(h, w) },
        else_branch = other () => (float[2] b) { b = Identity(e) }
    >
}"""


def test_a_control_flow_body_reads_tensors_of_the_graph():
    graph = to_graph(parse(BRANCHES, {"w": ONE}))
    (branch,) = (n for n in graph.nodes if n.op == "If")

    assert [t.name for t in outer_reads(branch, graph.tensors())] == ["h", "e"]


def test_a_replaced_tensor_is_replaced_in_control_flow_bodies_too():
    model = parse(BRANCHES, {"w": ONE})
    graph = to_graph(model)
    feeds = {"x": np.array([1, -2], np.float32), "c": np.array(True)}

    shift(graph, "h")

    edited = to_model(graph, model)
    checker.check_model(edited, full_check=True)
    np.testing.assert_array_equal(run(edited, feeds)["y"], run(model, feeds)["y"] + 1)


def test_a_part_holds_what_its_control_flow_bodies_read():
    model = parse(BRANCHES, {"w": ONE})
    graph = to_graph(model)
    feeds = {"x": np.array([1, -2], np.float32)}

    part = to_model(extract(graph, ["x", "c"], ["y"]), model)

    assert [n.op_type for n in part.graph.node] == ["Neg", "Exp", "If"]
    for c in (True, False):
        feed = feeds | {"c": np.array(c)}
        np.testing.assert_array_equal(run(part, feed)["y"], run(model, feed)["y"])


def test_a_part_may_begin_at_a_tensor_that_only_a_body_reads():
    model = parse(BRANCHES, {"w": ONE})
    graph = to_graph(model)
    graph.tensors()["h"].dtype = graph.tensors()["e"].dtype = np.dtype(np.float32)

    part = extract(graph, ["c", "h", "e"], ["y"])

    assert [t.name for t in part.inputs] == ["c", "h", "e"]
    assert [n.op for n in part.nodes] == ["If"]


# --- single nodes ----------------------------------------------------------------------------------------------------


def node(graph: gs.Graph, name: str) -> gs.Node:
    return next(n for n in graph.nodes if n.name == name)


def test_nodes_are_put_in_front_of_and_behind_another():
    graph = to_graph(diamond())

    insert_before(graph, node(graph, "tanh"), [gs.Node("A"), gs.Node("B")])
    insert_after(graph, node(graph, "tanh"), [gs.Node("C")])

    assert [n.op for n in graph.nodes] == ["Neg", "Exp", "A", "B", "Tanh", "C", "Add"]


def test_a_removed_node_is_off_its_tensors():
    graph = to_graph(diamond())

    remove(graph, node(graph, "tanh"))

    assert [n.op for n in graph.nodes] == ["Neg", "Exp", "Add"]
    assert [n.op for n in graph.tensors()["h"].outputs] == ["Exp"]
    assert graph.tensors()["t"].inputs == []
