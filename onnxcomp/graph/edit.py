"""Edits: how a method says what it wants changed, and the one function that changes a graph.

A method records new nodes on a `Tape` and names what they replace; `apply` writes the edit into the graph under the
naming law: a float tensor's name always names its best approximation. When an edit replaces `h` everywhere, the old
value becomes `h/before-bias` and the new one is `h`; when it replaces `h` for some consumers only, `h` keeps its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp.graph.types import Tensor as Tensor

Graph = gs.Graph
Node = gs.Node
Variable = gs.Variable
Constant = gs.Constant
"""The in-memory graph that everything above this layer works on, its operators, and its two kinds of tensors."""
DOMAIN = "onnxcomp"
"""Domain of the abstract quantizers; it exists in memory only and is lowered before a file is written."""


@dataclass(frozen=True)
class Replacement:
    """`old` is replaced by the tape's value `new`, for every consumer or for the named nodes only."""

    old: str
    new: str
    consumers: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Edit:
    """New nodes and constants, and what they replace. `label` is the method's name."""

    label: str
    nodes: tuple[NewNode, ...]
    constants: Mapping[str, np.ndarray]
    replacements: tuple[Replacement, ...]


@dataclass(frozen=True)
class NewNode:
    """One node to add: its inputs are names of the graph's tensors, of the edit's constants or of other new nodes."""

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: Mapping[str, object]
    domain: str | None


@dataclass
class Tape:
    """Records nodes in the order in which a method writes them: `y = op("Add", x, b)`. Values are names."""

    prefix: str
    nodes: list[NewNode] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)

    def __call__(self, op: str, *inputs: str, domain: str | None = None, **attrs: object) -> str:
        """Add one node of one output; return the output's name."""
        name = f"{self.prefix}/{op.lower()}-{len(self.nodes)}" if self.nodes else f"{self.prefix}/{op.lower()}"
        self.nodes.append(NewNode(op, name, inputs, (name,), attrs, domain))
        return name

    def abstract(self, op: str, *inputs: str, **attrs: object) -> str:
        """Add one abstract quantizer (see `DOMAIN`)."""
        return self(op, *inputs, domain=DOMAIN, **attrs)

    def constant(self, key: str, value: np.ndarray) -> str:
        """Add an initializer named `{site}/{method}.{key}`."""
        name = f"{self.prefix}.{key}"
        self.constants[name] = np.asarray(value)
        return name


def apply(graph: gs.Graph, edit: Edit) -> None:
    """Write `edit` into `graph`, in place, behind the naming law above. The graph stays topologically sorted."""
    tensors = graph.tensors()
    values: dict[str, gs.Tensor] = {name: gs.Constant(name, value) for name, value in edit.constants.items()}

    def value(name: str) -> gs.Tensor:
        if name not in values:
            values[name] = tensors[name]
        return values[name]

    for new in edit.nodes:
        for name in new.outputs:
            values[name] = gs.Variable(name, dtype=np.dtype(np.float32))
    new_nodes = [
        gs.Node(
            new.op,
            new.name,
            attrs=dict(new.attrs),
            inputs=[value(name) for name in new.inputs],
            outputs=[value(name) for name in new.outputs],
            domain=new.domain,
        )
        for new in edit.nodes
    ]
    added = {id(node) for node in new_nodes}
    position = _insert_position(graph, new_nodes, added)
    for replacement in edit.replacements:
        _replace(graph, tensors[replacement.old], value(replacement.new), replacement, added, edit.label, tensors)
    graph.nodes[position:position] = new_nodes


def _insert_position(graph: gs.Graph, new_nodes: list[gs.Node], added: set[int]) -> int:
    """Behind the last producer of anything that the new nodes read."""
    producers = {id(p) for n in new_nodes for t in n.inputs for p in t.inputs if id(p) not in added}
    return max((i + 1 for i, node in enumerate(graph.nodes) if id(node) in producers), default=0)


def _replace(
    graph: gs.Graph,
    old: gs.Tensor,
    new: gs.Tensor,
    how: Replacement,
    added: set[int],
    label: str,
    taken: Mapping[str, gs.Tensor],
) -> None:
    wanted = None if how.consumers is None else set(how.consumers)
    for node in list(old.outputs):
        if id(node) in added or (wanted is not None and node.name not in wanted):
            continue
        for index, tensor in enumerate(node.inputs):
            if tensor is old:
                node.inputs[index] = new
    if wanted is not None:
        return
    if isinstance(old, gs.Variable) and isinstance(new, gs.Variable):
        new.dtype, new.shape = old.dtype, old.shape
    for index, tensor in enumerate(graph.outputs):
        if tensor is old:
            graph.outputs[index] = new
    before, count = f"{old.name}/before-{label}", 1
    while before in taken:
        count += 1
        before = f"{old.name}/before-{label}-{count}"
    old.name, new.name = before, old.name


def extract(graph: gs.Graph, inputs: list[str], outputs: list[str]) -> gs.Graph:
    """The part of `graph` that computes `outputs` from `inputs`, as a copy that may be changed freely.

    Its inputs are those of `inputs` that are really read; they must have a known dtype. Weights are shared, not copied.
    """
    tensors = graph.tensors()
    stop = {id(tensors[name]) for name in inputs}
    needed: set[int] = set()
    pending = [tensors[name] for name in outputs]
    while pending:
        tensor = pending.pop()
        if id(tensor) in stop:
            continue
        for node in tensor.inputs:
            if id(node) not in needed:
                needed.add(id(node))
                pending.extend(node.inputs)
                pending.extend(outer_reads(node, tensors))
    nodes = [node for node in graph.nodes if id(node) in needed]
    used = {id(t) for node in nodes for t in [*node.inputs, *outer_reads(node, tensors)]} | {id(tensors[n]) for n in outputs}
    part = gs.Graph(
        nodes=nodes,
        inputs=[tensors[name] for name in inputs if id(tensors[name]) in used],
        outputs=[tensors[name] for name in outputs],
        name=graph.name,
        opset=graph.opset,
        import_domains=graph.import_domains,
        ir_version=graph.ir_version,
    )
    return part.copy()


def outer_reads(node: gs.Node, tensors: Mapping[str, gs.Tensor]) -> list[gs.Tensor]:
    """Tensors that a control-flow body reads from this graph by name."""
    reads = []
    for body in node.attrs.values():
        if isinstance(body, gs.Graph):
            inner = {t.name for n in body.nodes for t in n.outputs} | {t.name for t in body.inputs}
            for inner_node in body.nodes:
                reads += [tensors[t.name] for t in inner_node.inputs if t.name in tensors and t.name not in inner]
                reads += outer_reads(inner_node, tensors)
            reads += [tensors[t.name] for t in body.outputs if t.name in tensors and t.name not in inner]
    return reads


def insert_before(graph: Graph, node: Node, new: Sequence[Node]) -> None:
    """Put nodes in front of `node` in the graph's order."""
    at = _position(graph, node)
    graph.nodes[at:at] = new


def insert_after(graph: Graph, node: Node, new: Sequence[Node]) -> None:
    """Put nodes behind `node` in the graph's order."""
    at = _position(graph, node) + 1
    graph.nodes[at:at] = new


def remove(graph: Graph, node: Node) -> None:
    """Take `node` out of the graph and off its tensors."""
    del graph.nodes[_position(graph, node)]
    node.inputs.clear()
    node.outputs.clear()


def _position(graph: Graph, node: Node) -> int:
    return next(index for index, found in enumerate(graph.nodes) if found is node)
