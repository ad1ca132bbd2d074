"""Masks of attention: what is added to logits so that their Softmax leaves them out.

They are the lowest float, -inf or -10000: a range with such a value in it has no codes for anything else. -100 masks as well,
for exp(-100) is 0 in float32.

Limits: constants, at once or behind operators that pass them on; the caller shows that the outputs are the same, which they are
not where a whole row is masked.
"""

import numpy as np

from onnxcomp.graph.edit import Constant, Graph, Tensor, tensors_of
from onnxcomp.graph.offsets import MOVES

LARGE, MASK = 1e3, 100.0
_PASSING = frozenset({"Add", "Cast", "Concat", "Expand", "Max", "Mul", "Sub", "Trilu", "Where", *MOVES})


def bound_masks(graph: Graph) -> int:
    """Bound, in place, the constants that nothing but Softmaxes sees in the end, and count them."""
    constants = [t for t in tensors_of(graph).values() if isinstance(t, Constant) and t.dtype == np.float32]
    masks = [t for t in constants if _is_logit(t) and (np.abs(t.values) >= LARGE).any()]
    for mask in masks:
        mask.values = np.where(np.abs(mask.values) >= LARGE, np.copysign(np.float32(MASK), mask.values), mask.values)
    return len(masks)


def _is_logit(tensor: Tensor) -> bool:
    """Whether all who read the tensor are Softmaxes, at once or behind what passes its values on."""
    readers = (r.op == "Softmax" or (r.op in _PASSING and all(map(_is_logit, r.outputs))) for r in tensor.outputs)
    return bool(tensor.outputs) and all(readers)
