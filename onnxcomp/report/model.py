"""The report: what was done to each site, what it cost, and what proved it. Plain frozen data.

The one duration in it, what a compensation costs, is left out where the report is stored in the file: the same inputs and
seed give the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Decision:
    """One method at one place: kept or declined, and why."""

    site: str
    """The name of the site, or of the block."""
    method: str
    adopted: bool
    reason: str
    gain_db: float | None
    """Fall of the site's output error on held-out samples, dB."""
    added_bytes: int
    added_ms: float | None = field(default=None, compare=False)
    """Time that its operators take for one sample, measured on this machine with one thread, ms. None where it has none,
    being folded into constants, or where the report was read from a file."""


@dataclass(frozen=True)
class SiteReport:
    """One quantized site."""

    name: str
    op: str
    kind: str
    """`layer`, `product` or `join`."""
    bits: str
    """`w8a8`; `a8` for a site without weights; `w8` where activations stay float."""
    activations: str
    """`static`, `dynamic`, `token` or `float`."""
    before_db: float | None
    """SQNR of the site's output, float against quantized on the same input, before compensation, dB."""
    after_db: float | None
    kernel: str
    """The operator of the runtime's optimized model that computes the site."""
    integer: bool
    reason: str
    """Why the site is not an integer kernel; empty where it is."""
    weight_bytes: int
    """Bytes of its stored weight, scales included."""


@dataclass(frozen=True)
class Skipped:
    """A quantizable operator that stays float, and why."""

    name: str
    op: str
    reason: str


@dataclass(frozen=True)
class Verification:
    """What was proven by running the finished file before it was written."""

    checker: str
    runtime: str
    """`onnxruntime 1.31.1`."""
    samples: int
    """Feeds that were run: calibration samples, or 1 made-up feed where there are no data."""
    agreement_db: float
    """Optimizations on against off: SQNR of the outputs, the worst output, dB (200 where equal)."""
    sqnr_db: float
    """Against the float model on the same feeds, dB."""
    expected_db: float | None
    """The file against what calibration computed step by step, dB."""


@dataclass(frozen=True)
class Report:
    """The whole account of one `quantize`."""

    version: str
    model_name: str
    model_sha256: str
    model_bytes: int
    output_bytes: int
    data_sha256: str | None
    samples: int
    target: str
    recipe: str
    """The recipe as TOML: what was really used."""
    requirements: tuple[str, ...]
    """Minimum runtime versions and session options, one sentence each."""
    sites: tuple[SiteReport, ...]
    skipped: tuple[Skipped, ...]
    decisions: tuple[Decision, ...]
    verification: Verification
    notes: tuple[str, ...]

    @property
    def integer_share(self) -> float:
        """Share of the sites with quantized activations that run as integer kernels (1.0 where there are none)."""
        said = [s for s in self.sites if s.activations != "float"]
        return sum(s.integer for s in said) / len(said) if said else 1.0
