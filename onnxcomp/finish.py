"""The last form of a file, where its target asks for one, and who says which kernels it gets."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from onnxcomp import runtime
from onnxcomp.errors import ModelError
from onnxcomp.graph import files
from onnxcomp.graph.edit import Graph
from onnxcomp.graph.files import ModelProto
from onnxcomp.graph.finish import fix_axes, to_half, to_oldest_opset
from onnxcomp.recipe import Recipe
from onnxcomp.runtime import Feed
from onnxcomp.targets.audit import Kernel, audit, foretell
from onnxcomp.targets.target import Target


def finish(model: ModelProto, target: Target, recipe: Recipe, feeds: Sequence[Feed]) -> ModelProto:
    """The lowered model in float16, or in an older opset that computes the same on `feeds`."""
    if recipe.half:
        return to_half(model)
    if not target.oldest:
        return model
    outputs = [runtime.Session(files.to_bytes(model), optimize=False).run(feed) for feed in feeds]

    def computes_the_same(older: ModelProto) -> bool:
        try:
            session = runtime.Session(files.to_bytes(older), optimize=False)
            found = [session.run(feed) for feed in feeds]
        except ModelError:
            return False
        return all(np.array_equal(a[name], b[name]) for a, b in zip(found, outputs, strict=True) for name in b)

    return to_oldest_opset(model, computes_the_same)


def fix(model: ModelProto, feed: Feed) -> None:
    """Fix every axis of the model at the length that it has with this feed, in place."""
    shapes = {name: array.shape for name, array in feed.items()}
    results = runtime.Session(files.to_bytes(model)).run(feed)
    fix_axes(model, shapes | {name: array.shape for name, array in results.items()})


def find_kernels(
    path: Path, target: Target, lowered: Graph, sites: Mapping[str, Sequence[str]]
) -> tuple[tuple[Kernel, ...], str, list[str]]:
    """What computes each site of the model at `path`; who says so; and where the target's rules foretold otherwise."""
    foretold = foretell(lowered, target, sites)
    if target.kernels != "onnxruntime":
        return foretold, f"the rules of {target.name}, which did not run here", []
    found = audit(path, sites)
    wrong = [a.site for a, b in zip(found, foretold, strict=True) if a.integer != b.integer]
    notes = [f"The rules of {target.name} foretold other kernels at {', '.join(wrong)}."] if wrong else []
    return found, f"onnxruntime {runtime.version()}", notes
