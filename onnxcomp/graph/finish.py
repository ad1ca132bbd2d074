"""The last form of a finished model, where a target asks for one: float16, fixed axes, an older opset."""

import sys
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy

from onnx import ModelProto, checker, helper, shape_inference

from onnxcomp.graph.convert import STANDARD
from onnxcomp.graph.opset import standard_opset

OLDEST = 13
"""The opset from which scales may run along an axis."""
OVERFLOWING = ("Exp", "Log")
"""Operators whose neighbourhood leaves the range of float16: those of compensation in log space."""


def to_half(model: ModelProto) -> ModelProto:
    """The model in float16, its inputs and outputs as they were. The logarithms and exponentials of a compensation, and what is
    named after the same edit, stay float32.
    """
    path = list(sys.path)
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    sys.path[:] = path  # onnxruntime.transformers appends its own folder
    edits = {node.name.rpartition("/")[0] for node in model.graph.node if node.op_type in OVERFLOWING}
    kept = [node.name for node in model.graph.node if node.name.rpartition("/")[0] in edits - {""}]
    half = OnnxModel(convert_float_to_float16(deepcopy(model), keep_io_types=True, op_block_list=[], node_block_list=kept))
    half.topological_sort(is_deterministic=True)
    return half.model


def fix_axes(model: ModelProto, shapes: Mapping[str, Sequence[int]]) -> None:
    """Give the model's inputs and outputs these shapes, in place."""
    for value in (*model.graph.input, *model.graph.output):
        value.CopyFrom(helper.make_tensor_value_info(value.name, value.type.tensor_type.elem_type, shapes[value.name]))
    del model.graph.value_info[:]


def to_oldest_opset(model: ModelProto, computes_the_same: Callable[[ModelProto], bool]) -> ModelProto:
    """The model in the oldest opset, from 13 on, whose operators it is written in: the checker takes it, and it computes the
    same.
    """
    for version in range(OLDEST, standard_opset(model)):
        older = deepcopy(model)
        for entry in older.opset_import:
            entry.version = version if entry.domain in STANDARD else entry.version
        older.ir_version = helper.find_min_ir_version_for(list(older.opset_import), ignore_unknown=True)
        try:
            checker.check_model(older, full_check=True)
        except (checker.ValidationError, shape_inference.InferenceError, ValueError):  # also of more than 2 GiB
            continue
        if computes_the_same(older):
            return older
    return model
