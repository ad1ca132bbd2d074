"""The walk: quantize a model front to back, one step at a time, on what the compressed model really computes.

At every step: observe -> fit -> build -> Edit -> adopt? -> apply -> advance. The float half of a step and its compressed
half are run on the stored live activations, so the whole walk costs a few passes over the model, whatever its depth: a
compressed pass to advance, a float and a compressed one for layer targets, a float one for block targets.

Order at a layer: activation range and granularity (and what changes the input) -> weight rounding -> residual terms ->
bias. At the end of a block: what compensates the block; at the end: what compensates the output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from onnxcomp.calibrate.samples import Cut, SiteRun, Store, split
from onnxcomp.compress.quantizers import Progress, Quantizers
from onnxcomp.errors import UsageError
from onnxcomp.graph.blocks import Block
from onnxcomp.graph.convert import to_model
from onnxcomp.graph.edit import Edit, Graph, Replacement, Tape, apply, extract
from onnxcomp.graph.files import ModelProto, to_bytes
from onnxcomp.graph.offsets import fold_offset
from onnxcomp.graph.schedule import Step, schedule
from onnxcomp.graph.sites import Site, matches
from onnxcomp.graph.tidy import fold_bias
from onnxcomp.methods import weights, xint
from onnxcomp.methods.base import Array, Compensation, InputMethod, Outcome, add_bias
from onnxcomp.methods.bias import TRIM, BiasCompensation, SampleErrors, decibel
from onnxcomp.methods.xint import XInt
from onnxcomp.recipe import method_name
from onnxcomp.report.model import Decision
from onnxcomp.runtime import Session, measure
from onnxcomp.targets.base import Plan, Point, Target

PRICE_ROUNDS = 3
"""Rounds of 20 ms that the price of one edit is measured in."""
FLOAT_BLOCK = "block/float"
"""Name under which a block's float output, on what the compressed model feeds it, lies beside the live tensors."""


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
    blocks: tuple[Block, ...] = ()
    """The stretches that block methods are fitted to; the last may be the whole model."""
    threads: int = 0
    decisions: list[Decision] = field(default_factory=list)
    results: dict[str, SiteResult] = field(default_factory=dict)
    quantizers: Quantizers = field(init=False)
    allowed: Mapping[str, int] = field(default_factory=dict)
    """How many weight terms a budget leaves to a site."""
    _block_macs: int = 0
    """Multiplications of the layers since the last block, for one sample."""

    def __post_init__(self) -> None:
        methods = [m for m in self.methods if isinstance(m, InputMethod)]
        self.allowed = self._allocate()
        self.quantizers = Quantizers(self.reference, self.compressed, self.plan, methods, self.decisions)

    def run(self, progress: Progress) -> None:
        """Quantize every site of the plan."""
        steps = schedule(self.reference, self._heads())
        results = {t.name for t in self.reference.outputs}
        unfinished = list(self.blocks)
        for step, following in zip(steps, [*steps[1:], None], strict=True):
            progress("quantizing", step.index, len(steps))
            for point in self.quantizers.due(step):
                self._quantize(point)
            if step.site is not None and step.site.kind == "layer":
                self._quantize_weight(step.site)
                self._compensate(step.site)
            if self.store is None:
                continue
            if step.site is not None and step.site.kind == "layer":
                self._block_macs += self._macs(step.site)
            ended = [b for b in unfinished if b.y in step.computed or (following is None and b.y in results)]
            kept = {name for block in unfinished for name in block.inputs}
            self._advance(step, kept | (results if following is None else set(following.live_in)))
            for block in ended:
                self._compensate_block(block)
                unfinished.remove(block)
                self._block_macs = 0
        for point in self.quantizers.due(None):
            self._quantize(point)
        for add, method in self.quantizers.added:
            fold = fold_offset(self.compressed, add, method, lambda part, feeds: self._session(part).run(feeds))
            self.quantizers.folds += [] if fold is None else [fold]
        progress("quantizing", len(steps), len(steps))

    def expected(self, count: int) -> list[Mapping[str, Array]]:
        """The outputs that the walk arrived at, for the first `count` batches: what the finished file must reproduce."""
        assert self.store is not None
        outputs = {t.name for t in self.reference.outputs}
        found = [{k: v for k, v in batch.live.items() if k in outputs} for batch in self.store.batches[:count]]
        for name in sorted(self.quantizers.replaced & outputs):
            session = self._session(extract(self.compressed, [self._entry(name)], [name]))
            for live in found:
                live.update(session.run({self._entry(name): live[name]}))
        return list(found)

    def split(self) -> list[Graph]:
        """The low-bit graphs of the weight terms. Raises UsageError unless a series of granularity `model` is all there is."""
        if len(self.methods) != 1 or not isinstance(self.methods[0], XInt) or self.methods[0].granularity != "model":
            raise UsageError('Terms can be split off a recipe with xint of granularity "model" and no other method.')
        k, layers = self.methods[0].weight_terms, [site for site in self.plan.sites if site.kind == "layer"]
        return [xint.split(self.compressed, layers, k, term) for term in range(1, k + 1)]

    def _heads(self) -> dict[str, Site | None]:
        """Where the walk stops: at the plan's heads and at the first reader of every tensor between two blocks."""
        heads = dict(self.plan.heads)
        tensors = self.reference.tensors()
        order = {node.name: index for index, node in enumerate(self.reference.nodes)}
        for name in {name for block in self.blocks for name in (block.y, *block.inputs)}:
            if tensors[name].outputs:
                heads.setdefault(min((n.name for n in tensors[name].outputs), key=order.__getitem__), None)
        return heads

    # --- one layer -------------------------------------------------------------------------------------------------

    def _quantize(self, point: Point) -> None:
        cut = None if self.store is None else Cut(self.store.batches, aliases={"xh": point.tensor})
        self.quantizers.put(point, cut)

    def _quantize_weight(self, site: Site) -> None:
        bits = self._weight_bits(site)
        tensors = self.compressed.tensors()
        assert site.weight is not None
        noise = self.quantizers.noise.get(site.name)
        if site.weight in tensors and not tensors[site.weight].inputs:  # else it is shared and already stored as codes
            same = [s.name for s in self.plan.sites if s.weight == site.weight and self._weight_bits(s) == bits]
            everyone = {n.name for n in tensors[site.weight].outputs} <= set(same)
            tape = Tape(f"{site.weight}/quantized" if everyone else f"{site.name}/weight")
            w, series = tensors[site.weight].values, any(self._series(s) for s in self.plan.sites if s.name in same)
            fitted = xint.first_term(w, site.weight_axis, bits) if series else self._round(site, w, bits)
            new = weights.build(tape, site, fitted, bits)
            replacements = tuple(Replacement(old, to, None if everyone else tuple(same)) for old, to in new.items())
            apply(self.compressed, Edit("quantize", tuple(tape.nodes), tape.constants, replacements))
        series = [(m, *self._fit_series(m, site)) for m in self._series(site)]
        if noise is not None:
            method, fit = noise
            whole = [xint.total(place, outcome.fit) for _, place, outcome in series if outcome.fit is not None]
            b = method.correction(fit, whole[0] if whole else self._rounded(site), site)
            self._write(site, method_name(method), lambda tape: add_bias(tape, site, b), "/output")
        for method, place, outcome in series:
            self._expand(method, place, outcome)

    def _series(self, site: Site) -> list[XInt]:
        """The methods that add residual terms to the site; where a budget leaves it one term, none."""
        methods = [m for m in self.methods if isinstance(m, XInt) and site.kind == "layer" and matches(m.where, site)]
        return [m for m in methods if not m.budget or self.allowed.get(site.name, 2) > 1]

    def _fit_series(self, method: XInt, site: Site) -> tuple[xint.Terms, Outcome]:
        assert site.weight is not None
        weight = self.reference.tensors()[site.weight].values
        place = xint.Terms.read(self.compressed, site, weight, self.allowed.get(site.name))
        return place, method.fit(place, None if self.store is None else Cut(self.store.batches, aliases={"xh": site.x}))

    def _expand(self, method: XInt, place: xint.Terms, outcome: Outcome) -> None:
        """Write a fitted series into the graph. It may replace the weight or the input of its own operator, for nobody
        else.
        """
        label, site = method_name(method), place.site
        tape, price = Tape(f"{place.name}/{label}"), None
        if outcome.fit is not None:
            new = method.build(tape, place, outcome.fit)
            made = tuple(Replacement(old, to, None if old == site.raw else (site.name,)) for old, to in new.items())
            apply(self.compressed, Edit(label, tuple(tape.nodes), tape.constants, made))
            price = self._price(replace(site, y=site.raw), label)
        added, adopted = sum(a.nbytes for a in tape.constants.values()), outcome.fit is not None
        self.decisions.append(Decision(place.name, label, adopted, outcome.reason, outcome.gain_db, added, price))

    def _allocate(self) -> dict[str, int]:
        """Weight terms by site, where a budget is shared out."""
        left: dict[str, list[float]] = {}
        sizes: dict[str, int] = {}
        tensors, budget = self.reference.tensors(), 0.0
        for site in self.plan.sites:
            for method in self._series(site):
                if method.budget and site.weight is not None:
                    w, bits, budget = tensors[site.weight].values, self._weight_bits(site), method.budget
                    first = xint.first_term(w, site.weight_axis, bits)
                    found = xint.expand(w, first["codes"], first["scale"], site.weight_axis, bits, method.weight_terms)
                    left[site.name], sizes[site.name] = found[1], w.size
        return xint.allocate(left, sizes, budget)

    def _round(self, site: Site, w: Array, bits: int) -> Mapping[str, Array]:
        if self.store is None or self.plan.settings[site.name].rounding == "nearest":
            return weights.fit(site, w, bits)
        attrs = next(n for n in self.reference.nodes if n.name == site.name).attrs
        cut = Cut(self.store.batches, aliases={"xh": site.x})
        centred = any(isinstance(m, BiasCompensation) and m.scope == "layer" and matches(m.where, site) for m in self.methods)
        return weights.fit_gptq(site, w, bits, cut, attrs, self.quantizers.fake(site), centred=centred)

    def _weight_bits(self, site: Site) -> int:
        return self.plan.settings[site.name].weight_bits

    def _compensate(self, site: Site) -> None:
        """Fit the site methods in their order; without one, measure the site's error all the same."""
        measured: list[Outcome] = []
        for method in self.methods:
            if method.scope == "layer" and matches(method.where, site) and self.store is not None:
                outcome = method.fit(site, self._site_cut(site))
                measured.append(outcome)
                self._decide(site, method, outcome)
        if measured:
            self.results[site.name] = SiteResult(measured[0].before_db, measured[-1].after_db)
        elif self.store is not None:
            errors = self._site_cut(site).reduce(
                lambda batch: SampleErrors.of(batch, site.channel_axis, TRIM), frozenset({"f_xh", "g_xh"})
            )
            found = decibel(errors.energy, errors.error)
            self.results[site.name] = SiteResult(found, found)

    def _decide(self, place: Site | Block, method: Compensation, outcome: Outcome) -> None:
        label, added, price = method_name(method), 0, None
        if outcome.fit is not None:
            added = self._write(place, label, lambda tape: method.build(tape, place, outcome.fit or {}))
            price = self._price(place, label)
        adopted = outcome.fit is not None
        self.decisions.append(Decision(place.name, label, adopted, outcome.reason, outcome.gain_db, added, price))

    def _price(self, place: Site | Block, label: str) -> float | None:
        """Milliseconds that the operators of an edit take for one sample; None where it has none, or no sample is there."""
        tensors = self.compressed.tensors()
        before = next((name for name in tensors if name.startswith(f"{place.y}/before-{label}")), None)
        if before is None or self.store is None:
            return None
        entries, batch = [self._entry(name) for name in place.inputs], self.store.batches[0]
        feed = {self._entry(n): split(batch.live[n], len(batch.indices))[0] for n in place.inputs}
        if isinstance(place, Block):  # timed alone, for it is small beside the block
            parts = [extract(self.compressed, [*entries, before], [place.y])]
            feed[before] = split(batch.live[place.y], len(batch.indices))[0]
        else:
            parts = [extract(self.compressed, entries, [place.y]), extract(self.compressed, entries, [before])]
        models = [to_bytes(to_model(self.target.lower(part), self.like)) for part in parts]
        times = measure(models, [{t.name: feed[t.name] for t in parts[0].inputs}], rounds=PRICE_ROUNDS)
        return max(times[0].median_ms - sum(t.median_ms for t in times[1:]), 0.0)

    def _write(self, place: Site | Block, label: str, build: Callable[[Tape], Mapping[str, str]], where: str = "") -> int:
        """Write what a method builds into the graph; the bytes that it adds to the file."""
        tape = Tape(f"{place.name}/{label}{where}")
        replacements = tuple(Replacement(old, to) for old, to in build(tape).items())
        apply(self.compressed, Edit(label, tuple(tape.nodes), tape.constants, replacements))
        site = place if isinstance(place, Site) else place.last
        if site is not None and tape.nodes[-1].op == "Add":
            fold = fold_bias(self.compressed, site, tape.nodes[-1].name, label)
            if fold is not None:
                self.quantizers.folds.append(fold)
                return 4 * fold.added.size if fold.before is None else 0
        return sum(a.nbytes for a in tape.constants.values())

    def _rounded(self, site: Site) -> Array:
        """The site's weight as its codes stand for it."""
        node = next(n for n in self.compressed.nodes if n.name == site.name)
        dequantize = node.inputs[1].inputs[0]
        codes, scale = (t.values for t in dequantize.inputs)
        shape = [-1 if i == site.weight_axis else 1 for i in range(codes.ndim)]
        return codes.astype(np.float32) * scale.reshape(shape)

    def _advance(self, step: Step, needed: set[str]) -> None:
        assert self.store is not None
        if not step.computed:
            self.store.advance(None, needed, {})
            return
        part = extract(self.compressed, [self._entry(name) for name in step.live_in], list(step.computed))
        self.store.advance(self._session(part), needed, self._feeds(part, step.live_in))

    # --- one block -------------------------------------------------------------------------------------------------

    def _compensate_block(self, block: Block) -> None:
        """Fit the block methods, on the float block and the compressed one fed with what the compressed model computes."""
        methods = [m for m in self.methods if m.scope == block.kind and matches(m.where, block)]
        if not methods:
            return
        assert self.store is not None
        stored = next((p for p in self.plan.points if p.tensor == block.y and p.consumers is None), None)
        last = None if block.last is not None and block.last.y in self.quantizers.replaced else block.last
        block = replace(block, macs=self._block_macs, last=last)
        batches = self.store.beside(FLOAT_BLOCK, self._float(block))
        for method in methods:
            cut = Cut(batches, aliases={"xh": block.x, "f_xh": FLOAT_BLOCK, "g_xh": block.y})
            outcome = method.fit(block, cut)
            if outcome.fit is not None and stored is not None and block.y not in self.quantizers.replaced:
                self._quantize(stored)  # the integer kernel that makes it goes on storing its result
            self._decide(block, method, outcome)
            if outcome.fit is None:
                continue
            before = [name for name in (f"{block.y}/before-{method_name(method)}",) if name in self.compressed.tensors()]
            part = extract(self.compressed, [*(self._entry(n) for n in block.inputs), *before], [block.y])
            feeds = self._feeds(part, block.inputs) | dict.fromkeys(before, block.y)
            self.store.update(block.y, SiteRun(self._session(part), feeds, block.y), batches)
            if stored is not None:
                self.quantizers.store_again(block, method_name(method), stored, Cut(batches, aliases={"xh": block.y}))

    def _macs(self, site: Site) -> int:
        """Multiplications of a layer for one sample."""
        assert self.store is not None
        assert site.weight is not None
        tensors, batch = self.reference.tensors(), self.store.batches[0]
        shape = batch.live[site.x].shape
        if site.op != "Conv":
            return math.prod(shape[:-1]) // len(batch.indices) * int(tensors[site.weight].values.size)
        strides = next(n for n in self.reference.nodes if n.name == site.name).attrs.get("strides", ())
        return math.prod(shape[2:]) // math.prod(strides) * int(tensors[site.weight].values.size)

    # --- sessions on parts -------------------------------------------------------------------------------------------

    def _site_cut(self, site: Site) -> Cut:
        """The samples with the site's float and compressed output, both fed with what the compressed model computes."""
        assert self.store is not None
        runs = {"f_xh": self._float(site), "g_xh": self._compressed(site)}
        return Cut(self.store.batches, runs, {"xh": site.x})

    def _float(self, place: Site | Block) -> SiteRun:
        inputs = list(dict.fromkeys(place.inputs))
        part = extract(self.reference, inputs, [place.y])
        return SiteRun(self._session(part), {t.name: t.name for t in part.inputs}, place.y)

    def _compressed(self, site: Site) -> SiteRun:
        inputs = list(dict.fromkeys(site.inputs))
        part = extract(self.compressed, [self._entry(name) for name in inputs], [site.y])
        return SiteRun(self._session(part), self._feeds(part, inputs), site.y)

    def _feeds(self, part: Graph, names: Sequence[str]) -> dict[str, str]:
        wanted = {t.name for t in part.inputs}
        return {self._entry(name): name for name in names if self._entry(name) in wanted}

    def _entry(self, name: str) -> str:
        return self.quantizers.entry(name)

    def _session(self, part: Graph) -> Session:
        return Session(to_bytes(to_model(self.target.lower(part), self.like)), threads=self.threads)
