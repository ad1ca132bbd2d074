"""TensorRT 10 and newer, explicit quantization: symmetric int8 in front of every layer, nothing behind it, float biases.

    activation   x -> Clip (below 8 bits) -> QuantizeLinear(int8, zero point 0) -> DequantizeLinear
    weight       int8 -> DequantizeLinear per output channel
    residual     Conv + Add: only the branch that skips the Conv is quantized, so that both stay one kernel

Limits: rules from TensorRT's documents and its ONNX importer. Weights below 8 bits are stored as int8 beside int8 activations:
TensorRT multiplies int4 weights with float activations only.
"""

from onnxcomp.graph.edit import Constant, Node
from onnxcomp.targets.base import Encoding, Facts
from onnxcomp.targets.rules import (
    FIX,
    QUANTIZERS,
    Broken,
    codes_type,
    foreign_operator,
    half_quantized,
    integer_operator,
    is_stored,
    maker,
    measured_range,
)
from onnxcomp.targets.target import Target

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
CODES = ("int8", "int4", "float8_e4m3fn", "float4_e2m1fn")
BLOCKS = (64, 128)


def unsupported_codes(node: Node, facts: Facts) -> Broken:
    """The importer takes int8, int4, float8 and float4 codes; uint8 is an error, and an int32 bias is too."""
    kind = codes_type(node) if node.op in QUANTIZERS else None
    if kind is not None and kind.name == "int32":
        yield "A bias of int32 codes is refused.", "Leave the bias in float."
    elif kind is not None and kind.name not in CODES:
        yield f"Codes of type {kind.name} are refused.", "Use symmetric int8."


def asymmetric(node: Node, facts: Facts) -> Broken:
    """Zero points are all zero."""
    if node.op in QUANTIZERS and any(isinstance(t, Constant) and t.values.any() for t in node.inputs[2:]):
        yield "Its zero point is not zero; only symmetric quantization is taken.", "Use symmetric int8."


def vanishing_scale(node: Node, facts: Facts) -> Broken:
    """Scales are positive."""
    if node.op in QUANTIZERS and isinstance(node.inputs[1], Constant) and not (node.inputs[1].values > 0).all():
        yield "A scale is not above zero.", "Raise the scales of channels without values to the smallest positive one."


def activation_channels(node: Node, facts: Facts) -> Broken:
    """Scales per channel are for weights."""
    is_weight = node.op == "DequantizeLinear" and is_stored(node)
    if node.op in QUANTIZERS and not is_weight and isinstance(node.inputs[1], Constant) and node.inputs[1].values.size > 1:
        if node.op == "QuantizeLinear" and isinstance(node.inputs[0], Constant):
            return
        yield "An activation has a scale per channel; only weights may.", "Use one scale for the tensor."


def narrow_weights(node: Node, facts: Facts) -> Broken:
    """int4 weights are block-wise, in blocks of 64 or 128, and multiplied with float activations."""
    kind = codes_type(node) if node.op == "DequantizeLinear" else None
    if kind is None or kind.name != "int4":
        return
    block = node.attrs.get("block_size", 0)
    if block not in BLOCKS:
        yield f"int4 weights have blocks of {block or 'whole channels'}, not of 64 or 128.", "Use blocks of 64 or 128."
    if any(maker(t) == "DequantizeLinear" for reader in node.outputs[0].outputs for t in reader.inputs[:1]):
        yield "int4 weights are multiplied with quantized activations, which has no kernel.", "Store the weights as int8."


def quantized_result(node: Node, facts: Facts) -> Broken:
    """Between a layer and its normalization or activation function no quantizer may stand, or the two are not one kernel."""
    if node.op != "QuantizeLinear" or maker(node.inputs[0]) not in LAYERS:
        return
    readers = [r.op for t in node.outputs for dq in t.outputs for y in dq.outputs for r in y.outputs]
    if any(op in ("BatchNormalization", "Clip", "LeakyRelu", "Relu", "Sigmoid") for op in readers):
        yield "It stands between a layer and the function behind it, which are one kernel without it.", "Take it out."


def float_skip(node: Node, facts: Facts) -> Broken:
    """A Conv and the Add of a residual branch are one int8 kernel if the branch is quantized, and the Conv's result is not."""
    convs = [t for t in node.inputs if maker(t) == "Conv" and maker(t.inputs[0].inputs[0]) == "DequantizeLinear"]
    if node.op == "Add" and convs and not any(maker(t) == "DequantizeLinear" or isinstance(t, Constant) for t in node.inputs):
        yield "The branch that is added to a quantized Conv is float, so the two are not one kernel.", FIX


TARGET = Target(
    name="tensorrt",
    summary="TensorRT 10 and newer, explicit quantization (rules; nothing is run here)",
    encoding=Encoding(
        where="inputs", signed=True, symmetric=True, clip="values", packed="int8", bias="float", run_time=("token",),
        fused=False,
    ),
    half=True,
    needs=(
        "TensorRT 10 or newer, or ONNX Runtime 1.27 or newer with its TensorRT provider.",
        "A strongly typed network: what is float32 in the file is computed in float32. --half writes float16.",
    ),
    rules=(
        foreign_operator, integer_operator, unsupported_codes, asymmetric, measured_range, vanishing_scale,
        activation_channels, narrow_weights, half_quantized, quantized_result, float_skip,
    ),
)  # fmt: skip
