"""Abstract quantizers as ONNX text, lowered for a target: what the tests of targets share."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from equality import parse, run
from onnx import ModelProto, NodeProto

from onnxcomp.graph.convert import to_graph, to_model
from onnxcomp.targets import find

TARGET = find("ort-x86")

Array = np.ndarray
EYE = np.eye(4, dtype=np.int8)
ONES = np.ones(4, np.float32)


def static(x: str, y: str, bits: int = 8, scale: str = "s", zero: str = "z") -> str:
    return f' {y} = onnxcomp.FakeQuantize<bits = {bits}, signed = 0, granularity = "static">({x}, {scale}, {zero}) '


def measured(x: str, y: str, granularity: str, bits: int = 8, ratio: float = 1.0) -> str:
    options = f'bits = {bits}, signed = 0, granularity = "{granularity}", ratio = {ratio}'
    return f" {y} = onnxcomp.FakeQuantize<{options}>({x}) "


def dequantize(codes: str, scale: str, y: str, bits: int = 8, axis: int = 1) -> str:
    return f" {y} = onnxcomp.Dequantize<bits = {bits}, axis = {axis}>({codes}, {scale}) "


def lower(text: str, weights: Mapping[str, object]) -> ModelProto:
    arrays = {key: np.asarray(value) for key, value in weights.items()}
    model = parse(f"g {text}", arrays, opset=21, domains=', "onnxcomp" : 1')
    lowered = to_model(TARGET.lower(to_graph(model)), model)
    onnx.checker.check_model(lowered, full_check=True)
    return lowered


def matmul(body: str, y: str = "float[N,4] y", **weights: object) -> ModelProto:
    """A graph on x [N, 4] that may name s = 0.5, z = 8, codes W and their scales ws, besides the `weights`."""
    known: dict[str, object] = {"s": np.float32(0.5), "z": np.uint8(8), "W": 2 * EYE, "ws": ONES} | weights
    used = {key: value for key, value in known.items() if f"{key}," in body or f"{key})" in body}
    return lower(f"(float[N,4] x) => ({y}) {{ {body} }}", used)


def both(model: ModelProto, x: Array) -> Array:
    """The output y, which the runtime gives with its optimizations on as well as off."""
    plain = run(model, {"x": x})["y"]
    np.testing.assert_array_equal(run(model, {"x": x}, optimize=True)["y"], plain)
    return plain


def node(model: ModelProto, op: str) -> NodeProto:
    (found,) = (n for n in model.graph.node if n.op_type == op)
    return found


def attribute(node: NodeProto, name: str) -> int:
    (found,) = (a.i for a in node.attribute if a.name == name)
    return found
