"""Comparisons, inspections and timings as text, in the manner of report.text."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from onnxcomp.report.results import Benchmark, Comparison, Count, Inspection, OutputComparison
from onnxcomp.report.text import LONGEST, Cell, decibels, facts, plain, plural, provenance, report, size, table


def comparison(value: Comparison, *, width: int | None = None) -> RenderableType:
    """One row per output, then accuracy and size."""
    headers = ["Output", "SQNR", "Cosine", "Agreement"]
    rows = [_output_row(output) for output in value.outputs]
    lines: list[tuple[str, Cell]] = []
    for output in value.outputs:
        if output.not_finite:
            text = f"{plural(output.not_finite, 'value')} of '{output.name}' in {value.other}, finite in {value.reference}"
            lines.append(("NaN or Inf", Text(text, style="yellow")))
    if value.accuracy is not None:
        a = value.accuracy
        drop = f"drop {a.drop_points:.2f} +- {a.standard_error:.2f} points"
        counts = f"{a.lost} lost and {a.gained} gained of {a.answers}"
        lines.append(("Accuracy", f"{a.reference:.2%} -> {a.other:.2%}, {drop} ({counts})"))
    ratio = value.other_bytes / max(value.reference_bytes, 1)
    lines.append(("Size", f"{size(value.reference_bytes)} -> {size(value.other_bytes)}, ratio {ratio:.3f}"))
    head = Text(f"{value.reference} -> {value.other}", style="bold")
    head.append(f", {plural(value.samples, 'sample')}", style="not bold")
    return Group(head, "", table(headers, rows, right=("SQNR", "Cosine"), width=width), "", facts(lines))


def inspection(value: Inspection, *, width: int | None = None, all_sites: bool = False) -> RenderableType:
    """What the file is, and then its report or the sites that could be quantized."""
    head = Text(value.path, style="bold")
    head.append(f": {size(value.file_bytes)}, opset {', '.join([str(value.opset), *value.domains])}", style="not bold")
    lines: list[tuple[str, Cell]] = [("Parameters", f"{value.parameters:,}")]
    lines += [("Inputs", text) for text in value.inputs]
    lines += [("Outputs", text) for text in value.outputs]
    lines += [("Operators", _counts(value.operators)), ("Quantized", _counts(value.quantization) or "no")]
    if value.report is not None:
        lines += provenance(value.report)
    elif value.producer:
        lines.append(("Made by", value.producer))
    lines += [("Note", Text(text, style="yellow")) for text in value.notes]
    if value.report is None:
        return Group(head, "", facts(lines), "", _sites(value, width, all_sites))
    account = report(value.report, width=width, all_sites=all_sites)
    return Group(head, "", facts(lines), "", account, "", plain(value.report.recipe.strip()))


def benchmark(value: Benchmark, *, width: int | None = None) -> RenderableType:
    """One row per model, then the operators of each."""
    headers = ["Model", "Size", "ms", "10-90 %", "Ratio", "10-90 %"]
    rows = [
        [t.model, size(t.file_bytes), _ms(t.median_ms), f"{_ms(t.low_ms)}-{_ms(t.high_ms)}", f"{t.ratio:.3f}",
         f"{t.ratio_low:.3f}-{t.ratio_high:.3f}"]
        for t in value.models
    ]  # fmt: skip
    parts: list[RenderableType] = [table(headers, rows, right=("Size", "ms", "Ratio"), width=width)]
    for t in value.models:
        total = sum(operator.milliseconds for operator in t.operators)
        costs = [[o.op, _ms(o.milliseconds), f"{o.milliseconds / total:.1%}"] for o in t.operators]
        if costs:
            parts += ["", Text(t.model, style="bold"), table(["Operator", "ms", "Share"], costs, right=("ms", "Share"))]
    return Group(*parts)


def summaries(rows: Sequence[tuple[str, str]]) -> RenderableType:
    """A name and a sentence on each line."""
    return facts(rows)


def manual(page: str, options: Sequence[tuple[str, str, str]]) -> RenderableType:
    """A method's page, and its options as (name, default, help)."""
    rows = [(f"  {name} = {default}", help_text) for name, default, help_text in options]
    return Group(plain(page), "", "Options", "", facts(rows))


def _sites(value: Inspection, width: int | None, all_sites: bool) -> RenderableType:
    if not value.sites:
        return Text("No site could be quantized.", style="yellow")
    shown = value.sites if all_sites else value.sites[:LONGEST]
    shapes = ["two activations" if s.weight_shape is None else " x ".join(map(str, s.weight_shape)) for s in shown]
    rows = [[site.name, site.op, shape] for site, shape in zip(shown, shapes, strict=True)]
    parts: list[RenderableType] = [table(["Site", "Operator", "Weight"], rows, width=width)]
    if len(shown) < len(value.sites):
        parts.append(Text(f"({len(value.sites) - len(shown)} more sites are not shown: --all, or --json)", style="dim"))
    return Group(*parts)


def _output_row(output: OutputComparison) -> list[Cell]:
    sqnr = "-" if output.sqnr_db is None else decibels(output.sqnr_db)
    cosine = "-" if output.cosine is None else f"{output.cosine:.5f}"
    share = output.agreement
    agreement = "-" if share is None else f"{share:.2%} ({round(share * output.answers)} of {output.answers})"
    return [output.name, sqnr, cosine, agreement]


def _counts(counts: Sequence[Count]) -> str:
    text = ", ".join(f"{c.count} {c.op}" for c in counts[:8])
    return text if len(counts) <= 8 else f"{text}, {plural(sum(c.count for c in counts[8:]), 'other')}"


def _ms(value: float) -> str:
    return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2 if value >= 0.9995 else 3}f}"
