"""Weight rounding: codes and scales per output channel, and what they stand for in the graph."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcomp.graph.edit import DOMAIN, Tape
from onnxcomp.graph.sites import Site
from onnxcomp.methods import weights
from onnxcomp.numerics.affine import weight_qparams

MATMUL = Site("fc", "MatMul", "layer", ("x",), "y", "y", -1, weight="w", weight_axis=1)
CONV = Site("conv", "Conv", "layer", ("x",), "y", "y", 1, rank=4, weight="w", weight_axis=0)


@pytest.mark.parametrize(("site", "shape", "channels"), [(MATMUL, (6, 5), 5), (CONV, (4, 3, 2, 2), 4)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_weight_has_one_scale_per_output_channel_and_codes_of_its_width(
    rng: np.random.Generator, site: Site, shape: tuple[int, ...], channels: int, bits: int
):
    w = rng.normal(size=shape).astype(np.float32)

    fit = weights.fit(site, w, bits)

    codes, scale = fit["codes"], fit["scale"]
    assert (codes.dtype, codes.shape, scale.dtype, scale.shape) == (np.int8, shape, np.float32, (channels,))
    assert -(2 ** (bits - 1)) <= codes.min()
    assert codes.max() <= 2 ** (bits - 1) - 1
    q = weight_qparams(w, site.weight_axis, bits, "mse")
    assert scale.tobytes() == q.scale.tobytes()
    along = scale.reshape([-1 if i == site.weight_axis else 1 for i in range(w.ndim)])
    nearest = np.clip(np.rint(w / along), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert np.array_equal(codes, nearest)


def test_a_weight_on_its_own_grid_is_kept_exactly():
    codes = np.array([[-8, 3], [7, -8], [1, 7]], np.int8)
    w = codes * np.array([0.5, 2], np.float32)

    fit = weights.fit(MATMUL, w, 4)

    assert np.array_equal(fit["codes"] * fit["scale"], w)


def test_a_dead_channel_has_codes_of_zero_and_a_positive_scale():
    fit = weights.fit(MATMUL, np.array([[0, 1], [0, -1]], np.float32), 8)

    assert fit["codes"][:, 0].tolist() == [0, 0]
    assert fit["scale"][0] > 0


@pytest.mark.parametrize(("site", "axis"), [(MATMUL, 1), (CONV, 0)])
def test_the_codes_replace_the_weight_behind_one_abstract_node(site: Site, axis: int):
    tape = Tape("w/quantized")
    fitted = {"codes": np.ones((2, 2), np.int8), "scale": np.ones(2, np.float32)}

    new = weights.build(tape, site, fitted, 4)

    (node,) = tape.nodes
    assert new == {"w": node.outputs[0]}
    assert (node.op, node.domain, node.inputs) == ("Dequantize", DOMAIN, ("w/quantized.codes", "w/quantized.scale"))
    assert node.attrs == {"bits": 4, "axis": axis}
