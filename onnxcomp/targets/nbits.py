"""Weights in blocks beside float activations, as ONNX Runtime fuses them to MatMulNBits; and tables whose rows are gathered.

    weight   int4 or int8 initializer -> DequantizeLinear(axis 0, block_size) -> MatMul -> Sum(bias)
             2, 3, 5, 6 bits: planes that a table turns into int8 codes (-> Cast(int4)), computed when the file is loaded
    table    Gather(codes, ids) -> Cast -> Mul(Gather(scales, ids)) -> Reshape: a few rows instead of all

Every product has codes and scales of its own: ONNX Runtime computes in float what two products share, and so it does where both
factors come from DequantizeLinear, so rows of a table do not. A table's codes of fewer than 7 bits are bytes, looked up row by
row, for Gather takes no int4.
"""

from collections.abc import Callable

import numpy as np

from onnxcomp.graph.convert import packed_int4
from onnxcomp.graph.edit import Constant, Graph, Node, Nodes, Tensor, Variable, insert_after, remove
from onnxcomp.targets.base import Encoding

FLOAT, INT4 = 1, 22
"""ONNX's numbers of element types."""
TABLE_BYTES = 1000
"""What the nodes and a part of the tables take that make codes of packed ones."""
LookUp = Callable[..., Tensor]


def stored_bits(bits: int, size: int, encoding: Encoding, *, in_blocks: bool = False) -> int:
    """The room that each of `size` codes of so many bits takes: 2, 3, 5 and 6 bits are looked up where that saves bytes."""
    if encoding.packed == "int8" and not in_blocks:
        return 8
    whole = 4 if bits <= 4 else 8
    saves = encoding.packed == "cast" and size % 8 == 0 and size * (whole - bits) > 8 * TABLE_BYTES
    return bits if saves and bits != 7 else whole


def lower(graph: Graph, node: Node, encoding: Encoding, look_up: LookUp) -> list[Node]:
    """What makes the weight of each reader of an abstract Dequantize with blocks; a table is written into the graph."""
    (codes, *ranges), y, bits, block = node.inputs, node.outputs[0], node.attrs["bits"], node.attrs["block"]
    width, made = stored_bits(bits, codes.values.size, encoding, in_blocks=True), []
    for number, reader in enumerate(list(y.outputs)):
        if reader.op == "Gather":
            _lower_table(graph, node, reader, look_up)
            continue
        new, output, copy = Nodes(y.name), y, ""
        if number:
            new.name, copy = f"{reader.name}/weight", f".{number + 1}"
            output = reader.inputs[1] = Variable(f"{new.name}/DequantizeLinear", dtype=y.dtype)
        own = Constant(f"{codes.name}{copy}", codes.values)
        stored = packed_int4(own.name, own.values) if width == 4 else own
        if width not in (4, 8):
            stored = look_up(new, own, bits)
            stored = new("Cast", Variable(f"{new.name}/codes.i4"), stored, to=INT4) if width < 4 else stored
        more = [Constant(f"{t.name}{copy}", t.values) for t in ranges]
        more[1:] = [packed_int4(t.name, t.values) if width <= 4 else t for t in more[1:]]
        new("DequantizeLinear", output, stored, *more, axis=node.attrs["axis"], block_size=block)
        made += new.made
    return made


def _lower_table(graph: Graph, node: Node, gather: Node, look_up: LookUp) -> None:
    """Let the rows of codes that `gather` reads become numbers, in place of all the table."""
    (stored, *ranges), ids, y = node.inputs, gather.inputs[1], gather.outputs[0]
    new, bits, size = Nodes(f"{gather.name}/rows"), node.attrs["bits"], stored.shape[1]
    codes = Constant(stored.name, stored.values.reshape(len(stored.values), -1, node.attrs["block"]))
    is_packed = bits < 7 and size % 8 == 0
    packed = Nodes(f"{new.name}/codes", new.made)
    found = [look_up(packed, codes, bits, ids) if is_packed else rows(new, "codes", codes, ids)]
    found += [rows(new, f"range-{n}", Constant(t.name, t.values[..., None]), ids) for n, t in enumerate(ranges)]
    values, scale, *zeros = found
    values = new("Cast", "f32", values, to=FLOAT)
    for zero in zeros:
        lower_by = Nodes(f"{new.name}/zero", new.made)("Cast", "f32", zero, to=FLOAT)
        values = new("Sub", "levels", values, lower_by)
    shape = Constant(f"{new.name}/shape", np.array([*[0] * len(ids.shape), size]))
    new("Reshape", y, new("Mul", "blocks", values, scale), shape)
    insert_after(graph, gather, new.made)
    remove(graph, gather)
    new.made[0].name = gather.name  # whoever asks for the site finds the codes


def rows(new: Nodes, label: str, tensor: Tensor, ids: Tensor) -> Tensor:
    """The rows of a constant that `ids` name."""
    return Nodes(f"{new.name}/{label}", new.made)("Gather", "rows", tensor, ids, dtype=tensor.dtype)
