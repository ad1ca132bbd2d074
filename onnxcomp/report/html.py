"""The report as one HTML page that needs nothing else: no script, no font, no picture from elsewhere.

What the text says, and a bar per site: the SQNR of its output before compensation and after.
"""

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from string import Template

from onnxcomp.report import model, text

FULL_DB = 60.0
"""SQNR of a full bar."""
NUMBERS = ("SQNR dB", "Gain dB", "Added", "ms")
"""Headers of columns that are aligned to the right."""


def page(report: model.Report) -> str:
    """The page, UTF-8."""
    kept = [d for d in report.decisions if d.adopted]
    fallbacks = sum(site.falls_back for site in report.sites)
    asked = sum(site.has_codes for site in report.sites)
    tiles = {
        "of the size": f"{report.output_bytes / max(report.model_bytes, 1):.3f}",
        "SQNR of the output": text.decibels(report.verification.sqnr_db),
        "sites on integer kernels": f"{asked - fallbacks} of {asked}",
        "compensations kept": f"{len(kept)} of {len(report.decisions)}",
    }
    said = {**text.provenance(report), **text.report_facts(report)}
    sites = [
        [_name(s.name), escape(s.bits), escape(s.activations), text.sqnr(s), _bar(s), _marked(text.kernel(s), bad=s.falls_back)]
        for s in report.sites
    ]
    decisions = [
        [_name(d.site), escape(d.method), "kept" if d.adopted else '<span class="soft">declined</span>',
         "" if d.gain_db is None else f"{d.gain_db:+.2f}", text.size(d.added_bytes) if d.added_bytes else "",
         "" if d.added_ms is None else f"{d.added_ms:.3f}", escape(d.reason)]
        for d in report.decisions
    ]  # fmt: skip
    body = [
        f"<h2>Account</h2><dl>{''.join(f'<dt>{escape(k)}</dt><dd>{_lines(v)}</dd>' for k, v in said.items() if v)}</dl>",
        _table("Sites", ["Site", "Bits", "Activations", "SQNR dB", "", "Kernel"], sites),
        f'<p class="soft">Bars: SQNR of the output before compensation, and what it adds; a full one is {FULL_DB:g} dB.</p>',
        _table("Decisions", ["Place", "Method", "", "Gain dB", "Added", "ms", "Reason"], decisions),
        f"<h2>Recipe</h2><pre>{escape(report.recipe.strip())}</pre>",
    ]
    template = Template(files("onnxcomp.report").joinpath("page.html").read_text(encoding="utf-8"))
    shown = "".join(f'<div class="tile"><b>{escape(v)}</b><span>{k}</span></div>' for k, v in tiles.items())
    return template.substitute(title=escape(text.title(report)), tiles=shown, body="\n".join(body))


def _table(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A heading and a table of finished cells; nothing where there are no rows."""
    if not rows:
        return ""
    kinds = ["number" if h in NUMBERS else "bar" if title == "Sites" and not h else "" for h in headers]
    lines = ["".join(f'<td class="{k}">{cell}</td>' for k, cell in zip(kinds, row, strict=True)) for row in rows]
    head = "".join(f'<th class="{kind}">{header}</th>' for kind, header in zip(kinds, headers, strict=True))
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<h2>{title}</h2><div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _bar(site: model.SiteReport) -> str:
    if site.after_db is None:
        return ""
    before = site.after_db if site.before_db is None else site.before_db
    low, high = (100 * min(max(db, 0.0) / FULL_DB, 1.0) for db in sorted((before, site.after_db)))
    parts = f'<rect class="after" width="{high:.1f}%" height="10"/><rect class="before" width="{low:.1f}%" height="10"/>'
    return f'<svg width="100%" height="10" role="img" aria-label="{text.sqnr(site)} dB">{parts}</svg>'


def _name(name: str) -> str:
    """A name that may be broken at its slashes."""
    return escape(name).replace("/", "/<wbr>")


def _marked(shown: str, *, bad: bool) -> str:
    return f'<span class="bad">{escape(shown)}</span>' if bad else escape(shown)


def _lines(lines: Iterable[str]) -> str:
    return "<br>".join(map(escape, lines))
