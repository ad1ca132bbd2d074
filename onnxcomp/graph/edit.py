"""Edits: how a method says what it wants changed, and the one function that changes a graph.

A method records new nodes on a `Tape` and names what they replace; `apply` writes the edit into the graph under the
naming law: a float tensor's name always names its best approximation. When an edit replaces `h` everywhere, the old
value becomes `h/before-bias` and the new one is `h`; when it replaces `h` for some consumers only, `h` keeps its name.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp.graph.mapped import keep
from onnxcomp.graph.types import Tensor as Tensor

Graph = gs.Graph
Node = gs.Node
Variable = gs.Variable
Constant = gs.Constant
"""The in-memory graph that everything above this layer works on, its operators, and its two kinds of tensors."""
DOMAIN = "onnxcomp"
"""Domain of the abstract quantizers; it exists in memory only and is lowered before a file is written."""


@dataclass(frozen=True)
class NewNode:
    """One node to add: its inputs are names of the graph's tensors, of the tape's constants or of other new nodes, and
    its one output has its own name.
    """

    op: str
    name: str
    inputs: tuple[str, ...]
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
        self.nodes.append(NewNode(op, name, inputs, attrs, domain))
        return name

    def abstract(self, op: str, *inputs: str, **attrs: object) -> str:
        """Add one abstract quantizer (see `DOMAIN`)."""
        return self(op, *inputs, domain=DOMAIN, **attrs)

    def constant(self, key: str, value: np.ndarray) -> str:
        """Add an initializer named `{site}/{method}.{key}`."""
        name = f"{self.prefix}.{key}"
        self.constants[name] = np.asarray(value)
        return name


@dataclass
class Nodes:
    """New nodes that stand for one: they are called after `name` and their operator, what they make after it too."""

    name: str
    made: list[Node] = field(default_factory=list)

    def __call__(self, op: str, output: str | Tensor, *inputs: Tensor, dtype: type = np.float32, **attrs: object) -> Tensor:
        """Add one node that makes `output`, a tensor or the last part of the name of a new one."""
        if isinstance(output, str):
            output = Variable(f"{self.name}/{output}", dtype=np.dtype(dtype))
        self.made.append(Node(op, f"{self.name}/{op}", attrs=attrs, inputs=list(inputs), outputs=[output]))
        return output


def tensors_of(graph: Graph) -> dict[str, Tensor]:
    """Every tensor of the graph by name, in the order of its nodes: what `graph.tensors()` gives, twenty times as fast."""
    found = {tensor.name: tensor for tensor in graph.inputs}
    for node in graph.nodes:
        for tensor in (*node.inputs, *node.outputs):
            found[tensor.name] = tensor
    found |= {tensor.name: tensor for tensor in graph.outputs}
    found.pop("", None)
    return found


def apply(graph: Graph, label: str, tape: Tape, replaced: Mapping[str, str], consumers: Collection[str] | None = None) -> None:
    """Write what the tape holds into `graph`, in place, behind the naming law above. The graph stays topologically sorted.

    label      the method's name
    replaced   old value -> the tape's value that takes its place
    consumers  the nodes for which it does; None: all
    """
    tensors = tensors_of(graph)
    weights = [tensors[name].values for name in replaced if isinstance(tensors.get(name), Constant)]
    constants = {name: Constant(name, keep(value, *weights)) for name, value in tape.constants.items()}
    values: dict[str, Tensor] = {**tensors, **constants}
    values |= {new.name: Variable(new.name, dtype=np.dtype(np.float32)) for new in tape.nodes}
    nodes = [
        Node(new.op, new.name, dict(new.attrs), [values[name] for name in new.inputs], [values[new.name]], domain=new.domain)
        for new in tape.nodes
    ]
    added = {id(node) for node in nodes}
    makers = {id(maker) for node in nodes for tensor in node.inputs for maker in tensor.inputs}
    position = max((i + 1 for i, node in enumerate(graph.nodes) if id(node) in makers), default=0)
    for old, new in ((values[before], values[after]) for before, after in replaced.items()):
        replace_uses(old, new, [n for n in old.outputs if id(n) not in added and (consumers is None or n.name in consumers)])
        if consumers is not None or any(old is tensor for tensor in graph.inputs):  # an input's name is the caller's
            continue
        if isinstance(old, Variable) and isinstance(new, Variable):
            new.dtype, new.shape = old.dtype, old.shape
        graph.outputs[:] = [new if tensor is old else tensor for tensor in graph.outputs]
        old.name, new.name = fresh_name(f"{old.name}/before-{label}", set(tensors), "-"), old.name
    graph.nodes[position:position] = nodes


def extract(graph: Graph, inputs: list[str], outputs: list[str]) -> Graph:
    """The part of the sorted `graph` that computes `outputs` from `inputs`, as a copy that may be changed freely.

    Its inputs are those of `inputs` that are really read; they must have a known dtype. Weights are shared, not copied.
    """
    tensors = tensors_of(graph)
    given, used = {id(tensors[name]) for name in inputs}, {id(tensors[name]) for name in outputs}
    nodes: list[Node] = []
    for node in reversed(graph.nodes):
        if any(id(tensor) in used and id(tensor) not in given for tensor in node.outputs):
            nodes.append(node)
            used |= {id(tensor) for tensor in (*node.inputs, *outer_reads(node, tensors))}
    read = [tensors[name] for name in inputs if id(tensors[name]) in used]
    return Graph(nodes[::-1], read, [tensors[name] for name in outputs], opset=graph.opset).copy()


def outer_reads(node: Node, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """Tensors that a control-flow body reads from this graph by name."""
    reads: list[Tensor] = []
    for body in [value for value in node.attrs.values() if isinstance(value, Graph)]:
        inner = {t.name for n in body.nodes for t in n.outputs} | {t.name for t in body.inputs}
        found = [t for n in body.nodes for t in (*n.inputs, *outer_reads(n, tensors))]
        reads += [tensors[t.name] for t in (*found, *body.outputs) if t.name in tensors and t.name not in inner]
    return reads


def fresh_name(stem: str, taken: set[str], mark: str = "_") -> str:
    """The stem, or the first of stem_2, stem_3 ... that is not taken; it is taken then."""
    number, name = 1, stem
    while name in taken:
        number += 1
        name = f"{stem}{mark}{number}"
    taken.add(name)
    return name


def replace_uses(old: Tensor, new: Tensor, readers: Iterable[Node] | None = None) -> None:
    """Let `readers`, by default all there are, read `new` in place of `old`."""
    for node in list(old.outputs) if readers is None else readers:
        for index, tensor in enumerate(node.inputs):
            if tensor is old:
                node.inputs[index] = new


def detach(node: Node) -> None:
    """Cut the node off its tensors; the graph's `cleanup` then takes it out of the graph."""
    node.inputs.clear()
    node.outputs.clear()


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
    detach(node)


def _position(graph: Graph, node: Node) -> int:
    return next(index for index, found in enumerate(graph.nodes) if found is node)
