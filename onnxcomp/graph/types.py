"""What a tensor of a graph is: its Python type, and its element type and shape as far as they are known."""

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper

Tensor = gs.Tensor
"""A tensor of a graph: a `gs.Variable` or a `gs.Constant`."""


@dataclass(frozen=True)
class TensorType:
    """What is known about a tensor: None stands for unknown, a name or None in a shape for a dimension that varies."""

    dtype: np.dtype | None
    shape: tuple[int | str | None, ...] | None


def element_type(text: str) -> np.dtype | None:
    """The dtype of a type as a runtime writes it, such as `tensor(float)`; None for what is no tensor."""
    element = dict(TensorProto.DataType.items()).get(text.removeprefix("tensor(").removesuffix(")").upper())
    return None if element is None else helper.tensor_dtype_to_np_dtype(element)


def type_name(dtype: object) -> str:
    """A tensor's element type, which is numpy's or the number of one of ONNX's that numpy lacks, as a word: `int4`."""
    if dtype is None:
        return ""
    return TensorProto.DataType.Name(dtype).lower() if isinstance(dtype, int) else np.dtype(dtype).name  # pyright: ignore
