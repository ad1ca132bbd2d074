"""Rules that targets share. Each looks at one node of any model and says what is wrong with it, and what to do.

To the rules the inputs of a model are nodes of type `Input`. Reasons are measured or read in the runtimes' own documents, as
each docstring says; a probe in the tests breaks each one.
"""

from collections.abc import Iterator

import numpy as np

from onnxcomp.graph.convert import STANDARD
from onnxcomp.graph.edit import Constant, Node, Tensor
from onnxcomp.graph.fold import is_load_time
from onnxcomp.graph.offsets import MOVES
from onnxcomp.graph.sites import HOLDERS
from onnxcomp.graph.types import type_name
from onnxcomp.targets.base import Results

QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
Broken = Iterator[tuple[str, str]]
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
CODES = ("int8", "int4", "float8e4m3fn", "float4e2m1")
"""Types of codes that TensorRT takes."""
BLOCKS = (64, 128)
CUTS = ("Gather", "Slice", "Split")
FIX = "Quantize the float model again for this target."


def maker(tensor: Tensor) -> str:
    """The type of the operator that makes the tensor; empty where none does."""
    return tensor.inputs[0].op if tensor.inputs else ""


def codes_type(node: Node) -> str:
    """The type of the codes that a QuantizeLinear makes or a DequantizeLinear reads; empty where it is not known."""
    telling = node.inputs[2:3] if node.op == "QuantizeLinear" else node.inputs[:1]
    return type_name(telling[0].dtype) if telling else type_name(node.attrs.get("output_dtype", np.uint8))


def is_stored(node: Node) -> bool:
    """Whether a DequantizeLinear reads a constant, at once or behind what is computed when the model is loaded."""
    return is_load_time(node.inputs[0])


def in_blocks(node: Node) -> bool:
    """Whether a product reads a float activation and stored codes with a scale per block of its inputs."""
    made = [maker(t) == "DequantizeLinear" for t in node.inputs[:2]] if node.op in ("Gemm", "MatMul") else []
    return made == [False, True] and "block_size" in node.inputs[1].inputs[0].attrs and is_stored(node.inputs[1].inputs[0])


def varying_axis(node: Node, results: Results) -> Broken:
    """Runtimes that compile the whole model for a device want every axis fixed (QNN, NNAPI and XNNPACK providers)."""
    shape = node.outputs[0].shape if node.op == "Input" else ()
    if any(not isinstance(n, int) for n in shape or ()):
        yield f"Its shape {list(shape or ())} has axes that vary, so nothing of it is compiled.", "Fix every axis."


def foreign_operator(node: Node, results: Results) -> Broken:
    """Only operators of the standard domain run everywhere."""
    if node.domain not in (None, *STANDARD):
        yield f"It is {node.op} of the domain '{node.domain}', which no other runtime has.", FIX


def integer_operator(node: Node, results: Results) -> Broken:
    """Runtimes that take Q/DQ take no operators that compute with codes themselves."""
    if node.op in ("DynamicQuantizeLinear", "MatMulInteger", "ConvInteger") or node.op.startswith("QLinear"):
        yield f"{node.op} is not taken; products of codes are written with QuantizeLinear and DequantizeLinear.", FIX


def measured_range(node: Node, results: Results) -> Broken:
    """Scales and zero points are constants."""
    if node.op in QUANTIZERS and any(not isinstance(t, Constant) for t in node.inputs[1:]):
        yield "Its scale or zero point is no constant.", "Fix the ranges at calibration."


def wide_codes(node: Node, results: Results) -> Broken:
    """No kernel of ONNX Runtime's CPU, NNAPI and XNNPACK providers computes with codes of 16 bits."""
    if node.op in QUANTIZERS and codes_type(node) in ("int16", "uint16"):
        yield "Codes of 16 bits have no integer kernel.", "Use activations of 8 bits."


def no_integer_kernel(node: Node, results: Results) -> Broken:
    """ONNX Runtime's CPU provider computes it in float, and makes floats of its weight at every run."""
    if node.op in HOLDERS.keys() - {"MatMul"} and any(
        maker(t) == "DequantizeLinear" and is_stored(t.inputs[0]) for t in node.inputs
    ):
        yield f"There is no integer kernel for {node.op}, so its weight is dequantized at every run.", FIX


def half_quantized(node: Node, results: Results) -> Broken:
    """A product runs on integers only if both of its factors are codes; codes in blocks stand beside floats."""
    makers = [maker(t) for t in node.inputs[:2]] if node.op in LAYERS and not in_blocks(node) else []
    for tensor, made in zip(node.inputs, makers, strict=False):
        if "DequantizeLinear" in makers and made != "DequantizeLinear":
            yield f"Its input '{tensor.name}' is not quantized, so it is computed in float.", "Quantize both of its factors."


def open_unit(node: Node, results: Results) -> Broken:
    """An operator between DequantizeLinear and QuantizeLinear is a unit that runs on codes; any other is float."""
    if node.op in (*QUANTIZERS, "Input", "Cast", "Shape", "Constant") or is_load_time(node.outputs[0], fixed=True):
        return
    read = node.inputs[:1] if node.op in ("Clip", "Resize") else node.inputs  # bounds and scales are attributes there
    reads = [t for t in read if t.dtype == np.float32 and maker(t) != "DequantizeLinear"]
    makes = [t for t in node.outputs if t.dtype == np.float32 and [r.op for r in t.outputs] != ["QuantizeLinear"]]
    follower = [r.op for t in node.outputs for r in t.outputs]
    made = maker(reads[0]) if reads else ""
    if reads and not (made in (*LAYERS, "Add") or (made not in ("", "Input") and node.op in ("Relu", "Clip"))):
        yield f"Its input '{reads[0].name}' is float, so it does not run on codes.", "Quantize what it reads."
    if makes and follower not in (["Relu"], ["Clip"]):
        yield f"Its output '{makes[0].name}' is not quantized once, so it does not run on codes.", "Quantize what it makes."


def signed_activation(node: Node, results: Results) -> Broken:
    """NNAPI's Conv takes uint8 activations."""
    if node.op == "QuantizeLinear" and codes_type(node) == "int8":
        yield "Its activation codes are int8; NNAPI takes uint8.", "Use unsigned activations."


def unsigned_activation(node: Node, results: Results) -> Broken:
    """XNNPACK takes weights with a scale per channel beside int8 activations only."""
    if node.op == "QuantizeLinear" and codes_type(node) == "uint8":
        yield "Its activation codes are uint8; with scales per channel XNNPACK takes int8.", "Use signed activations."


def uneven_blocks(node: Node, results: Results) -> Broken:
    """OpenVINO 2026.4 and TensorRT for RTX 1.7 load no file in which the last block is shorter."""
    block, lengths = node.attrs.get("block_size", 0), node.inputs[0].shape if node.op == "DequantizeLinear" else None
    inputs = lengths[node.attrs.get("axis", 1)] if block and lengths else 0
    if isinstance(inputs, int) and block and inputs % block:
        yield f"Its blocks of {block} do not divide {inputs} inputs, which is refused.", "Use one scale per output channel."


def openvino_codes(node: Node, results: Results) -> Broken:
    """What OpenVINO 2026.4 computes on integers, read from its compiled models."""
    for index, tensor in enumerate(node.inputs[:2] if node.op in LAYERS and not in_blocks(node) else []):
        if maker(tensor) != "DequantizeLinear":
            continue
        dequantize, stored = tensor.inputs[0], is_stored(tensor.inputs[0])
        offset = any(isinstance(t, Constant) and t.values.astype(np.int32).any() for t in dequantize.inputs[2:])
        if stored and offset:
            yield f"Its weight '{tensor.name}' has a zero point, so it is computed in float.", "Use symmetric weights."
        if stored and (dequantize.attrs.get("block_size") or codes_type(dequantize) not in ("int8", "int32")):
            text = f"The codes of '{tensor.name}' have no integer kernel as they are."
            yield text, "Cast them to int8, one scale per channel."
        if not stored and not all(isinstance(t, Constant) for t in dequantize.inputs[1:]):
            yield f"The range of '{tensor.name}' is measured at run time, over all of it.", "Fix it, or measure it per token."
        if not stored and node.op == "Conv" and index == 0 and offset and codes_type(dequantize) == "int8":
            yield f"The signed codes of '{tensor.name}' have a zero point, so the Conv is float.", "Use unsigned codes."


# --- TensorRT --------------------------------------------------------------------------------------------------------


def unsupported_codes(node: Node, results: Results) -> Broken:
    """The importer takes int8, int4, float8 and float4 codes; uint8 is an error, and an int32 bias is too."""
    kind = codes_type(node) if node.op in QUANTIZERS else ""
    if kind == "int32":
        yield "A bias of int32 codes is refused.", "Leave the bias in float."
    elif kind and kind not in CODES:
        yield f"Codes of type {kind} are refused, or taken for int8.", "Use symmetric int8."


def asymmetric(node: Node, results: Results) -> Broken:
    """Zero points are all zero."""
    if node.op in QUANTIZERS and any(isinstance(t, Constant) and t.values.any() for t in node.inputs[2:]):
        yield "Its zero point is not zero; only symmetric quantization is taken.", "Use symmetric int8."


def vanishing_scale(node: Node, results: Results) -> Broken:
    """Scales are positive."""
    if node.op in QUANTIZERS and isinstance(node.inputs[1], Constant) and not (node.inputs[1].values > 0).all():
        yield "A scale is not above zero.", "Raise the scales of channels without values to the smallest positive one."


def activation_channels(node: Node, results: Results) -> Broken:
    """Scales per channel are for weights."""
    is_weight = node.op == "DequantizeLinear" and is_stored(node)
    if node.op in QUANTIZERS and not is_weight and isinstance(node.inputs[1], Constant) and node.inputs[1].values.size > 1:
        if node.op == "QuantizeLinear" and isinstance(node.inputs[0], Constant):
            return
        yield "An activation has a scale per channel; only weights may.", "Use one scale for the tensor."


def narrow_weights(node: Node, results: Results) -> Broken:
    """int4 codes are read by DequantizeLinear alone; beside quantized activations per channel, and not in a Conv. Blocks beside
    float activations are of int4 and have an even number of outputs.
    """
    if node.op == "Cast" and type_name(node.inputs[0].dtype) == "int4":
        yield "int4 codes are cast, which has no kernel.", "Let DequantizeLinear read them."
    if in_blocks(node):
        weight = node.inputs[1].inputs[0]
        if codes_type(weight) != "int4" or (weight.inputs[0].shape or [0])[-1] % 2:
            text = "Its weight in blocks is not int4 with an even number of outputs, so it is unpacked at every run."
            yield text, "Use one scale per output channel."
    if node.op != "DequantizeLinear" or codes_type(node) != "int4":
        return
    block, quantized = node.attrs.get("block_size", 0), []
    for reader in node.outputs[0].outputs:
        quantized += [reader.op] if maker(reader.inputs[0]) == "DequantizeLinear" else []
    if block and not quantized and block not in BLOCKS:
        yield f"int4 weights have blocks of {block}, not of 64 or 128.", "Use blocks of 64 or 128."
    if "Conv" in quantized or (block and quantized):
        yield "These int4 weights have no kernel beside quantized activations.", "Store their codes as int8."


def is_cut_into_heads(tensor: Tensor, is_cut: bool = False, is_divided: bool = False) -> bool:
    """Whether parts of the tensor are taken and its channels divided among heads, in either order: queries, keys and values."""
    moves = [node for node in tensor.outputs if node.op in (*MOVES, "Mul") and node.inputs[0] is tensor]
    moves += [n for n in tensor.outputs if n.op in ("Add", "Sum") and any(isinstance(t, Constant) for t in n.inputs)]
    behind = ((t, is_cut or n.op in CUTS, is_divided or n.op == "Reshape") for n in moves for t in n.outputs)
    return (is_cut and is_divided) or any(is_cut_into_heads(*found) for found in behind)


def cut_weight(node: Node, results: Results) -> Broken:
    """The weight of a product that is cut into heads is cut in its place. If it is stored as codes, that happens at every run,
    and the product is computed in float; seen in TensorRT for RTX 1.7.
    """
    made = [t.inputs[0] for t in node.inputs[:2] if t.inputs and maker(t) == "DequantizeLinear"] if node.op == "MatMul" else []
    if len(made) == 2 and isinstance(made[1].inputs[0], Constant) and is_cut_into_heads(node.outputs[0]):
        text = "Its product is cut into heads, so its weight is cut at every run and the product computed in float."
        yield text, "Store the weight in float, behind a QuantizeLinear."


def quantized_result(node: Node, results: Results) -> Broken:
    """Between a layer and its normalization or activation function no quantizer may stand, or the two are not one kernel."""
    if node.op != "QuantizeLinear" or maker(node.inputs[0]) not in LAYERS:
        return
    readers = [r.op for t in node.outputs for dq in t.outputs for y in dq.outputs for r in y.outputs]
    if any(op in ("BatchNormalization", "Clip", "LeakyRelu", "Relu", "Sigmoid") for op in readers):
        yield "It stands between a layer and the function behind it, which are one kernel without it.", "Take it out."


def bit_operator(node: Node, results: Results) -> Broken:
    """There are no operators on bits."""
    if node.op.startswith("Bit"):
        yield f"{node.op} is not taken.", "Store one code per byte."


def float_skip(node: Node, results: Results) -> Broken:
    """A Conv and the Add of a residual branch are one int8 kernel if the branch is quantized, and the Conv's result is not."""
    convs = [t for t in node.inputs if maker(t) == "Conv" and maker(t.inputs[0].inputs[0]) == "DequantizeLinear"]
    if node.op == "Add" and convs and not any(maker(t) == "DequantizeLinear" or isinstance(t, Constant) for t in node.inputs):
        yield "The branch that is added to a quantized Conv is float, so the two are not one kernel.", FIX
