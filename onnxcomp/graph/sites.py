"""Sites: the operators that may be quantized, found in the graph itself, never by a network's names.

A site is one Conv, Gemm or MatMul with a constant weight together with the bias Add behind it (a *layer*), a MatMul of
two activations (a *product*), or an operator that joins or pools quantized activations and has an integer kernel of its
own (a *join*), a Gather of the rows of a constant (a *table*), or another operator with large weights, which may be stored as
codes although it computes in float (*stored*). Reading is all that happens here.
"""

import fnmatch
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp.errors import RecipeError, UnsupportedSite, did_you_mean
from onnxcomp.graph.fold import input_at, is_load_time, is_op
from onnxcomp.graph.merge import is_plain_gemm

LAYER_OPS = ("Conv", "Gemm", "MatMul")
PASS_THROUGH_OPS = (
    "DepthToSpace", "Flatten", "Identity", "MaxPool", "Pad", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze",
)  # fmt: skip
"""Operators whose output values are a selection of their first input's values (Pad adds zeros)."""
HOLDERS = {
    "ConvTranspose": (1, (1,)), "DeformConv": (0, (1,)), "Einsum": (-1, (0, 1)), "GRU": (1, (1, 2)), "LSTM": (1, (1, 2)),
    "MatMul": (-1, (0, 1)), "RNN": (1, (1, 2)),
}  # fmt: skip
"""Operators that have weights besides layers: the axis that has a scale each, and which inputs they are."""
LARGE = 1 << 10
"""Numbers from which a weight is worth the two operators that make floats of its codes when the file is loaded."""


@dataclass(frozen=True)
class Site:
    """One quantizable operator. Tensor names are the float model's; they stay valid in the compressed one."""

    name: str
    """The node's name: what patterns and reports speak of."""
    op: str
    kind: str
    """`layer`, `product`, `join`, `table` or `stored`."""
    inputs: tuple[str, ...]
    """The activations it reads, in order; `x` is the first."""
    raw: str
    """The operator's own output, before a separate bias Add."""
    y: str
    """The site's output, bias included; the same as `raw` where there is no separate Add."""
    channel_axis: int
    """The channel axis of `y`: 1 behind a Conv, -1 elsewhere."""
    rank: int = 0
    """Rank of `y` where it is known: of a Conv, the rank of its weight."""
    fixed_tokens: bool = False
    """Whether every axis of `y` but the first has the same length in every run, so that T of [N, T, C] is a constant."""
    weight: str | None = None
    weight_axis: int = 0
    """The output-channel axis of the weight."""
    others: tuple[str, ...] = ()
    """Further weights, whose channels lie along the same axis: those of a recurrent layer's state."""
    bias: str | None = None
    """The constant bias, inside the operator or in the Add behind it."""
    bias_node: str | None = None
    """The separate bias Add, if any."""
    padded: bool = False
    """Whether it is a Conv that sees zeros beyond its input's edges."""

    @property
    def x(self) -> str:
        """The first activation."""
        return self.inputs[0]


def find_sites(graph: gs.Graph) -> tuple[Site, ...]:
    """Every layer and product of the main graph, in graph order. Control-flow bodies are not entered."""
    fixed = all(t.shape and all(isinstance(n, int) for n in t.shape[1:]) for t in graph.inputs)
    sites = (site for node in graph.nodes if (site := layer(node) or _product(node)) is not None)
    return tuple(replace(site, fixed_tokens=fixed and site.op == "MatMul") for site in sites)


def find_holders(graph: gs.Graph) -> tuple[Site, ...]:
    """Every other operator of the main graph whose weights may be stored as codes, in graph order: tables and `stored`."""
    sites = (_table(node) or _stored(node) for node in graph.nodes if layer(node) is None)
    return tuple(site for site in sites if site is not None)


def _table(node: gs.Node) -> Site | None:
    """The site of a Gather of the rows of a constant matrix."""
    if not is_op(node, "Gather") or not is_weight(node.inputs[0]) or not isinstance(node.inputs[1], gs.Variable):
        return None
    (table, ids), y = node.inputs, node.outputs[0]
    if node.attrs.get("axis", 0) != 0 or len(table.shape) != 2 or None in (y.shape, ids.shape):
        return None
    return Site(node.name, "Gather", "table", (ids.name,), y.name, y.name, -1, len(y.shape), weight=table.name)


def _stored(node: gs.Node) -> Site | None:
    """The site of an operator that is no layer and has large weights."""
    if not is_op(node, *HOLDERS) or all(map(is_load_time, node.inputs)):
        return None
    axis, places = HOLDERS[node.op]
    weights = [t for t in (input_at(node, i) for i in places) if t is not None and is_weight(t)]
    weights = [t for t in weights if math.prod(t.shape) >= LARGE]
    made = [t.name for t in node.outputs if not t.is_empty()]
    if not weights or not made:
        return None
    reads = tuple(t.name for t in node.inputs if isinstance(t, gs.Variable) and not t.is_empty())
    first, *others = (t.name for t in weights)
    how = {"weight": first, "weight_axis": axis % len(weights[0].shape), "others": tuple(others)}
    return Site(node.name, node.op, "stored", reads, made[0], made[0], 1 if "Conv" in node.op else -1, **how)


def layer(node: gs.Node) -> Site | None:
    """The site of a layer; None for any other operator."""
    if not is_op(node, *LAYER_OPS) or not is_weight(node.inputs[1]) or is_load_time(node.inputs[0]):
        return None
    weight, raw, bias = node.inputs[1], node.outputs[0], input_at(node, 2)
    rank, inside = len(weight.shape), bias.name if isinstance(bias, gs.Constant) else None
    site = Site(node.name, node.op, "layer", (node.inputs[0].name,), raw.name, raw.name, -1, weight=weight.name, weight_axis=1)
    if node.op == "Conv":
        padded = any(node.attrs.get("pads") or ()) or node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
        return replace(site, channel_axis=1, rank=rank, weight_axis=0, bias=inside, padded=padded)
    if node.op == "Gemm":
        return replace(site, bias=inside) if is_plain_gemm(node) else None
    add = _bias_add(raw, int(weight.shape[1]))
    if rank != 2 or add is None:
        return site if rank == 2 else None
    behind = next(t.name for t in add.inputs if isinstance(t, gs.Constant))
    return replace(site, y=add.outputs[0].name, bias=behind, bias_node=add.name)


def _product(node: gs.Node) -> Site | None:
    if not is_op(node, "MatMul") or any(isinstance(t, gs.Constant) for t in node.inputs):
        return None
    y = node.outputs[0].name
    return Site(node.name, "MatMul", "product", tuple(t.name for t in node.inputs), y, y, -1)


def join(node: gs.Node) -> Site:
    """The site of an operator without weights that a target runs on integers, such as a residual Add."""
    y = node.outputs[0].name
    inputs = tuple(t.name for t in node.inputs if isinstance(t, gs.Variable) and not t.is_empty())
    return Site(node.name, node.op, "join", inputs, y, y, 1)


def is_weight(tensor: gs.Tensor) -> bool:
    """A constant float32 matrix or kernel."""
    return isinstance(tensor, gs.Constant) and tensor.dtype == np.float32 and len(tensor.shape) >= 2


def _bias_add(raw: gs.Tensor, width: int) -> gs.Node | None:
    """The Add of a constant [width] that alone reads the product."""
    if len(raw.outputs) != 1 or raw.outputs[0].op != "Add":
        return None
    add = raw.outputs[0]
    constants = [t for t in add.inputs if isinstance(t, gs.Constant) and t.dtype == np.float32]
    if len(constants) != 1 or tuple(constants[0].shape) not in ((width,), (1, width)):
        return None
    return add


class Named(Protocol):
    """Anything that a pattern can name."""

    @property
    def name(self) -> str: ...

    @property
    def op(self) -> str: ...


def matches(pattern: str, site: Named) -> bool:
    """Whether `pattern` names the site: a glob over names, `re:` and a regular expression, or `op:` and a type."""
    if pattern.startswith("re:"):
        return re.search(pattern[3:], site.name) is not None
    if pattern.startswith("op:"):
        return site.op == pattern[3:]
    return fnmatch.fnmatchcase(site.name, pattern)


def select(sites: Sequence[Site], include: Iterable[str], exclude: Iterable[str], every: Iterable[str]) -> tuple[Site, ...]:
    """The sites that `include` names (all where it is empty) and `exclude` does not.

    `every` are all node names of the graph, for telling an unsupported node from a misspelt one.

    Raises RecipeError for a pattern that is no regular expression or matches nothing, UnsupportedSite for one that
    names nodes which are no sites.
    """
    include, exclude, names = tuple(include), tuple(exclude), tuple(every)
    for pattern in include + exclude:
        check_pattern(pattern, sites, names, required=pattern in include)
    wanted = [s for s in sites if not include or any(matches(p, s) for p in include)]
    return tuple(s for s in wanted if not any(matches(p, s) for p in exclude))


def check_pattern(pattern: str, sites: Sequence[Named], names: Sequence[str], *, required: bool) -> None:
    """Raise unless `pattern` matches a site, with the nearest name as a suggestion."""
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise RecipeError(f"Pattern '{pattern}' is not a regular expression: {error}.") from None
    if any(matches(pattern, site) for site in sites):
        return
    others = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    if others and not required:
        return
    if others:
        text = f"{others[0]}: it is no Conv, Gemm or MatMul with a constant weight, so it cannot be quantized."
        raise UnsupportedSite(f"{text} Leave '{pattern}' out of include.")
    if pattern.startswith("op:"):
        found = ", ".join(sorted({site.op for site in sites}))
        raise RecipeError(f"Pattern '{pattern}' matches no site. The model has sites of type {found or 'none'}.")
    hint = did_you_mean(pattern, [site.name for site in sites]) or " `onnxcomp inspect MODEL` lists the sites."
    raise RecipeError(f"Pattern '{pattern}' matches no site.{hint}")
