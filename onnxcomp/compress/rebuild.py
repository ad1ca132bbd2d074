"""What reconstruction needs of a walk: the float model's own tensors beside the live ones, and a stretch out and back in.

The float model is run along on the samples as they are, a stretch at a time, so what it has behind every stretch is there
when the walk arrives, and once at the start for its outputs: two more float passes, and as much again of live tensors.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

from onnxcomp.graph.blocks import Block
from onnxcomp.graph.edit import Constant, extract, tensors_of
from onnxcomp.graph.schedule import Step
from onnxcomp.methods import reconstruction
from onnxcomp.report.model import Decision

if TYPE_CHECKING:
    from onnxcomp.compress.walk import Walk

OWN = "float/"
"""In front of the name of a live tensor: the float model's own."""


SLOWER, TORCH = 8, 3 << 27
"""A step of one batch in torch, in float passes of the runtime; bytes that torch takes."""


def foresee(walk: Walk, live: int, once: float) -> tuple[int, int, float]:
    """Bytes of `live` tensors with reconstruction, bytes that it holds, and its seconds; `once`: of a float pass of a batch."""
    return (live, 0, 0.0) if walk.seed is None else (2 * live, live + TORCH, reconstruction.STEPS * SLOWER * once)


def follow(walk: Walk, step: Step, kept: Collection[str]) -> set[str]:
    """Take the float model through one step, in front of the compressed one; the names of its tensors that stay."""
    assert walk.store is not None
    inputs, results = {t.name for t in walk.reference.inputs}, [t.name for t in walk.reference.outputs]
    if step.index == 0:
        for name in results:
            walk.store.add(reconstruction.RESULT + name, walk.run_of(walk.reference, {k: k for k in inputs}, [name]))
    own = {name: name if name in inputs else OWN + name for name in step.live_in}
    run = walk.run_of(walk.reference, own, step.computed, prefix=OWN) if step.computed else None
    stay = {OWN + name for name in kept} | {reconstruction.RESULT + name for name in results}
    walk.store.advance(run, {*step.live_in, *kept, *stay})
    return stay


def reconstruct(walk: Walk, block: Block, seed: int, alive: Collection[str]) -> None:
    """Refine a finished stretch, and compute what is behind it anew; `alive`: what is read there, or later."""
    assert walk.store is not None
    live = {walk.quantizers.entries.get(name, name): name for name in block.inputs}
    part = extract(walk.compressed, list(live), [block.y])
    inside, tensors = {node.name for node in part.nodes}, tensors_of(walk.compressed)
    read = {t.name for node in part.nodes for t in (*node.inputs, *node.outputs) if t.name}
    shared = [tensors[name] for name in read if any(reader.name not in inside for reader in tensors[name].outputs)]
    if walk.target.encoding.saturates:  # products of 8-bit codes have to fit, as they were held to
        layers = [node for node in part.nodes if len(node.inputs) > 1]
        wide = [n for n in layers if any(m.op == "Dequantize" and m.attrs["bits"] == 8 for m in n.inputs[1].inputs)]
        shared += [t for node in wide for t in node.inputs[:2]]
    makers = [maker for t in shared for maker in t.inputs if maker.op in ("Dequantize", "FakeQuantize")]
    fixed = {t.name for t in (*shared, *(t for maker in makers for t in maker.inputs))}
    feeds = {t.name: live[t.name] for t in part.inputs}
    results = [t.name for t in walk.reference.outputs if t.name not in alive and t.dtype == np.float32]
    run = walk.run_of(walk.reference, {name: name for name in alive}, results) if results else None
    beside = {reconstruction.RESULT + name for name in results}.union(run.feeds.values() if run else ())
    cut = walk.store.cut({name: name for name in {*feeds.values(), *beside}} | {"g_xh": block.y, "f_xh": OWN + block.y})
    weights = [node.inputs[1] for node in walk.reference.nodes if len(node.inputs) > 1]
    floats = {t.name: t.values for t in weights if isinstance(t, Constant) and t.name in read}
    how = {"tokens": block.channel_axis == -1, "y": block.y, "tail": run.outputs if run else None, "beside": beside}
    outcome = walk.work.once(lambda: reconstruction.fit(block.name, part, feeds, cut, floats, fixed, seed, **how))
    for name, values in (outcome.fit or {}).items():
        tensors[name].values = values
    walk.decisions.append(Decision(block.name, "reconstruction", outcome.fit is not None, outcome.reason, outcome.gain_db, 0))
    if outcome.fit is not None and not walk.work.is_ahead:
        walk.store.add(block.y, walk.run_of(walk.compressed, live, [block.y]))
