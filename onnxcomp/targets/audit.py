"""The kernel audit: which operator ONNX Runtime really executes for each quantized site, and why where it is float.

Read from the optimized model of the installed runtime, never assumed.

Limits: sites of the main graph only. The optimized model is taken without changes of memory layout, which rename
tensors but compute the same. That a kernel computes what the graph says is for the verification to show: a weight
scaled along the wrong axis, or a bias not scaled by input times weight, becomes an integer kernel and is wrong.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from onnxcomp import runtime
from onnxcomp.graph.edit import Graph, Node
from onnxcomp.graph.files import NodeProto
from onnxcomp.graph.fold import is_load_time
from onnxcomp.graph.offsets import MOVES
from onnxcomp.targets.base import Plan, Violation
from onnxcomp.targets.fallback import STORED, explain
from onnxcomp.targets.rules import maker
from onnxcomp.targets.target import Target

INTEGER_KERNELS = frozenset({
    "ConvInteger", "DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat", "MatMulNBits", "QGemm", "QLinearMatMul",
    *(f"QLinear{op}" for op in STORED), "Gather",
})  # fmt: skip
"""What computes with codes; a Gather that is a site reads rows of them."""
_LAYERS = INTEGER_KERNELS | {"Conv", "FusedConv", "FusedGemm", "FusedMatMul", "Gemm", "MatMul"}
_CONVERSIONS = frozenset({*MOVES, "Cast", "Clip", "DequantizeLinear", "QuantizeLinear", "Relu"})
_ARITHMETIC = frozenset({"Add", "Mul", "Sum"})
"""These and conversions may stand between a site's kernel and the tensors that the site is known by."""


@dataclass(frozen=True)
class Kernel:
    """What computes a site. `op` is empty where nothing in the optimized model does; `reason` where it is integer."""

    site: str
    op: str
    integer: bool
    reason: str


def audit_sites(lowered: Graph, plan: Plan) -> dict[str, list[str]]:
    """Every site with the tensors that its kernel may produce: its own output, or the codes right behind it."""
    nodes, found = {node.name: node for node in lowered.nodes}, {}
    for site in plan.sites:
        tensors = [nodes[site.name].outputs[0]]
        while len(tensors[-1].outputs) == 1 and _is_computed_with(tensors[-1].inputs[0], tensors[-1].outputs[0]):
            tensors.append(tensors[-1].outputs[0].outputs[0])
        found[site.name] = [tensor.name for tensor in tensors]
    return found


def _is_computed_with(node: Node, reader: Node) -> bool:
    """Whether the kernel that computes `node` may compute its only reader too: up to the codes, by constants alone."""
    by_constant = reader.op in ("Add", "Sum", "Mul") and any(is_load_time(tensor) for tensor in reader.inputs)
    return node.op != "QuantizeLinear" and (by_constant or reader.op in ("Cast", "Relu", "Clip", "QuantizeLinear"))


def audit(model: bytes | Path, lowered: Graph, sites: Mapping[str, Sequence[str]]) -> tuple[Kernel, ...]:
    """The kernel of every site of a model, which is `lowered` as a graph too, in the order given: what computes the first of
    the site's tensors that still exists, or the node that kept the site's name.

    sites   by the name of its operator, the tensors that its kernel may produce, in order of preference: the operator's own
            output, that behind its bias or its ReLU, the codes behind its QuantizeLinear

    Raises ModelError for a model that ONNX Runtime cannot load.
    """
    executed = runtime.optimized(model)
    producers = {name: node for node in executed for name in node.output}
    by_name = {node.name.removesuffix("/MatMulAddFusion"): node for node in executed if node.name}
    nodes, results = {node.name: node for node in lowered.nodes}, frozenset(t.name for t in lowered.outputs)
    found = []
    for site, outputs in sites.items():
        maker = next((producers[name] for name in outputs if name in producers), None)
        kernel = (maker and _layer_behind(maker, site, producers)) or by_name.get(site)
        if kernel is None:
            found.append(Kernel(site, "", False, "No operator of ONNX Runtime's optimized model could be matched to it."))
            continue
        is_integer = kernel.op_type in INTEGER_KERNELS
        reason = "" if is_integer else explain(nodes[site], results, runtime.version())
        found.append(Kernel(site, kernel.op_type, is_integer, reason))
    return tuple(found)


def check(graph: Graph, target: Target) -> tuple[Violation, ...]:
    """Every rule of the target that a node of the graph, of any model, breaks, in graph order, inputs first."""
    results = frozenset(t.name for t in graph.outputs)
    nodes = [*(Node("Input", t.name, outputs=[t]) for t in graph.inputs), *graph.nodes]
    return tuple(
        Violation(node.name, node.op, rule.__name__.replace("_", "-"), *broken)
        for node in nodes
        for rule in target.rules
        for broken in rule(node, results)
    )


def foretell(graph: Graph, violations: Sequence[Violation], sites: Collection[str]) -> tuple[Kernel, ...]:
    """What the broken rules say of each site of a lowered graph: it is on integers where it reads codes, and neither it nor
    what makes them breaks a rule.
    """
    nodes, broken = {node.name: node for node in graph.nodes}, {v.node: v.reason for v in reversed(violations)}
    found = []
    for name in sites:
        node = nodes[name]
        makers = [n for t in node.inputs for n in t.inputs if n.op == "DequantizeLinear"]
        behind = [node, *makers, *(n for m in makers for n in m.inputs[0].inputs if n.op in ("QuantizeLinear", "Cast"))]
        reason = next((broken[n.name] for n in behind if n.name in broken), "")
        if not makers and node.op not in ("Gather", "MatMulInteger"):
            reason = reason or "It reads no codes."
        if len(node.inputs) > 1 and maker(node.inputs[1]) == "Mul" and is_load_time(node.inputs[1]):
            reason = reason or "Its weight is made float when the file is loaded."
        found.append(Kernel(name, node.op, not reason, reason))
    return tuple(found)


def _layer_behind(node: NodeProto, site: str, producers: Mapping[str, NodeProto]) -> NodeProto | None:
    """The node itself if it computes the site, else what it converts, rescales or shifts the result of."""
    if node.name == site or node.op_type not in _CONVERSIONS | _ARITHMETIC:
        return node
    before = [producers[name] for name in node.input if name in producers]
    if node.op_type in _CONVERSIONS:
        return _layer_behind(before[0], site, producers) if before else None
    layers = [found for found in (_layer_behind(n, site, producers) for n in before) if found and found.op_type in _LAYERS]
    return layers[0] if layers else None
