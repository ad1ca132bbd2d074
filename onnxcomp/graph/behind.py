"""What becomes of a tensor's values before anything else than arithmetic on single values sees them.

Behind a Conv there is often an activation, and what it makes of a value is all that counts: a HardSwish gives 0 for
everything below -3, so no code of a quantizer in front of it need stand for that.
"""

import onnx_graphsurgeon as gs

from onnxcomp.graph.edit import extract
from onnxcomp.graph.fold import names_leaving

ELEMENTWISE = frozenset({
    "Abs", "Add", "Celu", "Clip", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Log", "Max",
    "Min", "Mish", "Mul", "Neg", "Pow", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign", "Sqrt", "Sub", "Tanh",
    "ThresholdedRelu",
})  # fmt: skip
"""Operators that make each value of one value of every input."""


def function_behind(graph: gs.Graph, name: str) -> gs.Graph | None:
    """The part of the graph, of one input and one output, that computes from the tensor `name` all that is ever read of it,
    value by value; None where the tensor itself is read, or more than one such result. Its tensors have no shapes.
    """
    leaving = names_leaving(graph)
    inside, read = {name}, {name} & leaving
    for node in graph.nodes:
        mine = {t.name for t in node.inputs} & inside
        others = [t for t in node.inputs if t.name not in inside and not t.is_empty()]
        if mine and node.op in ELEMENTWISE and all(isinstance(t, gs.Constant) and t.values.size == 1 for t in others):
            inside |= {t.name for t in node.outputs}
        else:
            read |= mine
    read |= inside & leaving
    if len(read) != 1 or name in read:
        return None
    part = extract(graph, [name], [*read])
    for tensor in part.tensors().values():
        if not isinstance(tensor, gs.Constant):
            tensor.shape = None
    return part
