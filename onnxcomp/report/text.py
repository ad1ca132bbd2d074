"""Reports, comparisons, inspections and timings as text: a header, a table, and one line per fact.

Everything here returns plain text, the same for a terminal, a file or a pipe: each row and each fact is one line.
"""

import dataclasses
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from onnxcomp.numerics.arrays import EQUAL_DB
from onnxcomp.report import model

LOW_DB, LOW = 6.0, "That is little. More bits may help; `onnxcomp analyze` tells which layers lose most."
"""From a quarter of the output's energy on, what is lost changes answers."""
LONGEST = 20
"""Sites shown where not all of them were asked for."""
Facts = Mapping[str, Iterable[str]]
"""Names, and what there is to say of each."""


def report(value: model.Report, more: Facts | None = None, *, all_sites: bool = False) -> str:
    """The whole report, and `more`; the `LONGEST` worst sites only, unless `all_sites`."""
    return f"{title(value)}\n\n{sites(value.sites, all_sites=all_sites)}\n\n{facts({**report_facts(value), **(more or {})})}"


def comparison(value: model.Comparison) -> str:
    """One row per output, then accuracy and size."""
    lost = [f"{plural(o.not_finite, 'value')} of '{o.name}' in {value.other}" for o in value.outputs if o.not_finite]
    lines: Facts = {
        "NaN or Inf": [f"{text}, finite in {value.reference}" for text in lost],
        "Accuracy": [] if value.accuracy is None else [_accuracy(value.accuracy)],
        "Size": [change(value.reference_bytes, value.other_bytes)],
    }
    rows = [_output_row(output) for output in value.outputs]
    outputs = table(["Output", "SQNR", "Cosine", "Agreement"], rows, right=("SQNR", "Cosine"))
    head = f"{value.reference} -> {value.other}, {plural(value.samples, 'sample')}"
    return f"{head}\n\n{outputs}\n\n{facts(lines)}{_methods(value) if value.methods else ''}"


def speed(value: model.Timing) -> list[str]:
    """What a quantized file takes beside the float one, and what to make of it where that is no less."""
    spread = f"{value.ratio_low:.2f}-{value.ratio_high:.2f}"
    taken = f"{value.ratio:.2f} of the float model's time ({spread}), one sample, one thread"
    slow = "So it is smaller, but no faster: `onnxcomp bench --profile` shows which operators take the time."
    return [taken, slow] if value.ratio >= 1 else [taken]


def _methods(value: model.Comparison) -> str:
    """One row per method: the output without it, and what it adds."""
    rows = []
    for m in value.methods:
        a = m.accuracy
        gained = "-" if a is None else f"{-a.drop_points:+.2f} +- {a.standard_error:.2f}"
        time = "cannot be taken out" if m.ratio is None else "{:.3f} ({:.3f}-{:.3f})".format(*m.ratio)
        added = "-" if m.added_bytes is None else size(m.added_bytes)
        rows.append([m.method, str(m.places), decibels(m.sqnr_db), gained, added, time])
    headers = ["Method", "Places", "SQNR without", "Points gained", "Size", "Time (10-90 %)"]
    return f"\n\n{table(headers, rows, right=('Places', 'SQNR without', 'Points gained', 'Size'))}"


def inspection(value: model.Inspection, *, all_sites: bool = False) -> str:
    """What the file is, and then its report or the sites that could be quantized."""
    head = f"{value.path}: {size(value.file_bytes)}, opset {', '.join([str(value.opset), *value.domains])}"
    lines: Facts = {
        "Parameters": [f"{value.parameters:,}"],
        "Inputs": value.inputs,
        "Outputs": value.outputs,
        "Operators": [_counts(value.operators)],
        "Quantized": [_counts(value.quantization) or "no"],
        "Made by": [value.producer] if value.producer else [],
        **({} if value.report is None else provenance(value.report)),
        "Note": value.notes,
    }
    last = _sites(value, all_sites)
    if value.report is not None:
        last = f"{report(value.report, all_sites=all_sites)}\n\n{value.report.recipe.strip()}"
    return f"{head}\n\n{facts(lines)}\n\n{last}"


def damages(value: model.Analysis, *, all_sites: bool = False) -> str:
    """One row per site, the most damaging first, in per cent of what the compressed model loses; then what helps."""
    shown = value.sites if all_sites else value.sites[:LONGEST]
    columns = ("Alone", "weights", "activations", "In all", "weights ", "activations ")
    rows = [[s.name, s.bits, *(f"{100 * x / value.total if value.total else 0.0:.1f} %" for x in s.figures)] for s in shown]
    head = f"{value.model} -> {value.bits} for {value.target}: the output's SQNR is {decibels(value.sqnr_db)}"
    said = f"{head}, {plural(value.samples, 'sample')}, {value.passes} passes"
    listed = cut(table(["Site", "Bits", *columns], rows, right=columns), len(value.sites) - len(shown), "better")
    return f"{said}\n\n{listed}\n\nFor a recipe, so that the first layers lose less:\n\n{value.suggestion}"


def judgement(value: model.Lint) -> str:
    """One line per broken rule, then how many of the quantized layers run on integers by the rules."""
    rows = [[v.node, v.op, v.rule, f"{v.reason} {v.remedy}"] for v in value.violations]
    said = f"{sum(k.integer for k in value.kernels)} of {plural(len(value.kernels), 'quantized layer')} on integers"
    head = f"{value.path} for {value.target}: {plural(len(rows), 'broken rule')}, {said}"
    return "\n\n".join([head, *([table(["Node", "Operator", "Rule", "What, and what to do"], rows)] if rows else [])])


def benchmark(value: model.Benchmark) -> str:
    """One row per model, then the operators of each."""
    rows = [
        [t.model, size(t.file_bytes), figures(t.median_ms), f"{figures(t.low_ms)}-{figures(t.high_ms)}", f"{t.ratio:.3f}",
         f"{t.ratio_low:.3f}-{t.ratio_high:.3f}"]
        for t in value.models
    ]  # fmt: skip
    headers = ["Model", "Size", "ms", "10-90 %", "Ratio", "10-90 %"]
    parts = [table(headers, rows, right=("Size", "ms", "Ratio"))]
    for t in value.models:
        total = sum(operator.milliseconds for operator in t.operators)
        costs = [[o.op, figures(o.milliseconds), f"{o.milliseconds / total:.1%}"] for o in t.operators]
        if costs:
            parts.append(f"{t.model}\n{table(['Operator', 'ms', 'Share'], costs, right=('ms', 'Share'))}")
        if t.floor_ms:
            floor = f"{figures(t.floor_ms)} ms, its integer kernels and the float work of {value.models[0].model}"
            parts[-1] += f"\nFloor: {floor}; all its operators take {total / t.floor_ms:.3f} of that."
    return "\n\n".join(parts)


def plan(value: model.Plan, *, all_sites: bool = False) -> str:
    """The sites without what is measured, and what a run would take."""
    rows = [dataclasses.replace(site, before_db=None, after_db=None) for site in value.sites]
    last = "" if value.forecast is None else f"\n\n{forecast(value.forecast)}"
    return sites(rows, all_sites=all_sites) + last


def forecast(value: model.Forecast) -> str:
    """One line."""
    time = f"{value.seconds:.0f} s" if value.seconds < 120 else f"{value.seconds / 60:.0f} minutes"
    activations = f"{size(value.live_bytes)} of activations, {size(value.disk_bytes)} of files"
    return f"Foretold: {time}, {size(value.memory_bytes)} of memory; {activations}."


def traffic(rows: Sequence[tuple[str, int, int]], *, all_steps: bool = False) -> str:
    """What a cluster has cost: every step where they are asked for, then all together."""
    sent, moved = sum(row[1] for row in rows), sum(row[2] for row in rows)
    text = f"Cluster: {size(sent)} sent from here, {size(moved)} by workers to one another and home."
    steps = [[name or "-", size(out), size(between)] for name, out, between in rows]
    return f"{table(['Step', 'Sent', 'By workers'], steps, right=('Sent', 'By workers'))}\n{text}" if all_steps else text


def sites(rows: Sequence[model.SiteReport], *, all_sites: bool = False) -> str:
    """The table of sites: in graph order if all fit, else the worst, worst first, and a line about the rest."""
    if not rows:
        return "No site was quantized."
    shown = rows if all_sites or len(rows) <= LONGEST else sorted(rows, key=_badness)[:LONGEST]
    has_sqnr = any(site.after_db is not None for site in shown)
    headers = ["Site", "Bits", "Activations", *(["SQNR dB"] if has_sqnr else []), "Kernel"]
    cells = [[s.name, s.bits, s.activations, *([sqnr(s)] if has_sqnr else []), kernel(s)] for s in shown]
    return cut(table(headers, cells, right=("SQNR dB",)), len(rows) - len(shown), "better" if has_sqnr else "more")


def cut(rows: str, hidden: int, which: str) -> str:
    """The rows, and a line about those that are hidden."""
    return f"{rows}\n({hidden} {which} sites are not shown: --all, or --json)" if hidden else rows


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[str] = ()) -> str:
    """Columns two spaces apart, those in `right` aligned to the right."""
    columns = []
    for header, *cells in zip(headers, *rows, strict=True):
        width = max(map(len, (header, *cells)))
        columns.append([f"{cell:{'>' if header in right else '<'}{width}}" for cell in (header, *cells)])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def facts(lines: Facts) -> str:
    """What there is to say, line by line; the name stands on the first line."""
    said = [("" if number else name, text) for name, texts in lines.items() for number, text in enumerate(texts)]
    width = max(len(name) for name, _ in said)
    return "\n".join(f"{name:{width}}  {text}".rstrip() for name, text in said)


def figures(value: float) -> str:
    """The number with three figures, three decimals at most."""
    return f"{value:.{sum(value < limit for limit in (99.95, 9.995, 0.9995))}f}"


def size(count: int) -> str:
    """Bytes in decimal units and three figures: `22.9 MB`."""
    thousands = sum(count >= limit for limit in (999.5, 999.5e3, 999.5e6))
    return f"{figures(count / 1000**thousands)} {'kMG'[thousands - 1]}B" if thousands else f"{count} B"


def change(before: int, after: int) -> str:
    """Two sizes and their ratio."""
    return f"{size(before)} -> {size(after)}, ratio {after / before if before else 1.0:.3f}"


def decibels(value: float | None) -> str:
    """A ratio in dB, `equal` from `EQUAL_DB` on."""
    return "-" if value is None else "equal" if value >= EQUAL_DB else f"{value:.1f} dB"


def _closeness(value: float) -> str:
    return "exactly" if value >= EQUAL_DB else f"to {value:.1f} dB"


def plural(count: int, noun: str) -> str:
    """`1 site`, `2 sites`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def provenance(value: model.Report) -> dict[str, list[str]]:
    """Where the file comes from."""
    data = "none" if value.data_sha256 is None else f"{plural(value.samples, 'sample')}, sha256 {value.data_sha256}"
    source = f"{value.model_name}, {size(value.model_bytes)}, sha256 {value.model_sha256}"
    return {"Made by": [f"onnxcomp {value.version}"], "From": [source], "Data": [data]}


def title(value: model.Report) -> str:
    """The model, its widths and its target in a line."""
    counts = Counter(site.bits for site in value.sites if site.kind == "layer") or Counter(s.bits for s in value.sites)
    bits = ", ".join(b if len(counts) == 1 else f"{b} ({n})" for b, n in counts.items()) or "nothing to quantize"
    data = "no data" if value.data_sha256 is None else plural(value.samples, "sample")
    return f"{value.model_name} -> {bits} for {value.target}, {data}"


def report_facts(value: model.Report) -> Facts:
    """What there is to say beside the table of sites."""
    proof = value.verification
    expected = "" if proof.expected_db is None else f"; calibration reproduced {_closeness(proof.expected_db)}"
    agreement = f"optimized and plain agree {_closeness(proof.agreement_db)}"
    difference = "equal to" if proof.sqnr_db >= EQUAL_DB else f"{decibels(proof.sqnr_db)} SQNR against"
    fed = "1 made-up sample" if value.data_sha256 is None else plural(proof.samples, "sample")
    return {
        "Kernels": _kernels(value.sites, value.kernels_by),
        "Left float": _grouped((f"{{}} {one.op}", one.reason, one.name) for one in value.skipped),
        "Compensation": _decisions(value.decisions),
        "Output": [f"{difference} the float model on {fed}", *([LOW] if proof.sqnr_db < LOW_DB else [])],
        "Size": [change(value.model_bytes, value.output_bytes)],
        "Verified": [f"{proof.checker}; {proof.runtime}: {agreement}{expected}"],
        "Needs": value.requirements,
        "Note": value.notes,
    }


def _kernels(rows: Sequence[model.SiteReport], kernels_by: str) -> list[str]:
    fallback = [("{} in float", site.reason, site.name) for site in rows if site.falls_back]
    blocks = [site.falls_back for site in rows if site.in_blocks]
    codes = [site.falls_back for site in rows if site.activations != "float"]
    summary = f"{codes.count(False)} of {len(codes)} quantized sites run as integer kernels" if codes or not blocks else ""
    if blocks:
        summary += f"{'; ' * bool(summary)}{blocks.count(False)} of {len(blocks)} read the codes of their weights"
    if not kernels_by.startswith("onnxruntime"):
        summary += f" by {kernels_by}"
    if len(rows) > len(blocks) + len(codes):
        summary += f"; {len(rows) - len(blocks) - len(codes)} more have quantized weights and float activations"
    return [summary, *_grouped(fallback)]


def _decisions(decisions: Sequence[model.Decision]) -> list[str]:
    lines = []
    for method in dict.fromkeys(d.method for d in decisions):
        asked = [d for d in decisions if d.method == method]
        kept = [d for d in asked if d.adopted]
        gains = [d.gain_db for d in kept if d.gain_db is not None]
        gain = f", median {statistics.median(gains):+.2f} dB" if gains else ""
        added, milliseconds = sum(d.added_bytes for d in kept), sum(d.added_ms or 0.0 for d in kept)
        price = (f", {size(added)} added" if added else "") + (f", {milliseconds:.3g} ms added" if milliseconds else "")
        if kept and not gain and not price:  # nothing but the reason tells what was decided
            lines += _grouped((f"{method} at {{}}", d.reason, d.site) for d in kept)
        else:
            lines.append(f"{method} kept at {len(kept)} of {plural(len(asked), 'place')}{gain}{price}")
        lines += _grouped((f"{method} declined at {{}}", d.reason, d.site) for d in asked if not d.adopted)
    return lines


def _grouped(found: Iterable[tuple[str, str, str]]) -> list[str]:
    """(What has room for a count, reason, name) as a line for all names of a reason: `2 MatMul (/a, /b): reason`."""
    groups: dict[tuple[str, str], list[str]] = {}
    for text, reason, name in found:
        groups.setdefault((text, reason), []).append(name)
    examples = [", ".join(names) if len(names) <= 2 else f"{names[0]}, ..." for names in groups.values()]
    counted = [text.format(len(names)) for (text, _), names in groups.items()]
    return [f"{text} ({names}): {reason}" for text, names, (_, reason) in zip(counted, examples, groups, strict=True)]


def _badness(site: model.SiteReport) -> tuple[bool, float]:
    """Float fallbacks first, then the lowest SQNR; sites without one last."""
    return (not site.falls_back, EQUAL_DB if site.after_db is None else site.after_db)


def sqnr(site: model.SiteReport) -> str:
    """The SQNR of a site before compensation and after, in dB."""
    if site.after_db is None:
        return "-"
    before = site.after_db if site.before_db is None else site.before_db
    return " -> ".join(dict.fromkeys(f"{value:.1f}" for value in (before, site.after_db)))


def kernel(site: model.SiteReport) -> str:
    """The operator that computes a site, marked where it is not what was wanted."""
    return f"{site.kernel} (float)" if site.falls_back else site.kernel


def _sites(value: model.Inspection, all_sites: bool) -> str:
    if not value.sites:
        return "No site could be quantized."
    shown = value.sites if all_sites else value.sites[:LONGEST]
    shapes = ["two activations" if s.weight_shape is None else " x ".join(map(str, s.weight_shape)) for s in shown]
    rows = [[site.name, site.op, shape] for site, shape in zip(shown, shapes, strict=True)]
    return cut(table(["Site", "Operator", "Weight"], rows), len(value.sites) - len(shown), "more")


def _accuracy(value: model.Accuracy) -> str:
    drop = f"drop {value.drop_points:.2f} +- {value.standard_error:.2f} points"
    counts = f"{value.lost} lost and {value.gained} gained of {value.answers}"
    return f"{value.reference:.2%} -> {value.other:.2%}, {drop} ({counts})"


def _output_row(output: model.OutputComparison) -> list[str]:
    cosine, share = "-" if output.cosine is None else f"{output.cosine:.5f}", output.agreement
    agreement = "-" if share is None else f"{share:.2%} ({round(share * output.answers)} of {output.answers})"
    if output.other_shapes:
        agreement = f"other shapes for {plural(output.other_shapes, 'sample')}"
    return [output.name, decibels(output.sqnr_db), cosine, agreement]


def _counts(counts: Sequence[model.Count]) -> str:
    return ", ".join(f"{c.count} {c.op}" for c in counts)
