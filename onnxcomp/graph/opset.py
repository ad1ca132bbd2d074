"""Bring a model to the operator set that the rest assumes.

Raised with onnx's version converter, on a model without its larger weights, which are inputs for the time being: so
no weight passes through the converter, and 2 GiB is no limit. What the converter loses (metadata, doc strings, the
opsets of other domains) is taken from the model before it. Local functions are written out where they are called.

Limits: opset 7 is the oldest; operators of other domains stay as they are.
"""

import re
from collections.abc import Mapping

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, defs, helper, numpy_helper, version_converter
from onnx.inliner import inline_local_functions
from onnx.shape_inference import InferenceError
from onnx.version_converter import ConvertError

from onnxcomp.errors import ModelError
from onnxcomp.graph.convert import STANDARD, copy_fields, copy_notes, matching_nodes
from onnxcomp.graph.weights import declare_inputs, walk_nodes

OLDEST = 7
TARGET = 21
_ADDED = "onnxcomp.added"
"""Domain of what is in no standard, as long as the converter sees it."""
_IR_VERSION = 10
"""The first IR version with opset 21."""


def standard_opset(model: ModelProto) -> int:
    """The version of the standard operators that the model uses; 1 where it does not say."""
    return next((o.version for o in model.opset_import if o.domain in STANDARD), 1)


def raise_opset(model: ModelProto, weights: Mapping[str, TensorProto]) -> ModelProto:
    """A copy of `model`, a model without these `weights`, in at least opset 21; a newer one stays.

    Raises ModelError below opset 7, and for an operator that has no equal in opset 21.
    """
    version = standard_opset(model)
    if version < OLDEST:
        raise ModelError(f"The model uses opset {version}; {OLDEST} is the oldest supported. Export it again.")
    raised = ModelProto()
    raised.CopyFrom(model)
    declare_inputs(raised, weights)
    if raised.functions:
        raised = inline_local_functions(raised, convert_version=True)
    raised.ir_version = _IR_VERSION
    if version < TARGET:
        copy_fields(_convert(raised, version), raised.graph, ("node", "initializer", "value_info"))
    del raised.graph.input[len(model.graph.input) :]
    others = [o for o in model.opset_import if o.domain not in STANDARD]
    del raised.opset_import[:]
    raised.opset_import.extend([helper.make_opsetid("", max(version, TARGET)), *others])
    raised.ir_version = helper.find_min_ir_version_for(list(raised.opset_import), ignore_unknown=True)
    return raised


def _convert(skeleton: ModelProto, version: int) -> GraphProto:
    """The converted graph; of anything but its nodes and constants, the converter loses a part."""
    wrong = next((node for node in walk_nodes(skeleton.graph) if _is_misconverted(node, version)), None)
    if wrong is not None:
        raise _refusal(version, f"{wrong.op_type} '{wrong.name}' has no equal there")
    for node in walk_nodes(skeleton.graph):
        if node.domain in STANDARD and not defs.has(node.op_type):  # ONNX Runtime adds some to the standard ones
            node.domain = _ADDED
    skeleton.opset_import.append(helper.make_opsetid(_ADDED, 1))
    try:
        converted = version_converter.convert_version(skeleton, TARGET).graph
    except (ConvertError, RuntimeError, InferenceError) as error:
        raise _refusal(version, _reason(str(error))) from error
    for node, original in matching_nodes(converted, skeleton.graph):
        copy_notes(original, node)
    for node in walk_nodes(converted):
        node.domain = "" if node.domain == _ADDED else node.domain
    if version <= 10:
        _keep_resize_grid(converted, version)
    return converted


def _is_misconverted(node: NodeProto, version: int) -> bool:
    """Whether the converter would change what the node computes (onnx 1.23), or leave it in a form that cannot run."""
    if node.domain not in STANDARD:
        return False
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute if a.name in ("axis", "spatial")}
    return (
        (node.op_type == "Hardmax" and version < 13 and attributes.get("axis", 1) != -1)
        or (node.op_type == "BatchNormalization" and version < 9 and attributes.get("spatial", 1) == 0)
        or (node.op_type == "GroupNormalization" and version < 21)
        or (node.op_type == "Scan" and version < 9)
    )


def _keep_resize_grid(converted: GraphProto, version: int) -> None:
    """Until opset 10 Resize and Upsample map corner to corner; the converter leaves later versions at their default.

    ONNX Runtime rounds opset 10's nearest down when enlarging and up when shrinking; scales that are computed are taken
    to enlarge.
    """
    constants = {tensor.name: tensor for tensor in converted.initializer}
    constants |= {n.output[0]: n.attribute[0].t for n in walk_nodes(converted) if n.op_type == "Constant"}
    for node in walk_nodes(converted):
        if node.op_type != "Resize" or node.domain not in STANDARD:
            continue
        scales = constants.get(node.input[2])
        values = numpy_helper.to_array(scales) if scales is not None and scales.dims else np.ones(1, np.float32)
        if (values < 1).any() and (values > 1).any() and not any(a.s == b"linear" for a in node.attribute):
            raise _refusal(version, f"Resize '{node.name}' shrinks one axis and enlarges another")
        node.attribute.append(helper.make_attribute("coordinate_transformation_mode", "asymmetric"))
        node.attribute.append(helper.make_attribute("nearest_mode", "ceil" if (values < 1).any() else "floor"))


def _refusal(version: int, reason: str) -> ModelError:
    text = f"The model cannot be raised from opset {version} to {TARGET}: {reason}."
    return ModelError(f"{text} Export it again with opset {TARGET}.")


def _reason(text: str) -> str:
    operator = re.search(r"\bfor (\w+)\s*$", text.strip())
    return f"its {operator.group(1)} has no equal there" if operator else text.strip().splitlines()[-1]
