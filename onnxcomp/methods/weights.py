"""Weight rounding: symmetric codes per output channel, scale by least squared error, round to nearest.

W ~ scale[c] * codes,   codes in -2^(b-1) .. 2^(b-1) - 1
"""

from __future__ import annotations

import numpy as np

from onnxcomp.graph.edit import Tape
from onnxcomp.graph.sites import Site
from onnxcomp.methods.base import Array, Fit
from onnxcomp.numerics.affine import weight_qparams


def fit(site: Site, w: Array, bits: int) -> Fit:
    """Codes (int8, the weight's shape) and scale (float32 [C_out]) of the site's weight."""
    q = weight_qparams(w, site.weight_axis, bits, "mse")
    return {"codes": q.quantize(w), "scale": q.scale.astype(np.float32)}


def build(op: Tape, site: Site, fitted: Fit, bits: int) -> dict[str, str]:
    """Record the dequantization of the stored codes; it replaces the weight."""
    assert site.weight is not None
    codes, scale = op.constant("codes", fitted["codes"]), op.constant("scale", fitted["scale"])
    return {site.weight: op.abstract("Dequantize", codes, scale, bits=bits, axis=site.weight_axis)}
