"""Weights in blocks beside float activations, as ONNX Runtime fuses them to MatMulNBits; and tables whose rows are gathered.

    weight   int4 or int8 initializer -> DequantizeLinear(axis 0, block_size) -> MatMul -> Sum(bias)
             2, 3, 5, 6 bits: planes that a table turns into int8 codes (-> Cast(int4)), computed when the file is loaded
    table    Gather(codes, ids) -> DequantizeLinear(Gather(scales, ids), last axis, block_size), a few rows instead of all

Every product has codes and scales of its own: ONNX Runtime computes in float what two products share. A table's codes of fewer
than 7 bits are bytes, looked up row by row, for Gather takes no int4.
"""

from __future__ import annotations

from collections.abc import Callable

from onnxcomp.graph.convert import packed_int4
from onnxcomp.graph.edit import Constant, Graph, Node, Nodes, Tensor, Variable, insert_after, remove
from onnxcomp.targets.base import Encoding

INT4 = 22
"""ONNX's number of the element type."""
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
    """Let the rows of codes that `gather` reads be dequantized, in place of all the table."""
    (codes, *ranges), ids, y = node.inputs, gather.inputs[1], gather.outputs[0]
    new, bits = Nodes(f"{gather.name}/rows"), node.attrs["bits"]
    is_packed = bits < 7 and codes.shape[1] % 8 == 0
    found = [look_up(new, codes, bits, ids) if is_packed else rows(new, codes, ids)]
    for number, tensor in enumerate(ranges):
        new.name = f"{gather.name}/range-{number}"
        found.append(rows(new, tensor, ids))
    new.name = f"{gather.name}/rows"
    new("DequantizeLinear", y, *found, axis=len(y.shape) - 1, block_size=node.attrs["block"])
    insert_after(graph, gather, new.made)
    remove(graph, gather)
    new.made[0].name = gather.name  # whoever asks for the site finds the codes


def rows(new: Nodes, tensor: Tensor, ids: Tensor) -> Tensor:
    """The rows of a constant that `ids` name."""
    return new("Gather", "rows", tensor, ids, dtype=tensor.dtype)
