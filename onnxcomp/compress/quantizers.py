"""The activation quantizers of the compressed graph, put in one at a time as the walk reaches their first reader."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from onnxcomp.calibrate.samples import Cut
from onnxcomp.graph.behind import function_behind
from onnxcomp.graph.blocks import Block
from onnxcomp.graph.edit import Graph, Tape, apply, tensors_of
from onnxcomp.graph.offsets import Trace
from onnxcomp.graph.schedule import Step
from onnxcomp.graph.sites import Site, matches
from onnxcomp.graph.tidy import Fold
from onnxcomp.methods import activations
from onnxcomp.methods.activations import Fake, Function
from onnxcomp.methods.base import Array, Input, InputMethod, least_gain_db
from onnxcomp.numerics.affine import QParams
from onnxcomp.recipe import method_name
from onnxcomp.report.model import Decision
from onnxcomp.targets.base import Plan, Point

TOKEN_GAIN_DB, TOKEN_ENOUGH_DB = 0.5, 8.0
"""Fall of a 4-bit input's squared error from which a range per token is worth some 20 % of its MatMul's time, and of any
input's.
"""


@dataclass
class Quantizers:
    """The quantizers that stand so far in `compressed`, and those of the plan that are still to come."""

    reference: Graph
    compressed: Graph
    plan: Plan
    methods: Sequence[InputMethod]
    """The methods that change what is quantized."""
    decisions: list[Decision]
    evaluate: Trace
    """Runs a part of the float graph."""
    once: Callable[[Callable[[], Any]], Any] = lambda compute: compute()
    """Finds something out from samples, or remembers it."""
    granularity: dict[str, str] = field(default_factory=dict)
    """Site -> static or token, where the recipe leaves it open."""
    noise: dict[str, tuple[InputMethod, Mapping[str, Array]]] = field(default_factory=dict)
    """Site -> the method that added something to its input, and what: to be taken out again behind it."""
    folds: list[Fold] = field(default_factory=list)
    """What was put into constants, so that it can be taken out again."""
    added: list[tuple[str, str]] = field(default_factory=list)
    """The names of the Adds in front of quantizers, and the methods that put them there."""
    fakes: dict[str, Fake] = field(default_factory=dict)
    """Site, or tensor that is quantized for everyone -> what quantizing it does to one sample."""
    _parameters: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Tensor -> the names of its static scale and zero point."""
    _read_as: dict[str, str] = field(default_factory=dict)
    """Input of the model that is quantized for everyone -> what is read in its place; of any other tensor that has its name."""
    _done: set[Point] = field(default_factory=set)
    entries: dict[str, str] = field(default_factory=dict)
    """Tensor that is quantized for everyone -> what holds, in the compressed graph, the value that the store keeps: the one
    before its own last quantizer, so that a site's error includes the quantizer's."""

    def due(self, step: Step | None) -> list[Point]:
        """The points that must stand before `step` runs; with None every one that is missing."""
        missing = [point for point in self.plan.points if point not in self._done]
        if step is None:
            return missing
        return [p for p in missing if p.tensor in step.reads and (p.consumers is None or step.head in p.consumers)]

    def fake(self, site: Site) -> Fake:
        """What quantizing the site's input does to one sample, as far as it is not in the input already."""
        return self.fakes.get(site.name) or self.fakes.get(site.x) or (lambda x: x)

    def put(self, point: Point, cut: Cut | None) -> None:
        """Quantize one tensor; `cut` offers it as `xh`, and is None where there are no samples."""
        earlier = sum(p.tensor == point.tensor for p in self._done)
        tape = Tape(f"{point.tensor}/quantized" + (f"-{earlier + 1}" if earlier else ""))
        granularity, source, q, fake = point.granularity, self._read_as.get(point.tensor, point.tensor), None, None
        if granularity in ("static", "auto") and point.same_as is None:
            assert cut is not None, "without samples every range is measured at run time"
            how = point.scheme, point.ranges, point.percentile, point.highest, self._behind(point), point.divides, point.tensor
            q = self.once(lambda: activations.fit_static(cut, *how))
            if granularity == "auto":
                granularity = self._granularity(point, q, cut)
        if cut is not None:
            changed, q, fake = self._change(point, q if granularity == "static" else None, cut, tape.prefix)
            source = source if changed == point.tensor else changed
        if granularity != "static":
            ratio = 1.0
            if granularity == "token" and cut is not None:
                ratio = self.once(lambda: activations.fit_ratio(cut, point.scheme))
            new = activations.build_run_time(tape, source, point.scheme, granularity, ratio)
            fake = functools.partial(activations.fake, scheme=point.scheme, granularity=granularity, ratio=ratio)
        elif q is not None:
            new = activations.build_static(tape, source, q)
        else:
            scale, zero_point = self._parameters[point.same_as or ""]
            new = activations.build_shared(tape, source, scale, zero_point, point.scheme)
        if fake is not None:
            self.fakes.update(dict.fromkeys(point.consumers or (point.tensor,), fake))
        self._write(tape, point, new)
        self._done.add(point)

    def _behind(self, point: Point) -> Function | None:
        """What alone is read of a tensor that is quantized for everyone, as a function of its values."""
        part = function_behind(self.reference, point.tensor) if point.consumers is None else None
        if part is None:
            return None
        (result,) = part.outputs
        return lambda values: self.evaluate(part, {point.tensor: values})[result.name].ravel()

    def store_again(self, block: Block, label: str, point: Point, cut: Cut) -> None:
        """Quantize a stored tensor a second time, behind what a method has added to it."""
        tape = Tape(f"{block.name}/{label}/range")
        q = self.once(lambda: activations.fit_static(cut, point.scheme, point.ranges, point.percentile, name=point.tensor))
        self._write(tape, point, activations.build_static(tape, point.tensor, q))

    def _write(self, tape: Tape, point: Point, new: str) -> None:
        """Write the quantizer on the tape, whose output is `new`, into the graph."""
        apply(self.compressed, "quantize", tape, {self._read_as.get(point.tensor, point.tensor): new}, point.consumers)
        if point.consumers is not None:
            return
        self.entries[point.tensor] = next(n for n in self.compressed.nodes if n.name == new).inputs[0].name
        if tape.nodes[-1].inputs[1:]:
            self._parameters[point.tensor] = tape.nodes[-1].inputs[1:]
        if any(t.name == point.tensor for t in self.compressed.inputs):
            self._read_as[point.tensor] = new

    def _granularity(self, point: Point, q: QParams, cut: Cut) -> str:
        """Per token if that lowers the error of the static quantizer `q` by enough for its price, else static."""
        gain = self.once(lambda: activations.token_gain(cut, q))
        least = least_gain_db(point.scheme.bits, TOKEN_GAIN_DB, TOKEN_ENOUGH_DB)
        chosen, verb = ("token", "lowers") if gain > least else ("static", "does not lower")
        reason = f"a range per token {verb} the input's error by the {least:g} dB that it must for its time"
        for site in point.consumers or ():
            self.granularity[site] = chosen
            self.decisions.append(Decision(site, "token", chosen == "token", reason, gain, 0))
        return chosen

    def _change(self, point: Point, q: QParams | None, cut: Cut, prefix: str) -> tuple[str, QParams | None, Fake | None]:
        """Let the first method that will change what is quantized: what the quantizer called `prefix` shall read, its
        parameters, and what both do to one sample.
        """
        sites = tuple(s for s in self.plan.sites if s.kind == "layer" and s.name in (point.consumers or ()))
        only_layers = len(sites) == len(point.consumers or ())  # a product has no bias to take it out with
        for method in [m for m in self.methods if only_layers and any(matches(m.where, site) for site in sites)]:
            tensors, label = tensors_of(self.reference), method_name(method)
            place = Input(point.tensor, q, sites, tuple(tensors[s.weight].values for s in sites if s.weight is not None))
            outcome = self.once(lambda method=method, place=place: method.fit(place, cut))
            if outcome.fit is None or q is None:
                self.decisions.append(Decision(place.name, label, False, outcome.reason, outcome.gain_db, 0))
                continue
            tape, changed = Tape(f"{place.name}/{label}"), method.quantizer(outcome.fit, q)
            source = method.build(tape, place, outcome.fit)[point.tensor]
            apply(self.compressed, label, tape, {})
            (noise,) = tape.constants.values()
            self.decisions.append(Decision(place.name, label, True, outcome.reason, outcome.gain_db, noise.nbytes))
            self.noise.update({site.name: (method, outcome.fit) for site in sites})
            self.added.append((source, label))
            if changed is not q:
                self.folds.append(Fold("", 0, label, prefix, q.scale, changed.zero_point.astype(np.int32) - q.zero_point))
            return source, changed, lambda x, q=changed, noise=noise: q.fake(x + noise) - noise
        return point.tensor, q, None if q is None else q.fake
