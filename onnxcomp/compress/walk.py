"""The walk: quantize a model front to back, one step at a time, on what the compressed model really computes.

At every step: observe -> fit -> adopt? -> build -> apply -> advance. The float half of a step and its compressed
half are run on the stored live activations, so the whole walk costs a few passes over the model, whatever its depth: a
compressed pass to advance, a float and a compressed one for layer targets, a float one for block targets.

Order at a layer: activation range and granularity (and what changes the input) -> weight rounding -> residual terms ->
bias. At the end of a block: what compensates the block; at the end: what compensates the output.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from onnxcomp.calibrate.room import Room, give_back
from onnxcomp.calibrate.samples import Cut, LiveBatch, Run, Store, combine, split
from onnxcomp.calibrate.work import Work
from onnxcomp.compress import rebuild
from onnxcomp.compress.quantizers import Quantizers
from onnxcomp.errors import UsageError
from onnxcomp.graph.blocks import Block
from onnxcomp.graph.convert import to_model
from onnxcomp.graph.edit import Constant, Graph, Node, Tape, apply, extract, tensors_of
from onnxcomp.graph.files import ModelProto
from onnxcomp.graph.offsets import fold_offset
from onnxcomp.graph.schedule import Step, schedule
from onnxcomp.graph.sites import Site, matches
from onnxcomp.graph.tidy import fold_bias
from onnxcomp.methods import moments, weights, xint
from onnxcomp.methods.base import Array, Compensation, InputMethod, Outcome, add_bias
from onnxcomp.methods.bias import TRIM, BiasCompensation, SampleErrors, decibel
from onnxcomp.methods.xint import XInt
from onnxcomp.numerics.affine import along
from onnxcomp.recipe import method_name
from onnxcomp.report.model import Decision
from onnxcomp.runtime import Progress, Session, measure
from onnxcomp.targets.base import Plan
from onnxcomp.targets.target import Target

MEASURED = 8
"""Batches that a site's error is measured on where no method looks at it."""
PRICE_ROUNDS = 1
"""Rounds of 20 ms that the price of one edit is measured in."""
FLOAT_BLOCK = "block/float"
"""Name under which a block's float output, on what the compressed model feeds it, lies beside the live tensors."""


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
    work: Work = field(default_factory=lambda: Work(Room()))
    """What was found out before, and keeps what is found out."""
    blocks: tuple[Block, ...] = ()
    """The stretches that block methods are fitted to; the last may be the whole model."""
    matched: bool = False
    """Whether layers of few bits get back the moments of their channels."""
    seed: int | None = None
    """Of reconstruction; None where there is none."""
    decisions: list[Decision] = field(default_factory=list)
    results: dict[str, Outcome] = field(default_factory=dict)
    """What was measured at each layer: before the first method and behind the last."""
    quantizers: Quantizers = field(init=False)
    _moments: Mapping[str, Array] = field(default_factory=dict)
    """What a layer makes -> its `moments` in the float model."""
    _series: Mapping[str, XInt] = field(init=False)
    """Layer -> the method that adds residual terms to it."""

    def __post_init__(self) -> None:
        methods = [m for m in self.methods if isinstance(m, InputMethod)]
        how = self.reference, self.compressed, self.plan, methods, self.decisions
        self.quantizers = Quantizers(*how, lambda part, feeds: Session(self._model(part)).run(feeds), self.work.once)
        layers = [site for site in self.plan.sites if site.kind == "layer"]
        bits = {name: settings.weight_bits for name, settings in self.plan.settings.items()}
        self._series = xint.share_out(self.methods, layers, bits, self._weight)

    def run(self, progress: Progress) -> None:
        """Quantize every site of the plan."""
        steps = self.steps()
        results = {t.name for t in self.reference.outputs}
        unfinished, macs = list(self.blocks), 0
        self._moments = self._measure() if self.matched and self.store is not None else {}
        for step, following in zip(steps, [*steps[1:], None], strict=True):
            name = "" if step.site is None else step.site.name
            progress(f"quantizing {name}", step.index, len(steps))
            give_back()
            for point in self.quantizers.due(step):
                self.quantizers.put(point, self._cut(point.tensor))
            layer = step.site if step.site is not None and step.site.kind == "layer" else None
            if step.site is not None and step.site.weight is not None:
                for weight in (step.site.weight, *step.site.others):
                    self._quantize_weight(replace(step.site, weight=weight))
                self._expand(step.site)
                self._compensate(step.site)
            if self.store is None:
                continue
            macs += self._macs(layer) if layer is not None and unfinished else 0
            ended = [block for block in unfinished if block.y in step.computed]
            kept = {name for block in unfinished for name in block.inputs}
            kept |= results if following is None else set(following.live_in)
            if not self.work.is_ahead:
                kept |= rebuild.follow(self, step, kept) if self.seed is not None else set()
                run = self.run_of(self.compressed, self._entries(step.live_in), step.computed) if step.computed else None
                self.store.advance(run, kept)
            for block in ended:
                if self.seed is not None and block.kind != "output":
                    rebuild.reconstruct(self, block, self.seed, results if following is None else following.live_in)
                self._compensate_block(replace(block, macs=macs))
                unfinished.remove(block)
                macs = 0
            self.store.finish(name)
        for point in self.quantizers.due(None):
            self.quantizers.put(point, self._cut(point.tensor))
        if self.store is not None:
            self.store.finish()
        for add, method in self.quantizers.added:
            fold = fold_offset(self.compressed, add, method, self.quantizers.evaluate)
            self.quantizers.folds += [] if fold is None else [fold]
        progress("quantizing", len(steps), len(steps))

    def expected(self, count: int) -> Sequence[Mapping[str, Array]]:
        """The outputs that the walk arrived at, for the first `count` batches: what the finished file must reproduce."""
        assert self.store is not None
        outputs = {t.name for t in self.reference.outputs}
        behind = sorted(self.quantizers.entries.keys() & outputs)
        runs = [self.run_of(self.compressed, self._entries([name]), [name]) for name in behind]

        def read(batch: LiveBatch) -> Mapping[str, Array]:
            live = {name: batch.live[name] for name in outputs & batch.live.keys()}
            return live | {name: array for run in runs for name, array in run.outputs(live).items()}

        return self.store.first(read, count)

    def split(self) -> list[Graph]:
        """The low-bit graphs of the weight terms. Raises UsageError unless a series of granularity `model` is all there is."""
        if len(self.methods) != 1 or not isinstance(self.methods[0], XInt) or self.methods[0].granularity != "model":
            raise UsageError('Terms can be split off a recipe with xint of granularity "model" and no other method.')
        k, layers = self.methods[0].weight_terms, [site for site in self.plan.sites if site.kind == "layer"]
        return xint.split(self.compressed, layers, k)

    def steps(self) -> tuple[Step, ...]:
        """The walk stops at the plan's heads and at the first reader of every tensor between two blocks."""
        ends = {name for block in self.blocks for name in (block.y, *block.inputs)}
        first = {t.name: node.name for node in reversed(self.reference.nodes) for t in node.inputs if t.name in ends}
        return schedule(self.reference, dict.fromkeys(first.values()) | dict(self.plan.heads))

    # --- one layer -------------------------------------------------------------------------------------------------

    def _quantize_weight(self, site: Site) -> None:
        settings, tensors = self.plan.settings[site.name], tensors_of(self.compressed)
        bits = settings.weight_bits
        assert site.weight is not None
        if site.weight in tensors and not tensors[site.weight].inputs:  # else it is shared and already stored as codes
            readers = (s for s in self.plan.sites if site.weight in (s.weight, *s.others))
            same = [s.name for s in readers if self._is_stored_alike(s, site)]
            everyone = {n.name for n in tensors[site.weight].outputs} <= set(same)
            own = f"{site.name}/{'state' if site.weight in site.others else 'weight'}"
            tape = Tape(f"{site.weight}/quantized" if everyone else own)
            w, series = tensors[site.weight].values, not self._series.keys().isdisjoint(same)
            fitted = xint.first_term(w, site.weight_axis, bits)._asdict() if series else self._round(site, w, bits)
            is_float = settings.activations == "float" and (site.op == "Conv" or site.kind == "stored")
            if self.target.encoding.saturates and bits == 8 and not is_float:
                fitted = self._held(site, w, fitted, alone=len(same) == 1)
            new = weights.build(tape, site, fitted, bits, settings.block, is_float=is_float)
            apply(self.compressed, "quantize", tape, new, None if everyone else same)

    def _is_stored_alike(self, *sites: Site) -> bool:
        """Whether one set of codes serves these sites, which read one weight."""
        asked = [self.plan.settings[site.name] for site in sites]
        ways = [(s.kind, s.op == "Conv" and a.activations == "float") for s, a in zip(sites, asked, strict=True)]
        return len({(way, a.weight_bits, a.block, a.zero_points) for way, a in zip(ways, asked, strict=True)}) == 1

    def _expand(self, site: Site) -> None:
        """Add residual terms to the site, and take out again what a method has added to its input."""
        series, noise = self._series.get(site.name), self.quantizers.noise.get(site.name)
        if series is None and noise is None:
            return
        most = 63 if self.target.encoding.saturates else 127
        place = xint.Terms.read(self.compressed, site, self._weight(site), most)
        outcome = None if series is None else self.work.once(lambda: series.fit(place, self._cut(site.x)))
        if noise is not None:
            method, fit = noise
            rounded = place.first.values(site.weight_axis).astype(np.float32)
            rounded = rounded if outcome is None or outcome.fit is None else xint.total(place, outcome.fit)
            b = method.correction(fit, rounded, site)
            self._write(site, method_name(method), lambda tape: add_bias(tape, site, b), "/output")
        if series is not None and outcome is not None:
            self._decide(replace(site, y=site.raw), series, outcome, place)

    def _round(self, site: Site, w: Array, bits: int) -> Mapping[str, Array]:
        cut, settings = self._cut(site.x), self.plan.settings[site.name]
        if cut is None or settings.rounding == "nearest":
            return weights.fit(site, w, bits, settings.block, zero_points=settings.zero_points)
        centred = any(isinstance(m, BiasCompensation) and m.scope == "layer" and matches(m.where, site) for m in self.methods)
        how = (self._node(site).attrs, self.quantizers.fake(site), settings.block)
        more = {"zero_points": settings.zero_points, "centred": centred}
        return self.work.once(lambda: weights.fit_gptq(site, w, bits, cut, *how, **more))

    def _held(self, site: Site, w: Array, fitted: Mapping[str, Array], *, alone: bool) -> Mapping[str, Array]:
        """These 8-bit codes, or others near them where products would be added wrongly. `alone`: no other layer, whose inputs
        are not known yet, reads them.
        """
        makers = next(node for node in self.compressed.nodes if node.name == site.name).inputs[0].inputs
        if not makers or "granularity" not in makers[0].attrs:
            return fitted
        if self.plan.settings[site.name].rounding != "nearest":  # what the codes were chosen for is near them
            w = fitted["codes"] * along(fitted["scale"], site.weight_axis, w.ndim)
        cut, groups = self._cut(site.x) if alone else None, int(self._node(site).attrs.get("group", 1))
        held, reason = self.work.once(lambda: weights.hold(site, w, fitted, makers[0], groups, cut))
        self.decisions += [Decision(site.name, "saturation", True, reason, None, 0)] if reason else []
        return held

    def _weight(self, site: Site) -> Array:
        """The float weight of a layer."""
        return self._node(site).inputs[1].values

    def _node(self, site: Site) -> Node:
        return next(node for node in self.reference.nodes if node.name == site.name)

    def _compensate(self, site: Site) -> None:
        """Fit the site methods in their order; without one, measure the site's error all the same, on the first samples."""
        if self.store is None:
            return
        measured, matched = list[Outcome](), self._match(site)
        is_closed = self.target.encoding.where == "units" and site.op == "MatMul" and site.bias is None
        kept = self.plan.settings[site.name].methods
        for method in self.methods:
            if matched and isinstance(method, BiasCompensation):
                continue  # it would put the mean of the compressed model's own input back
            is_asked = method.scope == "layer" == site.kind and matches(method.where, site)
            is_asked = is_asked and (kept is None or method_name(method) in kept)
            if is_asked and is_closed:
                reason = "it has no bias, and an Add of its own would leave floats between two units"
                self.decisions.append(Decision(site.name, method_name(method), False, reason, None, 0))
            elif is_asked:
                measured.append(self.work.once(lambda method=method: method.fit(site, self._site_cut(site))))
                self._decide(site, method, measured[-1])
        if not measured:
            reads, read = self._site_reads(site), functools.partial(SampleErrors.of, channel_axis=site.channel_axis, trim=TRIM)
            some = self.work.once(lambda store=self.store: store.first(lambda b: read(replace(b, reads=reads)), MEASURED))
            found = decibel((errors := combine(some)).energy, errors.error)
            measured.append(Outcome(None, "nothing to fit", None, found, found))
        self.results[site.name] = replace(measured[-1], before_db=measured[0].before_db)

    def _measure(self) -> dict[str, Array]:
        """The moments, in the float model, of what every layer of a network of Convs makes from fewer than 8 bits."""
        assert self.store is not None
        cut, layers = self.store.cut({}), [site for site in self.plan.sites if site.kind == "layer"]
        asked = {y: s for y, s in ((site.y, self.plan.settings[site.name]) for site in layers) if s.activations != "float"}
        names = [y for y, s in asked.items() if s.activation_bits < 8]
        if not names or {site.op for site in layers} - {"Gemm"} != {"Conv"}:
            return {}
        run = self.run_of(self.reference, {t.name: t.name for t in self.reference.inputs}, names)

        def read(batch: LiveBatch) -> Array:
            alone = batch.alone(run.feeds.values())  # all layers of a whole batch would not fit beside a budget
            seen = (LiveBatch(one.indices, run.outputs(one.live)) for one in alone)
            return combine(np.concatenate([moments.sums(one, name) for name in names], axis=2) for one in seen)

        total = self.work.once(lambda: cut.reduce(read))
        widths = [self._weight(site).shape[site.weight_axis] for site in layers if site.y in names]
        parts = np.split(total, np.cumsum(widths)[:-1], axis=2)
        return {name: moments.moments(part) for name, part in zip(names, parts, strict=True)}

    def _match(self, site: Site) -> bool:
        """Give every channel of the site the mean and the deviation that it has in the float model; whether that was done."""
        node = next(node for node in self.compressed.nodes if node.name == site.name)
        makers = node.inputs[1].inputs
        if site.y not in self._moments or len(makers) != 1 or makers[0].op != "Dequantize" or len(node.inputs[1].outputs) > 1:
            return False
        found = self.work.once(lambda: self._site_cut(site).reduce(functools.partial(moments.sums, name="g_xh")))
        outcome = moments.fit(self._moments[site.y], moments.moments(found))
        self.decisions.append(Decision(site.name, "moments", outcome.fit is not None, outcome.reason, outcome.gain_db, 0))
        if outcome.fit is None:
            return False
        gain, shift, scale = outcome.fit["gain"], outcome.fit["shift"], makers[0].inputs[1]
        makers[0].inputs[1] = Constant(scale.name, (scale.values * gain).astype(np.float32))
        bias = node.inputs[2].values if len(node.inputs) > 2 else np.zeros(len(gain))
        self._write(site, "moments", lambda tape: add_bias(tape, site, shift + (gain - 1) * bias))
        return True

    def _decide(self, place: Site | Block, method: Compensation, outcome: Outcome, series: xint.Terms | None = None) -> None:
        """Write what a method has fitted to the place, or to the `series` there, into the graph and the report."""
        label, fit, added, price = method_name(method), outcome.fit, 0, None
        if fit is not None:
            added = self._write(place, label, lambda tape: method.build(tape, series or place, fit))
            price = self.work.once(lambda: self._price(place, label))
        self.decisions.append(Decision(place.name, label, fit is not None, outcome.reason, outcome.gain_db, added, price))

    def _price(self, place: Site | Block, label: str) -> float | None:
        """Milliseconds that the operators of an edit take for one sample; None where it has none, or no sample is there."""
        tensors = tensors_of(self.compressed)
        before = next((name for name in tensors if name.startswith(f"{place.y}/before-{label}")), None)
        if before is None or self.store is None:
            return None
        live = self._entries(place.inputs)
        if isinstance(place, Block):  # timed alone, for it is small beside the block
            live[before] = place.y
            parts = [extract(self.compressed, list(live), [place.y])]
        else:
            parts = [extract(self.compressed, list(live), [name]) for name in (place.y, before)]
        read = {t.name: live[t.name] for t in parts[0].inputs}
        (feed,) = self.store.first(lambda batch: {k: split(batch.live[v], len(batch.indices))[0] for k, v in read.items()})
        times = measure(list(map(self._model, parts)), [feed], rounds=PRICE_ROUNDS, faithful=True)
        return max(times[0].median_ms - sum(t.median_ms for t in times[1:]), 0.0)

    def _write(self, place: Site | Block, label: str, build: Callable[[Tape], Mapping[str, str]], where: str = "") -> int:
        """Write what a method builds into the graph; the bytes that it adds to the file. A weight or an input is replaced
        for the place's own operator only.
        """
        tape, site = Tape(f"{place.name}/{label}{where}"), place if isinstance(place, Site) else place.last
        new, outputs = build(tape), {place.y, place.y if site is None else site.y}
        apply(self.compressed, label, tape, new, None if new.keys() <= outputs else (place.name,))
        if site is not None and tape.nodes[-1].op == "Add":
            fold = fold_bias(self.compressed, site, tape.nodes[-1].name, label)
            if fold is not None:
                self.quantizers.folds.append(fold)
                return 4 * fold.added.size if fold.before is None else 0
        return sum(a.nbytes for a in tape.constants.values())

    # --- one block -------------------------------------------------------------------------------------------------

    def _compensate_block(self, block: Block) -> None:
        """Fit the block methods, on the float block and the compressed one fed with what the compressed model computes."""
        methods = [m for m in self.methods if m.scope == block.kind and matches(m.where, block)]
        if not methods:
            return
        assert self.store is not None
        stored = next((p for p in self.plan.points if p.tensor == block.y and p.consumers is None), None)
        if block.last is not None and block.last.y in self.quantizers.entries:
            block = replace(block, last=None)
        if not self.work.is_ahead:
            self.store.add(FLOAT_BLOCK, self._float(block))
        for method in methods:
            label, cut = method_name(method), self.store.cut({"xh": block.x, "f_xh": FLOAT_BLOCK, "g_xh": block.y})
            outcome = self.work.once(lambda method=method, block=block, cut=cut: method.fit(block, cut))
            if outcome.fit is not None and stored is not None and block.y not in self.quantizers.entries:
                self.quantizers.put(stored, self._cut(block.y))  # the integer kernel that makes it goes on storing its result
            self._decide(block, method, outcome)
            if outcome.fit is None:
                continue
            before = tensors_of(self.compressed).keys() & {f"{block.y}/before-{label}"}
            live = self._entries(block.inputs) | dict.fromkeys(before, block.y)
            if not self.work.is_ahead:
                self.store.add(block.y, self.run_of(self.compressed, live, [block.y]))
            if stored is not None:
                self.quantizers.store_again(block, label, stored, self.store.cut({"xh": block.y}))

    def _macs(self, site: Site) -> int:
        """Multiplications of a layer for one sample."""
        assert self.store is not None
        (found,) = self.work.once(lambda store=self.store: store.first(lambda b: (b.live[site.x].shape, len(b.indices))))
        (shape, samples), size = found, self._weight(site).size
        if site.op != "Conv":
            return math.prod(shape[:-1]) // samples * size
        return math.prod(shape[2:]) // math.prod(self._node(site).attrs.get("strides", ())) * size

    # --- sessions on parts -------------------------------------------------------------------------------------------

    def _cut(self, tensor: str) -> Cut | None:
        """The samples with one live tensor as `xh`; None where there are none."""
        return None if self.store is None else self.store.cut({"xh": tensor})

    def _site_cut(self, site: Site) -> Cut:
        assert self.store is not None
        return self.store.cut(self._site_reads(site))

    def _site_reads(self, site: Site) -> dict[str, str | Run]:
        """The site's float and compressed output, both fed with what the compressed model computes."""
        compressed = self.run_of(self.compressed, self._entries(site.inputs), [site.y])
        return {"xh": site.x, "f_xh": self._float(site), "g_xh": compressed}

    def _float(self, place: Site | Block) -> Run:
        return self.run_of(self.reference, {name: name for name in place.inputs}, [place.y])

    def run_of(self, graph: Graph, live: Mapping[str, str], outputs: Sequence[str], prefix: str = "") -> Run:
        """What computes `outputs` in the graph, under names with the `prefix`; `live`: what each of its inputs is fed with."""
        part = extract(graph, list(live), list(outputs))
        for tensor in part.outputs:
            tensor.name = f"{prefix}{tensor.name}"
        return Run(self._model(part), {t.name: live[t.name] for t in part.inputs})

    def _entries(self, names: Sequence[str]) -> dict[str, str]:
        """What holds each live tensor's value in the compressed graph, and the tensor."""
        return {self.quantizers.entries.get(name, name): name for name in names}

    def _model(self, part: Graph) -> ModelProto:
        return to_model(self.target.lower(part), self.like)
