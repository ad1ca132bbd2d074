"""Which layers stay float because that is faster: the front of a CNN, and what integer kernels are slow at.

Per position of what a Conv makes, with C outputs, k values under its kernel and m products, ONNX Runtime takes on one x86 core,
in nanoseconds (`tools/layer_prices.py`, to some 15 %, and what memory adds in the middle of MobileNetV2):

    float   0.0159 m + 0.20 C + 5.2                          depthwise   0.0188 m + 0.46 C
    int8    0.0040 m + 0.17 C + 1.95 k [k > 1] + 4.4         depthwise   0.0383 m + 0.25 C + 1.28 k + 10.1
    groups  each as a Conv of its own, on integers 20 + 5 k more

and 1.5 per element for the model's input to become codes of the right layout, 1.04 for any other tensor, there or back. The
first Convs see large images of few channels, so a float front, up to one tensor that is handed on, is often faster.

Per row of a MatMul with K inputs, which `r` MatMuls read, and N outputs, codes made of its input and values of its result:

    float   0.0129 K N + 0.08 K + 0.48 N + 1.6               int8   0.34 K / r + 0.96 N + 14.8

so that one head's worth of channels, or attention that mixes heads, is too little to pay for its quantizers.

Gate    the front ends where most is saved; each part of it, and each other layer that stays float, has to save a tenth of what
        it takes on integers, and what is seen.
Limits  other operators count as equal; the front reads one tensor; Convs one behind the other are no island together; a MatMul
        is looked at where its input is surely made in float.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from onnxcomp.graph.edit import Constant, Graph, Node, Tensor, tensors_of
from onnxcomp.graph.offsets import way_back
from onnxcomp.graph.sites import LAYER_OPS, Site

LONGEST = 12
"""Convs of a front at most."""
WORTH, LEAST = 0.1, 20_000.0
"""What is saved at least: of the time on integers, and nanoseconds."""
HANDED, ENTERED = 1.04, 1.5
"""Nanoseconds per element of a tensor that becomes codes or values, and of the model's input."""
FLOATS = ("Gelu", "Gemm", "LayerNormalization", "MatMul", "RMSNormalization", "Softmax")
"""What makes values, never codes, where the layers around it have codes of their own."""
Shapes = Mapping[str, Sequence[int]]


def faster_in_float(
    graph: Graph, sites: Sequence[Site], shapes_of: Callable[[Sequence[str]], Shapes], floats: Sequence[Site] = ()
) -> dict[str, str]:
    """The layers that stay float, each with the reason.

    sites      the Convs, and layers of another kind, that may
    shapes_of  the shapes that tensors have
    floats     Convs that are float already, for another reason: a front that takes them in need not hand them values
    """
    nodes, tensors = {node.name: node for node in graph.nodes}, tensors_of(graph)
    convs, fixed = {site.name: site for site in sites if site.op == "Conv"}, {site.name: site for site in floats}
    linear = {site.name: site for site in sites if site.op != "Conv" and _is_made_in_float(tensors[site.x])}
    cuts = _cuts(graph, convs | fixed)
    ends = [name for site in (convs | fixed | linear).values() for name in (site.x, site.raw)]
    shapes = shapes_of([*dict.fromkeys([*(cut for _, cut in cuts), *(t.name for t in graph.inputs), *ends])])
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    handed = {name: HANDED * (sizes[site.x] + sizes[site.raw]) for name, site in (convs | fixed).items()}
    prices = {name: _prices(nodes[name], shapes[site.raw]) for name, site in convs.items()}
    prices |= {name: (0.0, handed[name]) for name in fixed}
    readers = Counter(site.x for site in linear.values())
    prices |= {k: _linear_prices(shapes[s.x], shapes[s.raw][-1], readers[s.x]) for k, s in linear.items()}
    front, most, before = list[str](), 0.0, 0.0
    for part, cut in cuts:
        as_float, as_codes = (sum(column) for column in zip(*(prices[name] for name in part), strict=True))
        as_codes += ENTERED * max(sizes[t.name] for t in graph.inputs)
        saved = as_codes - as_float - HANDED * sizes[cut]
        if saved > most + WORTH * (as_codes - before):
            front, most, before = part, saved, as_codes
    first = f"first {len(front)} Convs are" if len(front) > 1 else "first Conv is"
    text = f"the {first} faster in float, by {most / 1e6:.2f} ms of a sample"
    found = {name: text for name in front if name not in fixed and most >= LEAST}
    for name in [name for name in prices if name not in found and name not in fixed]:
        as_float, as_codes = prices[name]
        saved = as_codes - as_float - handed.get(name, 0.0)
        if saved >= max(LEAST, WORTH * as_codes):
            found[name] = f"its integer kernel takes {saved / 1e6:.2f} ms of a sample more than the float one"
    return found


def _is_made_in_float(tensor: Tensor) -> bool:
    """Whether what reaches the tensor by moves, or by arithmetic with a constant, is no code."""
    for node in way_back(tensor)[0].inputs:
        variable = [t for t in node.inputs if not isinstance(t, Constant)]
        is_step = node.op in ("Add", "Div", "Mul", "Sub", "Sum") and len(variable) == 1
        if node.op not in FLOATS and not (is_step and _is_made_in_float(variable[0])):
            return False
    return True


def _cuts(graph: Graph, convs: Mapping[str, Site]) -> list[tuple[list[str], str]]:
    """Where a front may end: its Convs, and the tensor that it hands on."""
    last: dict[str, float] = {t.name: index for index, node in enumerate(graph.nodes) for t in node.inputs}
    last |= {t.name: math.inf for t in graph.outputs}
    alive, front, found = {t.name for t in graph.inputs if t.dtype == np.float32}, list[str](), list[tuple[list[str], str]]()
    if len(alive) != 1:
        return []
    for index, node in enumerate(itertools.takewhile(lambda node: _may_stay(node, convs), graph.nodes)):
        front += [node.name] if node.name in convs else []
        alive = {name for name in alive if last.get(name, -1) > index}
        alive |= {t.name for t in node.outputs if last.get(t.name, -1) > index}
        if len(front) > LONGEST:
            break
        if len(alive) == 1 and front and last[next(iter(alive))] < math.inf:
            found.append((list(front), next(iter(alive))))
    return found


def _may_stay(node: Node, convs: Mapping[str, Site]) -> bool:
    """Whether the node may be part of a front: any operator on images, and of layers those Convs."""
    is_image = all(isinstance(t, Constant) or t.is_empty() or len(t.shape or ()) >= 4 for t in node.inputs)
    return is_image and (node.name in convs or node.op not in LAYER_OPS) and not list(node.subgraphs())


def _prices(conv: Node, shape: Sequence[int]) -> tuple[float, float]:
    """Nanoseconds of a Conv in float and on codes, whose result has this shape."""
    weight, groups, positions = conv.inputs[1], conv.attrs.get("group", 1), shape[0] * math.prod(shape[2:])
    outputs, inputs, *kernel = weight.shape
    k, m = math.prod(kernel), outputs * inputs * math.prod(kernel)
    if inputs == 1 and 1 < groups == outputs:
        return positions * (0.0188 * m + 0.46 * outputs), positions * (0.0383 * m + 0.25 * outputs + 1.28 * k + 10.1)
    as_codes = groups * (4.4 + 1.95 * k * (k > 1) + (20 + 5 * k) * (groups > 1)) + 0.0040 * m + 0.17 * outputs
    return positions * (groups * 5.2 + 0.0159 * m + 0.20 * outputs), positions * as_codes


def _linear_prices(shape: Sequence[int], outputs: int, readers: int) -> tuple[float, float]:
    """Nanoseconds of a MatMul of an input of this shape in float and on codes."""
    *rows, inputs = shape
    as_float = 0.0129 * inputs * outputs + 0.08 * inputs + 0.48 * outputs + 1.6
    return math.prod(rows) * as_float, math.prod(rows) * (0.34 * inputs / readers + 0.96 * outputs + 14.8)
