"""The walk: quantize a model front to back, one step at a time, on what the compressed model really computes.

At every step: observe -> fit -> build -> Edit -> adopt? -> apply -> advance. The float half of a step and its compressed
half are run on the stored live activations, so the whole walk costs a few passes over the model, whatever its depth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from onnxcomp.calibrate.samples import Cut, Feed, SiteRun, Store
from onnxcomp.graph.convert import to_model
from onnxcomp.graph.edit import Edit, Graph, Replacement, Tape, apply, extract
from onnxcomp.graph.files import ModelProto, to_bytes
from onnxcomp.graph.schedule import Step, schedule
from onnxcomp.graph.sites import Site, matches
from onnxcomp.graph.tidy import fold_bias
from onnxcomp.methods import activations, weights
from onnxcomp.methods.base import Array, Compensation, Outcome
from onnxcomp.methods.bias import TRIM, SampleErrors, decibel
from onnxcomp.numerics.affine import QParams
from onnxcomp.recipe import method_name
from onnxcomp.report.model import Decision
from onnxcomp.runtime import Session
from onnxcomp.targets.base import Plan, Point, Target

TOKEN_GAIN_DB = 1.5
"""Fall of the input's squared error, per bit above 3, from which a range per token is worth some 20 % of its MatMul's
time: the fewer the bits, the more of the model's error comes from the input's."""
Progress = Callable[[str, int, int], None]
"""Called as progress(stage, done, total)."""


def confirm_tokens(
    graph: Graph, like: ModelProto, sites: Sequence[Site], feeds: Sequence[Feed], *, stackable: bool
) -> tuple[Site, ...]:
    """`sites`, with `fixed_tokens` only where running one sample and then two shows that y is [N, T, C] with the samples
    along the first axis: inferred shapes cannot tell [N, T, C] from [T, N, C].
    """
    asked = [site for site in sites if site.fixed_tokens]
    if not asked or all(isinstance(t.shape[0], int) for t in graph.inputs):
        return tuple(sites)
    kept: set[str] = set()
    if stackable:
        names = list(dict.fromkeys(site.y for site in asked))
        part = extract(graph, [t.name for t in graph.inputs], names)
        session = Session(to_bytes(to_model(part, like)))
        one, two = session.run(feeds[0]), session.run({k: np.concatenate([feeds[0][k], feeds[1][k]]) for k in feeds[0]})
        kept = {n for n in names if two[n].shape == (2 * one[n].shape[0], *one[n].shape[1:])}
    return tuple(replace(site, fixed_tokens=site.fixed_tokens and site.y in kept) for site in sites)


@dataclass(frozen=True)
class SiteResult:
    """What the walk found out about one site."""

    before_db: float | None = None
    after_db: float | None = None


@dataclass
class Walk:
    """A model on its way: the float reference, the compressed graph so far, and the samples at the current cut."""

    reference: Graph
    compressed: Graph
    like: ModelProto
    """Where opsets and metadata of the partial models come from."""
    plan: Plan
    target: Target
    methods: tuple[Compensation, ...]
    store: Store | None
    threads: int = 0
    parameters: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Tensor -> the names of its static scale and zero point."""
    replaced: set[str] = field(default_factory=set)
    """Tensors that are quantized for everyone."""
    done: set[Point] = field(default_factory=set)
    granularity: dict[str, str] = field(default_factory=dict)
    """Site -> static or token, where the recipe leaves it open."""
    decisions: list[Decision] = field(default_factory=list)
    results: dict[str, SiteResult] = field(default_factory=dict)

    def run(self, progress: Progress) -> None:
        """Quantize every site of the plan."""
        if self.store is None:
            self._without_data()
            return
        steps = schedule(self.reference, self.plan.heads)
        results = tuple(t.name for t in self.reference.outputs)
        for step, following in zip(steps, [*steps[1:], None], strict=True):
            progress("quantizing", step.index, len(steps))
            for point in self._points(step):
                self._quantize_tensor(point)
            if step.site is not None and step.site.kind == "layer":
                self._quantize_weight(step.site)
                self._compensate(step.site)
            self._advance(step, results if following is None else following.live_in)
        for point in self.plan.points:
            if point not in self.done:
                self._quantize_tensor(point)
        progress("quantizing", len(steps), len(steps))

    def expected(self, count: int) -> list[Mapping[str, Array]]:
        """The outputs that the walk arrived at, for the first `count` batches: what the finished file must reproduce."""
        assert self.store is not None
        found = [dict(batch.live) for batch in self.store.batches[:count]]
        for name in sorted(self.replaced & found[0].keys()):
            session = self._session(extract(self.compressed, [self._entry(name)], [name]))
            for outputs in found:
                outputs.update(session.run({self._entry(name): outputs[name]}))
        return list(found)

    # --- one step --------------------------------------------------------------------------------------------------

    def _points(self, step: Step) -> list[Point]:
        site = None if step.site is None else step.site.name
        return [
            point
            for point in self.plan.points
            if point.tensor in step.reads and point not in self.done and (point.consumers is None or site in point.consumers)
        ]

    def _quantize_tensor(self, point: Point) -> None:
        earlier = sum(p.tensor == point.tensor for p in self.done)
        tape = Tape(f"{point.tensor}/quantized" + (f"-{earlier + 1}" if earlier else ""))
        fitted = self._fit_static(point) if point.granularity in ("static", "auto") and point.same_as is None else None
        granularity = self._granularity(point, fitted)
        if granularity != "static":
            ratio = 1.0
            if granularity == "token" and self.store is not None:
                ratio = activations.fit_ratio(self._cut(point.tensor), point.scheme)
            new = activations.build_run_time(tape, point.tensor, point.scheme, granularity, ratio)
        elif fitted is not None:
            new = activations.build_static(tape, point.tensor, fitted)
            self.parameters[point.tensor] = (f"{tape.prefix}.scale", f"{tape.prefix}.zero_point")
        else:
            assert point.same_as is not None
            scale, zero_point = self.parameters[point.same_as]
            new = activations.build_shared(tape, point.tensor, scale, zero_point, point.scheme)
            self.parameters[point.tensor] = (scale, zero_point)
        replacement = Replacement(point.tensor, new, point.consumers)
        apply(self.compressed, Edit("quantize", tuple(tape.nodes), tape.constants, (replacement,)))
        if point.consumers is None:
            self.replaced.add(point.tensor)
        self.done.add(point)

    def _fit_static(self, point: Point) -> QParams:
        cut = self._cut(point.tensor)
        return activations.fit_static(cut, point.scheme, point.ranges, point.percentile, point.highest)

    def _granularity(self, point: Point, fitted: QParams | None) -> str:
        """The point's granularity; where it is left open, per token if that lowers the error of the `fitted` static
        quantizer by enough for its price.
        """
        if point.granularity != "auto":
            return point.granularity
        assert fitted is not None
        gain = activations.token_gain(self._cut(point.tensor), fitted)
        least = TOKEN_GAIN_DB * (point.scheme.bits - 3)
        adopted = gain > least
        reason = "lowers" if adopted else "does not lower"
        reason = f"a range per token {reason} the input's error by the {least:g} dB that it must for its time"
        for site in point.consumers or ():
            self.granularity[site] = "token" if adopted else "static"
            self.decisions.append(Decision(site, "token", adopted, reason, gain, 0))
        return "token" if adopted else "static"

    def _quantize_weight(self, site: Site) -> None:
        bits = self.plan.settings[site.name].weight_bits
        tensors = self.compressed.tensors()
        assert site.weight is not None
        if site.weight not in tensors or tensors[site.weight].inputs:
            return  # a weight shared with an earlier site is already stored as codes
        same = [s.name for s in self.plan.sites if s.weight == site.weight and self._weight_bits(s) == bits]
        everyone = {n.name for n in tensors[site.weight].outputs} <= set(same)
        tape = Tape(f"{site.weight}/quantized" if everyone else f"{site.name}/weight")
        new = weights.build(tape, site, weights.fit(site, tensors[site.weight].values, bits), bits)
        replacements = tuple(Replacement(old, to, None if everyone else tuple(same)) for old, to in new.items())
        apply(self.compressed, Edit("quantize", tuple(tape.nodes), tape.constants, replacements))

    def _weight_bits(self, site: Site) -> int:
        return self.plan.settings[site.name].weight_bits

    def _compensate(self, site: Site) -> None:
        measured: list[Outcome] = []
        for method in self.methods:
            if not matches(method.where, site):
                continue
            outcome = method.fit(site, self._site_cut(site))
            measured.append(outcome)
            added = 0
            if outcome.fit is not None:
                added = self._adopt(site, method, outcome.fit)
            self.decisions.append(
                Decision(site.name, method_name(method), outcome.fit is not None, outcome.reason, outcome.gain_db, added)
            )
        if measured:
            self.results[site.name] = SiteResult(measured[0].before_db, measured[-1].after_db)
            return
        errors = self._site_cut(site).reduce(
            lambda batch: SampleErrors.of(batch, site.channel_axis, TRIM), frozenset({"f_xh", "g_xh"})
        )
        found = decibel(errors.energy, errors.error)
        self.results[site.name] = SiteResult(found, found)

    def _adopt(self, site: Site, method: Compensation, fit: Mapping[str, Array]) -> int:
        """Write a fitted method into the graph; the bytes that it adds to the file."""
        label = method_name(method)
        tape = Tape(f"{site.name}/{label}")
        new = method.build(tape, site, fit)
        replacements = tuple(Replacement(old, to) for old, to in new.items())
        apply(self.compressed, Edit(label, tuple(tape.nodes), tape.constants, replacements))
        stored = sum(a.nbytes for a in tape.constants.values())
        replaced = 0 if site.bias is None else 4 * int(self.reference.tensors()[site.bias].values.size)
        if tape.nodes[-1].op == "Add" and fold_bias(self.compressed, site, tape.nodes[-1].name):
            return stored - replaced
        return stored

    def _advance(self, step: Step, needed: Sequence[str]) -> None:
        assert self.store is not None
        if not step.computed:
            self.store.advance(None, needed, {})
            return
        part = extract(self.compressed, [self._entry(name) for name in step.live_in], list(step.computed))
        self.store.advance(self._session(part), needed, self._feeds(part, step.live_in))

    # --- sessions on parts -------------------------------------------------------------------------------------------

    def _cut(self, tensor: str) -> Cut:
        assert self.store is not None
        return Cut(self.store.batches, aliases={"xh": tensor})

    def _site_cut(self, site: Site) -> Cut:
        """The samples with the site's float and compressed output, both fed with what the compressed model computes."""
        assert self.store is not None
        inputs = list(dict.fromkeys(site.inputs))
        part = extract(self.compressed, [self._entry(name) for name in inputs], [site.y])
        runs = {
            "f_xh": SiteRun(self._session(extract(self.reference, inputs, [site.y])), {n: n for n in inputs}, site.y),
            "g_xh": SiteRun(self._session(part), self._feeds(part, inputs), site.y),
        }
        return Cut(self.store.batches, runs, {"xh": site.x})

    def _feeds(self, part: Graph, names: Sequence[str]) -> dict[str, str]:
        wanted = {t.name for t in part.inputs}
        return {self._entry(name): name for name in names if self._entry(name) in wanted}

    def _entry(self, name: str) -> str:
        """What holds, in the compressed graph, the value that the store keeps under `name`: the one before its own
        quantizer, so that a site's error includes the quantizer's.
        """
        return f"{name}/before-quantize" if name in self.replaced else name

    def _session(self, part: Graph) -> Session:
        return Session(to_bytes(to_model(self.target.lower(part), self.like)), threads=self.threads)

    def _without_data(self) -> None:
        """Weights from themselves, activations at run time: no step needs a sample."""
        for point in self.plan.points:
            self._quantize_tensor(point)
        for site in self.plan.sites:
            if site.kind == "layer":
                self._quantize_weight(site)
