"""The activation quantizers of the compressed graph, put in one at a time as the walk reaches their first reader."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from onnxcomp.calibrate.samples import Cut
from onnxcomp.graph.blocks import Block
from onnxcomp.graph.edit import Edit, Graph, Replacement, Tape, apply
from onnxcomp.graph.schedule import Step
from onnxcomp.graph.sites import Site, matches
from onnxcomp.graph.tidy import Fold
from onnxcomp.methods import activations
from onnxcomp.methods.base import Array, Input, InputMethod
from onnxcomp.numerics.affine import QParams
from onnxcomp.recipe import method_name
from onnxcomp.report.model import Decision
from onnxcomp.targets.base import Plan, Point

TOKEN_GAIN_DB = 1.5
"""Fall of the input's squared error, per bit above 3, from which a range per token is worth some 20 % of its MatMul's
time: the fewer the bits, the more of the model's error comes from the input's."""


@dataclass
class Quantizers:
    """The quantizers that stand so far in `compressed`, and those of the plan that are still to come."""

    reference: Graph
    compressed: Graph
    plan: Plan
    methods: Sequence[InputMethod]
    """The methods that change what is quantized."""
    decisions: list[Decision]
    replaced: set[str] = field(default_factory=set)
    """Tensors that are quantized for everyone."""
    granularity: dict[str, str] = field(default_factory=dict)
    """Site -> static or token, where the recipe leaves it open."""
    noise: dict[str, tuple[InputMethod, Mapping[str, Array]]] = field(default_factory=dict)
    """Site -> the method that added something to its input, and what: to be taken out again behind it."""
    folds: list[Fold] = field(default_factory=list)
    """What was put into constants, so that it can be taken out again."""
    added: list[tuple[str, str]] = field(default_factory=list)
    """The names of the Adds in front of quantizers, and the methods that put them there."""
    fakes: dict[str, Callable[[Array], Array]] = field(default_factory=dict)
    """Site, or tensor that is quantized for everyone -> what quantizing it does to one sample."""
    _parameters: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Tensor -> the names of its static scale and zero point."""
    _done: set[Point] = field(default_factory=set)
    _entries: dict[str, str] = field(default_factory=dict)
    """Stored tensor that a method has changed behind its quantizer -> the value before its second quantizer."""

    def due(self, step: Step | None) -> list[Point]:
        """The points that must stand before `step` runs; with None every one that is missing."""
        missing = [point for point in self.plan.points if point not in self._done]
        if step is None:
            return missing
        site = None if step.site is None else step.site.name
        return [p for p in missing if p.tensor in step.reads and (p.consumers is None or site in p.consumers)]

    def entry(self, name: str) -> str:
        """What holds, in the compressed graph, the value that the store keeps under `name`: the one before its own
        quantizer, so that a site's error includes the quantizer's.
        """
        return self._entries.get(name) or (f"{name}/before-quantize" if name in self.replaced else name)

    def fake(self, site: Site) -> Callable[[Array], Array]:
        """What quantizing the site's input does to one sample, as far as it is not in the input already."""
        return self.fakes.get(site.name) or self.fakes.get(site.x) or (lambda x: x)

    def put(self, point: Point, cut: Cut | None) -> None:
        """Quantize one tensor; `cut` offers it as `xh`, and is None where there are no samples."""
        earlier = sum(p.tensor == point.tensor for p in self._done)
        tape = Tape(f"{point.tensor}/quantized" + (f"-{earlier + 1}" if earlier else ""))
        fitted = None
        if point.granularity in ("static", "auto") and point.same_as is None:
            assert cut is not None, "without samples every range is measured at run time"
            fitted = activations.fit_static(cut, point.scheme, point.ranges, point.percentile, point.highest)
        granularity = self._granularity(point, fitted, cut)
        source, noise, plain = point.tensor, None, fitted
        if cut is not None:
            source, fitted, noise = self._change(point, fitted if granularity == "static" else None, cut)
        ratio = 1.0
        if granularity == "token" and cut is not None:
            ratio = activations.fit_ratio(cut, point.scheme)
        if granularity != "static" or fitted is not None:
            how = {"scheme": point.scheme, "granularity": granularity, "q": fitted, "ratio": ratio, "noise": noise}
            fake = functools.partial(activations.fake, **how)
            self.fakes.update(dict.fromkeys(point.consumers or (point.tensor,), fake))
        if granularity != "static":
            new = activations.build_run_time(tape, source, point.scheme, granularity, ratio)
        elif fitted is not None:
            new = activations.build_static(tape, source, fitted)
            self._parameters[point.tensor] = (f"{tape.prefix}.scale", f"{tape.prefix}.zero_point")
            if plain is not None and plain is not fitted:
                method = self.added[-1][1]
                for key, before in (("scale", plain.scale), ("zero_point", plain.zero_point)):
                    self.folds.append(Fold("", 0, method, f"{tape.prefix}.{key}", before, np.zeros(0)))
        else:
            assert point.same_as is not None
            scale, zero_point = self._parameters[point.same_as]
            new = activations.build_shared(tape, source, scale, zero_point, point.scheme)
            self._parameters[point.tensor] = (scale, zero_point)
        replacement = Replacement(point.tensor, new, point.consumers)
        apply(self.compressed, Edit("quantize", tuple(tape.nodes), tape.constants, (replacement,)))
        if point.consumers is None:
            self.replaced.add(point.tensor)
        self._done.add(point)

    def store_again(self, block: Block, label: str, point: Point, cut: Cut) -> None:
        """Quantize a stored tensor a second time, behind what a method has added to it."""
        tape = Tape(f"{block.name}/{label}/range")
        fitted = activations.fit_static(cut, point.scheme, point.ranges, point.percentile)
        new = activations.build_static(tape, point.tensor, fitted)
        before = set(self.compressed.tensors())
        apply(self.compressed, Edit("quantize", tuple(tape.nodes), tape.constants, (Replacement(point.tensor, new),)))
        (self._entries[point.tensor],) = (
            name for name in self.compressed.tensors().keys() - before if name.startswith(f"{point.tensor}/before-quantize")
        )
        self._parameters[point.tensor] = (f"{tape.prefix}.scale", f"{tape.prefix}.zero_point")

    def _granularity(self, point: Point, fitted: QParams | None, cut: Cut | None) -> str:
        """The point's granularity; where it is left open, per token if that lowers the error of the `fitted` static
        quantizer by enough for its price.
        """
        if point.granularity != "auto":
            return point.granularity
        assert fitted is not None
        assert cut is not None
        gain = activations.token_gain(cut, fitted)
        least = TOKEN_GAIN_DB * (point.scheme.bits - 3)
        adopted = gain > least
        reason = "lowers" if adopted else "does not lower"
        reason = f"a range per token {reason} the input's error by the {least:g} dB that it must for its time"
        for site in point.consumers or ():
            self.granularity[site] = "token" if adopted else "static"
            self.decisions.append(Decision(site, "token", adopted, reason, gain, 0))
        return "token" if adopted else "static"

    def _change(self, point: Point, fitted: QParams | None, cut: Cut) -> tuple[str, QParams | None, Array | None]:
        """Let the methods change what is quantized: what the quantizer shall read, its parameters, and what was added."""
        source, noise = point.tensor, None
        sites = tuple(s for s in self.plan.sites if s.kind == "layer" and s.name in (point.consumers or ()))
        only_layers = len(sites) == len(point.consumers or ())  # a product has no bias to take it out with
        for method in self.methods if sites and only_layers else ():
            if noise is not None or not any(matches(method.where, site) for site in sites):
                continue
            tensors = self.reference.tensors()
            place = Input(point.tensor, fitted, sites, tuple(tensors[s.weight].values for s in sites if s.weight is not None))
            outcome, label, added = method.fit(place, cut), method_name(method), 0
            if outcome.fit is not None and fitted is not None:
                tape = Tape(f"{place.name}/{label}")
                source = method.build(tape, place, outcome.fit)[point.tensor]
                apply(self.compressed, Edit(label, tuple(tape.nodes), tape.constants, ()))
                fitted, noise = method.quantizer(outcome.fit, fitted), next(iter(tape.constants.values()))
                added = noise.nbytes
                self.noise.update({site.name: (method, outcome.fit) for site in sites})
                self.added.append((source, label))
            self.decisions.append(Decision(place.name, label, outcome.fit is not None, outcome.reason, outcome.gain_db, added))
        return source, fitted, noise


Progress = Callable[[str, int, int], None]
"""Called as progress(stage, done, total)."""
