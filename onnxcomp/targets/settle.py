"""What ONNX Runtime needs around quantizers and products, so that it keeps them integer kernels.

Every rule was read from the runtime's optimized models, and the tests probe it: `Sum` is never fused into a float Gemm,
`Add` is as soon as shapes are known; a ReLU in front of a quantizer disappears where the zero point is the smallest code; an
`Add` in front of LayerNormalization becomes a kernel that takes several times what the two take; a quantizer behind a float
MaxPool is moved in front of it, where the integer kernel takes forty times as long, but not past a `Sum`; values are made of
codes once more for every `Shape` that reads them.

    DQ(a), DQ(w) -> MatMul -> Sum(b)   =   MatMulInteger(a, w) -> Cast -> Mul(s_a s_w) -> Add(b)

    DQ(q; 3/k, z) -> HardSwish   =   DQ(q; 3/k, z) * DQ(Clip(q, z - k, z + k); 1/2k, z - k)

The first right side is the one that becomes a single kernel with its bias. The product of scales must not be folded into a
constant before that, so one of them is multiplied with a 1 that the runtime does not see through. In the second the gate of
HardSwish is read from the codes themselves, exactly, where -3 and 3 are codes: an integer Clip and an integer product take a
third of the time of the float operator.
"""

import numpy as np

from onnxcomp.graph.edit import Constant, Graph, Node, Nodes, Tensor, Variable, insert_after, insert_before, remove, tensors_of
from onnxcomp.graph.fold import is_load_time
from onnxcomp.graph.offsets import MOVES
from onnxcomp.targets.regions import clip_bounds
from onnxcomp.targets.rules import maker

FLOAT = 1
"""ONNX's number of float32."""
ONE = "onnxcomp/unfolded-one"
"""A tensor that is 1, and that the runtime does not take for a constant."""
SCALES = "/scales"
"""What the scales of an integer product are called, behind its node's name."""


def settle(graph: Graph, *, biased: bool) -> None:
    """Bring what stands around the quantizers and products of a lowered `graph` into the form that keeps them integer kernels;
    `biased`: with their biases. Doing it twice changes nothing: it is done again where operators were taken out.
    """
    for node in list(graph.nodes):
        if node.op == "QuantizeLinear" and all(isinstance(t, Constant) for t in node.inputs[1:]):
            _absorb(graph, node)
        is_product = node.op == "MatMul" and is_load_time(node.inputs[1]) and any(t.inputs for t in node.inputs[1:])
        if is_product and (_reads_codes(node) or _is_in_blocks(node)) and not (biased and _to_integer(graph, node)):
            _keep_integer(graph, node)
        if node.op == "HardSwish" and _reads_codes(node):
            _gate(graph, node)
        is_pool = node.op == "MaxPool" and not _reads_codes(node) and _leads_to_codes(node.outputs[0])
        if is_pool or (node.op in ("Conv", "ConvTranspose", "Gemm") and _would_be_quantized(node)):
            put_behind(graph, node, "Sum", "float")
        if node.op == "Shape" and _reads_codes(node):
            node.inputs[0] = node.inputs[0].inputs[0].inputs[0]
        if node.op == "LayerNormalization" and [n.op for n in node.inputs[0].inputs] == ["Add"]:
            node.inputs[0].inputs[0].op = "Sum"
    for scale in [n for n in graph.nodes if n.name.endswith(SCALES)]:
        reader = first = only_reader(scale.outputs[0].outputs[0].outputs[0])
        while reader is not None and reader.op in ("Add", "Sum", "Mul") and reader.outputs[0].outputs:
            if reader.op != "Mul" and any(is_load_time(t) for t in reader.inputs):
                widths = [t.values.shape for t in reader.inputs if isinstance(t, Constant)]
                reader.op = "Add" if reader is first and widths == [scale.inputs[1].values.shape] else "Sum"
                break
            reader = only_reader(reader.outputs[0])


def _to_integer(graph: Graph, node: Node) -> bool:
    """Write a product of static codes as one of integers, and say whether it was one."""
    makers = [n for t in node.inputs for n in t.inputs]
    if [n.op for n in makers] != ["DequantizeLinear"] * 2 or "axis" not in makers[1].attrs or _is_in_blocks(node):
        return False
    (a, *parameters), (w, scale, _) = makers[0].inputs, makers[1].inputs
    # Kept with DequantizeLinear: a tensor that bears a name of the float model, one behind a ReLU that the quantizer may absorb
    # (its name moves there), and a weight that terms were merged into, which must be found again.
    name, is_ours, _ = node.inputs[0].name.partition("/quantized")
    source = tensors_of(graph).get(name)
    is_function = source is not None and [n.op for n in source.inputs] in (["Relu"], ["Clip"])
    is_ours = is_ours and not is_function and "/xint" not in makers[1].name
    if not is_ours or not all(isinstance(t, Constant) for t in parameters):
        return False
    made = [Variable(f"{node.name}/{key}", dtype=np.dtype(kind)) for key, kind in (("i32", "i4"), ("f32", "f4"), ("s", "f4"))]
    product, node.outputs[0], node.op = node.outputs[0], made[0], "MatMulInteger"
    node.inputs = [a, w, parameters[1]]
    cast = Node("Cast", f"{node.name}/Cast", {"to": FLOAT}, made[:1], made[1:2])
    whole = Node("Mul", f"{node.name}{SCALES}", inputs=[_unfolded(graph, parameters[0]), scale], outputs=made[2:])
    insert_after(graph, node, [cast, whole, Node("Mul", f"{node.name}/rescale", inputs=made[1:], outputs=[product])])
    for dequantize in [n for n in makers if not n.outputs[0].outputs]:
        remove(graph, dequantize)
    return True


def _gate(graph: Graph, node: Node) -> None:
    """Write the HardSwish of static codes as their product with what a Clip makes of them."""
    dequantize = node.inputs[0].inputs[0]
    codes, scale, zero_point = dequantize.inputs
    if not all(isinstance(t, Constant) and t.values.size == 1 for t in (scale, zero_point)):
        return
    steps, zero, ends = int(np.rint(3 / float(scale.values))), int(zero_point.values), np.iinfo(zero_point.dtype)
    if steps < 1 or abs(float(scale.values) * steps - 3) > 1e-5 or zero - steps < ends.min:
        return
    bounds, new = (zero - steps, min(zero + steps, ends.max)), Nodes(f"{node.name}/gate")
    low, high = (Constant(f"{new.name}.{k}", np.array(v, zero_point.dtype)) for k, v in zip("ab", bounds, strict=True))
    part = Constant(f"{new.name}.scale", np.array(0.5 / steps, np.float32))
    clipped = new("Clip", "codes", codes, low, high, dtype=zero_point.dtype)
    node.op, node.inputs = "Mul", [node.inputs[0], new("DequantizeLinear", "value", clipped, part, low)]
    insert_before(graph, node, new.made)


def _unfolded(graph: Graph, scale: Tensor) -> Tensor:
    """The scale, as a tensor that the runtime does not take for a constant."""
    tensors = tensors_of(graph)
    if f"{scale.name}/unfolded" in tensors:
        return tensors[f"{scale.name}/unfolded"]
    one, made = tensors.get(ONE), Variable(f"{scale.name}/unfolded", dtype=np.dtype(np.float32))
    if one is None:
        code, step, zero = (Constant(f"{ONE}.{k}", np.array(v, t)) for k, v, t in zip("csz", (1, 1, 0), "BfB", strict=True))
        new, one = Nodes(ONE), Variable(ONE, dtype=np.dtype(np.float32))
        new("Abs", one, new("DequantizeLinear", "value", code, step, zero))
        graph.nodes[:0] = new.made
    insert_after(graph, one.inputs[0], [Node("Mul", f"{scale.name}/unfolded/Mul", inputs=[one, scale], outputs=[made])])
    return made


def _absorb(graph: Graph, quantize: Node, *, again: bool = False) -> None:
    """Drop the Relu or Clip in front of a static quantizer where its bounds lie outside the codes' range; `again`: one more."""
    x, scale, zero_point = quantize.inputs
    if len(x.inputs) != 1 or len(x.outputs) != 1 or any(t is x for t in graph.outputs):
        return
    clip, reader = x.inputs[0], quantize.outputs[0].outputs[0]
    if clip.op not in ("Relu", "Clip", "Min") or any(isinstance(t, Variable) and not t.is_empty() for t in clip.inputs[1:]):
        return
    step, zero, codes = float(scale.values), int(zero_point.values), np.iinfo(zero_point.dtype)
    smallest, largest = (codes.min, codes.max) if reader.op != "Clip" else (int(t.values) for t in reader.inputs[1:3])
    low, high = clip_bounds(clip)
    if low is not None and (smallest - zero) * step < low:
        return
    # The largest code may exceed the bound by a rounding of its scale: no value in between has another code.
    if high is not None and (largest - zero) * step > high * (1 + 1e-6):
        return
    quantize.inputs[0] = clip.inputs[0]
    remove(graph, clip)
    if not again and not x.name.endswith("/before-quantize"):
        dequantize = reader if reader.op != "Clip" else reader.outputs[0].outputs[0]
        dequantize.outputs[0].name = x.name  # the tensor's name goes on naming its best approximation
    _absorb(graph, quantize, again=True)


def _keep_integer(graph: Graph, node: Node) -> None:
    """Keep the runtime from fusing a product of quantized operands with what reads it into a float operator: an Add
    becomes a Sum, and in front of a ReLU, or of several readers, stands a Sum of one.
    """
    reader = first = only_reader(node.outputs[0])
    while reader is not None and reader.op in ("Add", "Sum", "Mul") and reader.outputs[0].outputs:
        if reader.op == "Add" or (reader.op == "Sum" and any(is_load_time(t) for t in reader.inputs)):
            reader.op = "Sum"
            return
        reader = only_reader(reader.outputs[0])
    if first is not None and first.op == "Add":
        first.op = "Sum"
    elif node.outputs[0].outputs and (not _is_in_blocks(node) if first is None else first.op in ("Relu", "Clip")):
        put_behind(graph, node, "Sum", "product")


def _reads_codes(node: Node) -> bool:
    """Whether what a node reads is made from codes."""
    return maker(node.inputs[0]) == "DequantizeLinear"


def _comes_from_codes(tensor: Tensor) -> bool:
    """Whether codes make the tensor, at once or in front of moves and pools."""
    makers = [m for m in tensor.inputs if m.op in ("DequantizeLinear", "MaxPool", *MOVES)]
    return any(m.op == "DequantizeLinear" or _comes_from_codes(m.inputs[0]) for m in makers)


def _leads_to_codes(tensor: Tensor) -> bool:
    """Whether a quantizer reads the tensor, at once or behind moves."""
    return any(r.op == "QuantizeLinear" or (r.op in MOVES and _leads_to_codes(r.outputs[0])) for r in tensor.outputs)


def _is_in_blocks(node: Node) -> bool:
    """Whether the weight of a product has a scale per block."""
    return any("block_size" in maker.attrs for maker in node.inputs[1].inputs)


def _would_be_quantized(node: Node) -> bool:
    """Whether the runtime would take a float layer between integers, weight per tensor, for one that should be integer."""
    x, w = node.inputs[:2]
    return is_load_time(w) and maker(w) != "DequantizeLinear" and _comes_from_codes(x) and _leads_to_codes(tail(node))


def put_behind(graph: Graph, node: Node, op: str, suffix: str, *others: Tensor, name: str = "") -> None:
    """Let an operator on what `node` makes, and on `others`, make it in its place; `suffix` names the value before."""
    y = node.outputs[0]
    node.outputs[0] = Variable(f"{y.name}/{suffix}", dtype=y.dtype)
    new = Node(op, name or f"{node.name}/{op}", inputs=[node.outputs[0], *others], outputs=[y])
    insert_after(graph, node, [new])


def only_reader(tensor: Tensor) -> Node | None:
    """The only node that reads `tensor`."""
    return tensor.outputs[0] if len(tensor.outputs) == 1 else None


def tail(node: Node) -> Tensor:
    """The operator's output, or that of the last of the ReLUs, Clips and Mins with a constant that alone read it in a row."""
    y = node.outputs[0]
    while (reader := only_reader(y)) is not None and clip_bounds(reader) != (None, None):
        y = reader.outputs[0]
    return y
