"""Blocks: stretches of the model from one tensor of the residual stream to the next, found without names.

A residual connection is an Add of two activations that both come from one tensor s, one of them by a chain of operators
with a single activation each (none at all, a norm, a 1x1 Conv, Slice and Pad), with a layer in between. Of nested ones
the outermost counts, unless it spans several in a row, as a skip over a whole network does.

In a transformer, whose channels come last, one that mixes tokens (attention) and a next one that does not (MLP) are one
block. In a CNN, neighbours that end in the same shape are one stage, and the way from stage to stage is part of the later.
A block ends at the Add, or behind the norm or activation that follows it everywhere.

Limits: shapes must be known as far as rank and channels, in a CNN the spatial ones too; x and y have the same rank and, in a
transformer, as many tokens, and where that is not so there is no block. What changes the shape between two blocks of a
transformer is in neither.
"""

import functools
import itertools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp.graph.edit import extract, outer_reads, tensors_of
from onnxcomp.graph.sites import Site

_NORMS = ("LayerNormalization", "RMSNormalization", "BatchNormalization", "InstanceNormalization", "GroupNormalization")
_ACTIVATIONS = ("Relu", "Clip", "LeakyRelu", "PRelu", "Elu", "Gelu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Erf")
_PASSED = (*_ACTIVATIONS, "Min", "MaxPool", "GlobalAveragePool", "ReduceMean", "Flatten", "Reshape", "Squeeze", "Transpose")
CHAIN = 6
"""Layers in a row that are one stretch."""
_SAME_SHAPE = (*_NORMS, *_ACTIVATIONS, "Add", "Sub", "Mul", "Div", "Sum")
"""Operators whose output has the shape of what they read."""


@dataclass(frozen=True)
class Block:
    """A stretch of the model with one stream tensor in and one out. Tensor names are the float model's."""

    name: str
    inputs: tuple[str, ...]
    """What the stretch reads from outside it: the stream first, then side tensors such as an attention mask."""
    y: str
    """The stream tensor behind it."""
    channel_axis: int
    """The channel axis of x and y: 1 in a CNN, -1 elsewhere."""
    rank: int
    """Rank of x and y."""
    channels: tuple[int, int] = (0, 0)
    """Channels of x and of y."""
    strides: tuple[int, ...] = ()
    """By how much each spatial axis shrinks from x to y, in a CNN; empty elsewhere."""
    fixed_tokens: bool = False
    """Whether every axis of y but the first has the same length in every run, so that T of [N, T, C] is a constant."""
    last: Site | None = None
    """The layer whose output is added to the stream to give y, and read by nothing else: a bias of y may go into its."""
    macs: int = 0
    """Multiplications of its layers for one sample; filled in by the walk."""
    op: str = "block"
    kind: str = "block"
    """`block`, `output` where it is the whole model, or `rest` for layers outside all blocks."""

    @property
    def x(self) -> str:
        """The stream tensor in front of it."""
        return self.inputs[0]


def find_blocks(graph: gs.Graph, sites: Sequence[Site]) -> tuple[Block, ...]:
    """The blocks of the main graph around `sites`, in graph order; empty where there is no residual stream.

    The graph is prepared: sorted, its nodes named, the types of its tensors known. Blocks share no node.
    """
    flow = _Flow(graph, sites)
    units = _outermost(flow, [unit for node in graph.nodes if (unit := _unit(flow, node)) is not None])
    near = (flow.between(a.y, b.s) for a, b in itertools.pairwise(units) if flow.carries(a.y, b.s))
    tails = [*([node.op for node in nodes] for nodes in itertools.islice(near, 1)), ["Relu"], ["Clip"], []]
    blocks: list[Block] = []
    taken: set[str] = set()
    for unit in sorted(_joined(flow, units), key=lambda unit: flow.end(unit.y)):
        y = next(tensor for tail in tails if (tensor := _behind(unit.y, tail)))
        ends = [flow.tensors[block.y] for block in reversed(blocks) if block.channel_axis == unit.axis == 1]
        for x in (*(end for end in ends if flow.leads(end, unit.s) and _strides(end, y)), unit.s):
            nodes = flow.between(x, y)
            if taken.isdisjoint(node.name for node in nodes):
                blocks.append(_block(flow, x, y, unit, nodes))
                taken.update(node.name for node in nodes)
                break
    named = all(block.name for block in blocks)
    return tuple(block if named else replace(block, name=f"block-{index}") for index, block in enumerate(blocks))


def find_rest(graph: gs.Graph, layers: Sequence[Site], blocks: Sequence[Block]) -> tuple[Block, ...]:
    """The `layers` that are in none of the blocks as stretches of their own: up to `CHAIN` in a row, each read by the next
    alone, to behind the activation or pooling that follows.
    """
    within = {n.name for block in blocks if block.kind == "block" for n in extract(graph, [*block.inputs], [block.y]).nodes}
    found, tensors, length = list[Block](), tensors_of(graph), 0
    for site in (site for site in layers if site.name not in within):
        y = tensors[site.y]
        while len(y.outputs) == 1 and y.outputs[0].op in _PASSED and _activations(y.outputs[0]) == [y]:
            y = y.outputs[0].outputs[0]
        follows = length < CHAIN and bool(found) and site.inputs == (found[-1].y,) and len(tensors[found[-1].y].outputs) == 1
        first, length = (found.pop(), length + 1) if follows else (site, 1)
        found.append(Block(first.name, first.inputs, y.name, site.channel_axis, site.rank, kind="rest"))
    return tuple(found)


@dataclass(frozen=True, eq=False)
class _Unit:
    """One residual connection, or several in a row: what lies between a stream tensor and the Add that joins both ways."""

    s: gs.Tensor
    y: gs.Tensor
    made: frozenset[str]
    """The tensors in between, y included."""
    axis: int
    mixes: bool
    """Whether values of one token reach another's, as in attention."""


class _Flow:
    """Which tensor of a sorted graph depends on which: a bit per input and per node, and for each tensor the mask of all
    that it is made from. Its own is the highest.
    """

    def __init__(self, graph: gs.Graph, sites: Sequence[Site]) -> None:
        self.nodes, self.tensors, self.sites = graph.nodes, graph.tensors(), {site.name: site for site in sites}
        self.outputs, self.inputs = {tensor.name for tensor in graph.outputs}, len(graph.inputs)
        self._masks = {tensor.name: 1 << index for index, tensor in enumerate(graph.inputs)}
        self._values = dict(self._masks)
        for index, node in enumerate(self.nodes, self.inputs):
            read = self.reads(node)
            for masks, tensors in ((self._masks, read), (self._values, [t for t in read if t.dtype == np.float32])):
                mask = functools.reduce(operator.or_, (masks.get(tensor.name, 0) for tensor in tensors), 1 << index)
                masks |= {tensor.name: mask for tensor in node.outputs}

    def reads(self, node: gs.Node) -> list[gs.Tensor]:
        """The variables that the node or its bodies read."""
        return [t for t in [*node.inputs, *outer_reads(node, self.tensors)] if isinstance(t, gs.Variable) and not t.is_empty()]

    def end(self, x: gs.Tensor) -> int:
        """How many nodes there are up to the one that makes x."""
        return max(self._masks[x.name].bit_length() - self.inputs, 0)

    def leads(self, x: gs.Tensor, y: gs.Tensor, *, values: bool = False) -> bool:
        """Whether y is x or is made from it; with `values`, not from its shape alone."""
        made = self._values if values else self._masks
        return bool(made.get(y.name, 0) >> (self._masks[x.name].bit_length() - 1) & 1)

    def between(self, x: gs.Tensor, y: gs.Tensor) -> list[gs.Node]:
        """The nodes that depend on x and on which y depends, in order."""
        nodes = self.nodes[self.end(x) : self.end(y)]
        return [n for n in nodes if any(self.leads(x, t) for t in self.reads(n)) and any(self.leads(t, y) for t in n.outputs)]

    def carries(self, x: gs.Tensor, y: gs.Tensor) -> bool:
        """Whether y is x, or what norms and activations make of it alone."""
        alone = (n.op in _SAME_SHAPE and all(self.leads(x, t) for t in self.reads(n)) for n in self.between(x, y))
        return self.leads(x, y) and _agree(x, y) and all(alone)


def _unit(flow: _Flow, join: gs.Node) -> _Unit | None:
    operands, y = _activations(join), join.outputs[0]
    if join.op not in ("Add", "Sum") or len(operands) != 2:
        return None
    s = next((s for a, b in (operands, operands[::-1]) for s in _chain(a) if flow.leads(s, b, values=True)), None)
    if s is None or not s.shape or len(s.shape) != len(y.shape or ()):
        return None
    nodes = flow.between(s, y)
    sites = [flow.sites[node.name] for node in nodes if node.name in flow.sites]
    layers = [site for site in sites if site.kind == "layer"]
    # The channels are on the axis of y that is as long as the last layer has some; of both, the first with a Conv inside.
    widths = [flow.tensors[site.weight or ""].shape[site.weight_axis] for site in layers[-1:]]
    axes = [axis for axis in (-1, 1) if [y.shape[axis]] == widths and isinstance(s.shape[axis], int)]
    if not axes:
        return None
    axis = axes[-1 if any(site.op == "Conv" for site in layers) else 0]
    if not (_strides(s, y) if axis == 1 else _agree(s, y, but=len(y.shape) - 1)):
        return None
    mixes = len(layers) < len(sites) or any(node.op in ("Softmax", "Attention") for node in nodes)
    return _Unit(s, y, frozenset(t.name for node in nodes for t in node.outputs), axis, mixes)


def _activations(node: gs.Node) -> list[gs.Tensor]:
    return [t for t in node.inputs if isinstance(t, gs.Variable) and t.dtype == np.float32]


def _chain(tensor: gs.Tensor) -> Iterator[gs.Tensor]:
    """The tensor, and those it is made from as long as each is made from one."""
    yield tensor
    while tensor.inputs and len(found := _activations(tensor.inputs[0])) == 1:
        tensor = found[0]
        yield tensor


def _agree(x: gs.Tensor, y: gs.Tensor, but: int = 0) -> bool:
    """Whether x and y have the same rank and no axis, other than the first and `but`, of lengths known to differ."""
    a, b = x.shape or (), y.shape or ()
    sizes = [(a[i], b[i]) for i in range(1, min(len(a), len(b))) if i != but]
    return len(a) == len(b) and all(p == q for p, q in sizes if isinstance(p, int) and isinstance(q, int))


def _strides(x: gs.Tensor, y: gs.Tensor) -> tuple[int, ...]:
    """By how much each spatial axis of x shrinks, to ceil(length / stride); empty where that is not known."""
    sizes = list(zip(x.shape[2:], y.shape[2:], strict=False))
    if len(x.shape) != len(y.shape) or not all(isinstance(length, int) for pair in sizes for length in pair):
        return ()
    found = tuple(-(-a // b) for a, b in sizes)
    return found if all(-(-a // k) == b for (a, b), k in zip(sizes, found, strict=True)) else ()


def _outermost(flow: _Flow, units: Sequence[_Unit]) -> list[_Unit]:
    """The units without those that span several in a row, and of what is left without those inside another."""
    within = {unit: [u for u in units if u is not unit and u.y.name in unit.made] for unit in units}
    short = [u for u in units if not any(flow.leads(a.y, b.s) for a, b in itertools.permutations(within[u], 2))]
    return [unit for unit in short if not any(unit in within[other] for other in short)]


def _joined(flow: _Flow, units: Sequence[_Unit]) -> list[_Unit]:
    """The units, those that are in the same block as one."""
    found: list[_Unit] = []
    for unit in units:
        previous = next((u for u in reversed(found) if flow.leads(u.y, unit.s)), None)
        if previous is None or not _belongs(flow, previous, unit):
            found.append(unit)
        else:
            found[found.index(previous)] = replace(unit, s=previous.s)
    return found


def _belongs(flow: _Flow, previous: _Unit, unit: _Unit) -> bool:
    """Whether a unit is in the same block as the one before it: in one stage of a CNN, or the MLP behind attention."""
    if unit.axis == previous.axis == 1:
        return unit.y.shape[1] == previous.y.shape[1] and set(_strides(previous.y, unit.y)) == {1}
    return unit.axis == previous.axis and previous.mixes and not unit.mixes and flow.carries(previous.y, unit.s)


def _behind(tensor: gs.Tensor, tail: Sequence[str]) -> gs.Tensor | None:
    """What operators of the types in `tail` make of the tensor, each the only reader of what is before it."""
    for op in tail:
        if [node.op for node in tensor.outputs] != [op]:
            return None
        tensor = tensor.outputs[0].outputs[0]
    return tensor


def _block(flow: _Flow, x: gs.Tensor, y: gs.Tensor, unit: _Unit, nodes: Sequence[gs.Node]) -> Block:
    """The block of `nodes` from x to y, whose last unit is `unit`; without a name where its path is not its own."""
    made = {tensor.name for node in nodes for tensor in node.outputs}
    inputs = tuple(dict.fromkeys([x.name, *(t.name for node in nodes for t in flow.reads(node) if t.name not in made)]))
    channels, strides = (x.shape[unit.axis], y.shape[unit.axis]), _strides(x, y) if unit.axis == 1 else ()
    sites = [flow.sites[node.name] for node in nodes if node.name in flow.sites]
    parts = zip(*(site.name.split("/")[:-1] for site in sites), strict=False)
    path = "/".join(part[0] for part in itertools.takewhile(lambda part: len(set(part)) == 1, parts))
    shared = any(site.name.startswith(f"{path}/") for site in flow.sites.values() if site not in sites)
    layers = [site for site in sites if site.kind == "layer"]
    alone = {t.name for t in unit.y.inputs[0].inputs if len(t.outputs) == 1 and y is unit.y} - flow.outputs
    last = next((site for site in reversed(layers) if site.y in alone), None)
    name, fixed = "" if shared else path, unit.axis == -1 and all(isinstance(length, int) for length in y.shape[1:])
    return Block(name, inputs, y.name, unit.axis, len(y.shape), channels, strides, fixed, last)
