"""The last form of a file, where its target asks for one, and who says which kernels it gets."""

import functools
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from onnxcomp import runtime
from onnxcomp.errors import ModelError
from onnxcomp.graph.edit import Graph
from onnxcomp.graph.files import ModelProto
from onnxcomp.graph.finish import fix_axes, to_half, to_oldest_opset
from onnxcomp.graph.mapped import embed
from onnxcomp.targets import openvino, tensorrt
from onnxcomp.targets.audit import Kernel, audit, audit_sites, check, foretell
from onnxcomp.targets.base import Plan
from onnxcomp.targets.fallback import OF_INTEGERS
from onnxcomp.targets.target import Target
from onnxcomp.verify import demand, without


def finish(model: ModelProto, target: Target, feeds: Sequence[runtime.Feed], *, half: bool) -> ModelProto:
    """The lowered model in float16 if it is to be `half`, or in an older opset that computes the same on `feeds`."""
    if half:
        return to_half(embed(model))
    if not target.oldest:
        return model
    model = embed(model)
    outputs = [runtime.Session(model, optimize=False).run(feed) for feed in feeds]

    def computes_the_same(older: ModelProto) -> bool:
        try:
            session = runtime.Session(older, optimize=False)
            found = [session.run(feed) for feed in feeds]
        except ModelError:
            return False
        return all(np.array_equal(a[name], b[name]) for a, b in zip(found, outputs, strict=True) for name in b)

    return to_oldest_opset(model, computes_the_same)


def fix(model: ModelProto, feed: runtime.Feed) -> None:
    """Fix every axis of the model at the length that it has with this feed, in place."""
    shapes = {name: array.shape for name, array in feed.items()}
    results = runtime.Session(model).run(feed)
    fix_axes(model, shapes | {name: array.shape for name, array in results.items()})


def find_kernels(
    path: Path, target: Target, lowered: Graph, plan: Plan, feeds: Sequence[runtime.Feed], single: runtime.Feed,
    reference: runtime.Session, picked: Collection[str] = (),
) -> tuple[tuple[Kernel, ...], str, list[str]]:  # fmt: skip
    """What computes each site of the model at `path`; who says so; and what the target's rules object to, or foretold wrongly.
    The model is run on `feeds`, or built for a `single` sample.

    Where the target's runtime is another one that is installed, it must also compute what ONNX Runtime does, but for outputs
    that are `picked`: raises VerificationError if it does not.
    """
    violations = [v for v in check(lowered, target) if v.op != "Input" or not target.fixed]  # axes are fixed at the end
    sites, notes = audit_sites(lowered, plan), list[str]()
    foretold = foretell(lowered, violations, sites)
    meant = {s.name for s in plan.sites if s.name not in plan.settings or plan.settings[s.name].activations != "float"}
    objections = [v for v in violations if v.node in meant or v.rule not in OF_INTEGERS]  # others are float as was decided
    for rule in dict.fromkeys(v.rule for v in objections):
        first, *others = (v for v in objections if v.rule == rule)
        more = f" and {len(others)} more" if others else ""
        notes.append(f"{target.name} would object to {first.node}{more}: {first.reason}")
    kernels: Mapping[str, tuple[str, bool]] = {}
    if target.kernels == "onnxruntime":
        by = f"onnxruntime {runtime.version()}"
    elif target.kernels == "openvino" and openvino.is_installed():
        compiled, by = openvino.compile_model(path), openvino.version()
        if not target.is_exact_here():
            text = f"The outputs of {by} were not compared, for this CPU has no VNNI and saturates."
            notes.append(f"{text} For such CPUs there is --target {target.name}-avx2.")
        else:
            runners = (functools.partial(openvino.run, compiled), runtime.Session(path, optimize=False).run, reference.run)
            found, other, want = ([run(feed) for feed in feeds] for run in runners)
            want = [without(outputs, picked) for outputs in want]
            demand(found, other, want, f"of {by} and of ONNX Runtime differ by more than twice the quantization error")
        kernels = openvino.kernels(compiled, lowered)
    elif target.kernels == "tensorrt" and tensorrt.installed() is not None:
        kernels, by = tensorrt.kernels(path, lowered, {k: x.shape for k, x in single.items()}), tensorrt.version()
    else:
        return foretold, f"the rules of {target.name}, which did not run here", notes
    named = (Kernel(k.site, *kernels.get(k.site, (k.op, k.integer)), k.reason) for k in foretold)
    told = tuple(named) if kernels else audit(path, lowered, sites)
    wrong = [a.site for a, b in zip(told, foretold, strict=True) if a.integer != b.integer]
    notes += [f"The rules of {target.name} foretold other kernels at {', '.join(wrong)}."] if wrong else []
    return told, by, notes
