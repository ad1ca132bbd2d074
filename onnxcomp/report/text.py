"""The report as text: a header, a table of sites, and one line per fact.

Everything here returns rich renderables and prints nothing. No box characters are used. `width` is the terminal's; None
means that the text goes to a file or a pipe, where each row and each fact stays on one line whatever its length.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from onnxcomp.report.model import Decision, Report, SiteReport

LONGEST = 20
"""Sites shown where not all of them were asked for."""
EQUAL_DB = 200.0
"""What an SQNR is capped at: two signals this close are equal."""
Cell = str | Text


def report(value: Report, *, width: int | None = None, all_sites: bool = False) -> RenderableType:
    """The whole report; the `LONGEST` worst sites only, unless `all_sites`."""
    return Group(_header(value), "", sites(value.sites, width=width, all_sites=all_sites), "", facts(_facts(value)))


def sites(rows: Sequence[SiteReport], *, width: int | None = None, all_sites: bool = False) -> RenderableType:
    """The table of sites: in graph order if all fit, else the worst, worst first, and a line about the rest."""
    if not rows:
        return Text("No site was quantized.", style="yellow")
    shown = rows if all_sites or len(rows) <= LONGEST else sorted(rows, key=_badness)[:LONGEST]
    has_sqnr = any(site.after_db is not None for site in shown)
    headers = ["Site", "Bits", "Activations", *(["SQNR dB"] if has_sqnr else []), "Kernel"]
    cells = [[_kernel(s) if h == "Kernel" else _cell(s, h) for h in headers] for s in shown]
    parts: list[RenderableType] = [table(headers, cells, right=("SQNR dB",), width=width)]
    if len(shown) < len(rows):
        which = "better" if has_sqnr else "more"
        parts.append(Text(f"({len(rows) - len(shown)} {which} sites are not shown: --all, or --json)", style="dim"))
    return Group(*parts)


def table(
    headers: Sequence[str], rows: Sequence[Sequence[Cell]], *, right: Sequence[str] = (), width: int | None = None
) -> Table:
    """Columns without lines. Where they do not fit into `width`, the first column is shortened."""
    grid = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for header in headers:
        grid.add_column(header, justify="right" if header in right else "left", no_wrap=True)
    columns = list(zip(headers, *rows, strict=True))
    others = sum(2 + max(len(cell) for cell in column) for column in columns[1:])
    room = None if width is None else max(len(headers[0]), width - others, 16)
    names = [str(row[0]) for row in rows]
    for name, row in zip(names if room is None else shorten(names, room), rows, strict=True):
        grid.add_row(plain(name), *map(plain, row[1:]))
    return grid


def plain(cell: Cell) -> Text:
    """The cell as it is: a name such as `[a]` is no markup."""
    return cell if isinstance(cell, Text) else Text(cell)


def shorten(names: Sequence[str], room: int) -> list[str]:
    """At most `room` characters each: the longer ones lose the folders that they have in common, then their middle."""
    long = [name for name in names if len(name) > room]
    # Of all of them the first and the last in alphabetical order share the least.
    ends = zip(min(long, default=""), max(long, default=""), strict=False)
    common = "".join(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], ends)).rpartition("/")[0]
    short = []
    for name in names:
        if len(name) > room and common:
            name = "..." + name.removeprefix(common)
        if len(name) > room:
            head = (room - 3) * 2 // 5
            name = f"{name[:head]}...{name[len(name) - (room - 3 - head) :]}"
        short.append(name)
    return short


def facts(pairs: Iterable[tuple[str, Cell]]) -> Table:
    """Lines of a name and what there is to say; a name that repeats is written once."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    previous = None
    for name, value in pairs:
        grid.add_row(plain("" if name == previous else name), plain(value))
        previous = name
    return grid


def size(count: int) -> str:
    """Bytes in decimal units and three figures: `22.9 MB`."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{count} B" if unit == "B" else f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f} {unit}"


def decibels(value: float) -> str:
    """A ratio in dB, `equal` from `EQUAL_DB` on."""
    return "equal" if value >= EQUAL_DB else f"{value:.1f} dB"


def _closeness(value: float) -> str:
    return "exactly" if value >= EQUAL_DB else f"to {value:.1f} dB"


def plural(count: int, noun: str) -> str:
    """`1 site`, `2 sites`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def provenance(value: Report) -> list[tuple[str, Cell]]:
    """Where the file comes from."""
    data = "none" if value.data_sha256 is None else f"{plural(value.samples, 'sample')}, sha256 {value.data_sha256}"
    return [
        ("Made by", f"onnxcomp {value.version}"),
        ("From", f"{value.model_name}, {size(value.model_bytes)}, sha256 {value.model_sha256}"),
        ("Data", data),
    ]


def _header(value: Report) -> Text:
    layers = [site for site in value.sites if site.kind == "layer"] or list(value.sites)
    counts: dict[str, int] = {}
    for site in layers:
        counts[site.bits] = counts.get(site.bits, 0) + 1
    bits = ", ".join(b if len(counts) == 1 else f"{b} ({n})" for b, n in counts.items()) or "nothing to quantize"
    data = "no data" if value.data_sha256 is None else plural(value.samples, "sample")
    head = Text(value.model_name, style="bold")
    return head.append(f" -> {bits} for {value.target}, {data}", style="not bold")


def _facts(value: Report) -> list[tuple[str, Cell]]:
    proof = value.verification
    ratio = value.output_bytes / value.model_bytes if value.model_bytes else 1.0
    expected = "" if proof.expected_db is None else f"; calibration reproduced {_closeness(proof.expected_db)}"
    agreement = f"optimized and plain agree {_closeness(proof.agreement_db)}"
    difference = "equal to" if proof.sqnr_db >= EQUAL_DB else f"{decibels(proof.sqnr_db)} SQNR against"
    fed = "1 made-up sample" if value.data_sha256 is None else plural(proof.samples, "sample")
    lines: list[tuple[str, Cell]] = [("Kernels", text) for text in _kernels(value)]
    lines += [("Left float", text) for text in _skipped(value)]
    lines += [("Compensation", text) for text in _decisions(value.decisions)]
    lines += [
        ("Output", f"{difference} the float model on {fed}"),
        ("Size", f"{size(value.model_bytes)} -> {size(value.output_bytes)}, ratio {ratio:.3f}"),
        ("Verified", f"{proof.checker}; {proof.runtime}: {agreement}{expected}"),
    ]
    lines += [("Needs", text) for text in value.requirements]
    lines += [("Note", text) for text in value.notes]
    return lines


def _kernels(value: Report) -> list[Text]:
    said = [site for site in value.sites if site.activations != "float"]
    fallback = [site for site in said if not site.integer]
    summary = Text(f"{len(said) - len(fallback)} of {len(said)} quantized sites run as integer kernels")
    if len(value.sites) > len(said):
        summary.append(f"; {len(value.sites) - len(said)} more have quantized weights and float activations")
    reasons: dict[str, list[str]] = {}
    for site in fallback:
        reasons.setdefault(site.reason, []).append(site.name)
    return [summary] + [
        Text(f"{len(names)} in float{_examples(names)}: {reason}", style="yellow") for reason, names in reasons.items()
    ]


def _skipped(value: Report) -> list[str]:
    groups: dict[tuple[str, str], list[str]] = {}
    for one in value.skipped:
        groups.setdefault((one.op, one.reason), []).append(one.name)
    return [f"{len(names)} {op}{_examples(names)}: {reason}" for (op, reason), names in groups.items()]


def _decisions(decisions: Sequence[Decision]) -> list[str]:
    lines = []
    for method in dict.fromkeys(d.method for d in decisions):
        asked = [d for d in decisions if d.method == method]
        kept = [d for d in asked if d.adopted]
        gains = [d.gain_db for d in kept if d.gain_db is not None]
        gain = f", median {statistics.median(gains):+.2f} dB" if gains else ""
        added = sum(d.added_bytes for d in kept)
        milliseconds = sum(d.added_ms or 0.0 for d in kept)
        price = (f", {size(added)} added" if added else "") + (f", {milliseconds:.3g} ms added" if milliseconds else "")
        lines.append(f"{method} kept at {len(kept)} of {plural(len(asked), 'place')}{gain}{price}")
        declined: dict[str, list[str]] = {}
        for d in asked:
            if not d.adopted:
                declined.setdefault(d.reason, []).append(d.site)
        lines += [f"{method} declined at {len(n)}{_examples(n)}: {reason}" for reason, n in declined.items()]
    return lines


def _examples(names: Sequence[str]) -> str:
    return f" ({', '.join(names)})" if len(names) <= 2 else f" ({names[0]}, ...)"


def _badness(site: SiteReport) -> tuple[bool, float]:
    """Float fallbacks first, then the lowest SQNR; sites without one last."""
    fallback = site.activations != "float" and not site.integer
    return (not fallback, EQUAL_DB if site.after_db is None else site.after_db)


def _cell(site: SiteReport, header: str) -> str:
    if header != "SQNR dB":
        return {"Site": site.name, "Bits": site.bits, "Activations": site.activations}[header]
    if site.after_db is None:
        return "-"
    after = f"{site.after_db:.1f}"
    before = after if site.before_db is None else f"{site.before_db:.1f}"
    return after if before == after else f"{before} -> {after}"


def _kernel(site: SiteReport) -> Text:
    if site.integer or site.activations == "float":
        return Text(site.kernel)
    return Text(f"{site.kernel} (float)", style="yellow")
