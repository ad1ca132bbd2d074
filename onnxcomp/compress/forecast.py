"""What a run will take, foretold in front of the walk from shapes and from one timed float pass of a batch.

    live      the tensors alive at a cut, of all samples: the most over all cuts
    memory    what the process took so far + the live tensors within the budget + what one step and the proof work on
    disk      the live tensors beyond the budget; all of two cuts in a folder that stays
    seconds   those in front of the walk + batches * (passes * a float pass + statistics / cores) + pieces of the model
              + solves of the weights that are fitted to inputs

Limits: memory within a factor of 1.5, time within a factor of 2, on the models that it was tried on, on a machine that does
nothing else and without a cluster.
"""

import math
import time
import timeit
from collections.abc import Callable, Mapping

import numpy as np

from onnxcomp.calibrate.room import peak_memory
from onnxcomp.calibrate.samples import BATCH
from onnxcomp.compress import rebuild
from onnxcomp.compress.walk import Walk
from onnxcomp.graph.convert import to_model
from onnxcomp.graph.edit import tensors_of
from onnxcomp.graph.files import bytes_of
from onnxcomp.graph.finish import fix_axes
from onnxcomp.graph.mapped import outside
from onnxcomp.graph.types import TensorType
from onnxcomp.methods.base import Array
from onnxcomp.methods.weights import ROWS_PER_SAMPLE
from onnxcomp.report.model import Forecast
from onnxcomp.runtime import Session, cores, infer_types

PASSES, BLOCK_PASSES = 3, 2
"""Through every stretch: to advance, float and compressed to compare; those that block methods add."""
PIECES = 8
"""Of a step, counted in times that it takes to cut a piece of the model out and load it: three pieces, and edits."""
STEP_SECONDS, TOUCHES = 1e-3, 6
"""What a step costs for each batch whatever its size, and how often a statistic touches a value that a layer reads or gives."""
PRICE_SECONDS = 0.12
"""What timing an edit takes: a bias behind a layer that has no Add to put it into."""
WORKING, COPIES = 6, 4
"""Copies that a step makes of what its layer reads and gives, for a batch, and the proof of the model."""
SOLVE = 1.5e-4, 2e10
"""Seconds for each input of a weight that is fitted, and multiplications a second."""


def forecast(walk: Walk, feed: Mapping[str, Array], batches: int, budget: int, *, stays: bool, start: float) -> Forecast:
    """What `walk` will take for so many batches like `feed`; `stays`: live tensors lie in a folder that stays; `start`: when,
    by `time.perf_counter`, the call began that has come up to here.
    """
    model = to_model(walk.reference, walk.like)
    session, size, there = Session(model), bytes_of(model), outside(model)
    outputs, once = session.run(feed), _seconds(lambda: session.run(feed))
    fix_axes(model, {name: array.shape for name, array in (*feed.items(), *outputs.items())})
    types, steps = infer_types(model), walk.steps()
    live = batches * max(sum(_bytes(types.get(name)) for name in step.live_in) for step in steps)
    live, held, refining = rebuild.foresee(walk, live, once)
    layers = [site for site in walk.plan.sites if site.kind == "layer"]
    worked = [_bytes(types.get(site.x)) + _bytes(types.get(site.y)) for site in layers]
    sums, solving = [0], 0.0
    for site in (s for s in layers if walk.plan.settings[s.name].rounding == "gptq"):
        shape = tensors_of(walk.reference)[site.weight or ""].shape
        outs = shape[site.weight_axis]
        ins = math.prod(shape) // outs
        sums.append(16 * ins * (ins + outs))
        rows = batches * min(_bytes(types.get(site.y)) / (4 * outs), BATCH * ROWS_PER_SAMPLE)
        solving += SOLVE[0] * ins + (rows / cores() + 8 * ins) * ins * (ins + outs) / SOLVE[1]
    passes = PASSES + BLOCK_PASSES * bool(walk.blocks)
    array, middle = np.ones(1 << 20, np.float32), next(s for s in steps[len(steps) // 2 :] if s.computed)
    touch = _seconds(lambda: np.rint(array / 3)) / array.nbytes
    live_in = {name: name for name in middle.live_in}
    piece = _seconds(lambda: walk.run_of(walk.reference, live_in, middle.computed).session)
    beside = TOUCHES * touch * sum(worked) + STEP_SECONDS * len(steps)  # of a pass, on one core
    seconds = batches * (passes * once + beside / cores())
    bare = [site for site in layers if site.op == "MatMul" and site.y == site.raw and walk.methods]
    seconds += PIECES * piece * len(steps) + solving + refining + PRICE_SECONDS * len(bare) + time.perf_counter() - start
    memory = (
        peak_memory()
        + held
        + min(live, budget)
        + WORKING * max(worked, default=0)
        + 4 * max(sums)
        + COPIES * (size - there)
        + there
    )
    return Forecast(live, memory, 2 * live if stays else max(live - budget, 0), seconds)


def _bytes(kind: TensorType | None) -> int:
    """Of a tensor, as far as its shape is known."""
    if kind is None or kind.dtype is None or kind.shape is None:
        return 0
    return math.prod(n for n in kind.shape if isinstance(n, int)) * kind.dtype.itemsize


def _seconds(run: Callable[[], object]) -> float:
    """The shorter of two times."""
    return min(timeit.repeat(run, number=1, repeat=2))
