"""What the commands find out, as plain frozen data: reports, comparisons, inspections, timings.

A report says what was done to each site, what it cost, and what proved it. The one duration in it, what a compensation
costs, is left out where the report is stored in the file: the same inputs and seed give the same bytes.
"""

from dataclasses import dataclass, field

from onnxcomp.numerics.arrays import sqnr_db
from onnxcomp.runtime import Latency
from onnxcomp.targets.audit import Kernel
from onnxcomp.targets.base import Violation


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
    """`layer`, `product`, `join`, `table` or `stored`."""
    bits: str
    """`w8a8`; `a8` for a site without weights; `w8` where activations stay float, `w8b32` with a scale per 32 inputs."""
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
    rounding: str = ""
    """How its weight was rounded: `nearest` or `gptq`."""

    @property
    def in_blocks(self) -> bool:
        """Whether its weight is read as codes beside float activations."""
        return "b" in self.bits

    @property
    def has_codes(self) -> bool:
        """Whether there are codes that a kernel can read: its activations are quantized, or its weight is in blocks."""
        return self.in_blocks or self.activations != "float"

    @property
    def falls_back(self) -> bool:
        """Whether there are codes, and yet no kernel reads them."""
        return self.has_codes and not self.integer


@dataclass(frozen=True)
class Forecast:
    """What a run will take: bytes of the samples' activations, of the process at its peak, and on disk; seconds."""

    live_bytes: int
    memory_bytes: int
    disk_bytes: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What a run would do, and what it would take; None where nothing is calibrated."""

    sites: tuple[SiteReport, ...]
    forecast: Forecast | None


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
    kernels_by: str
    """Who says which kernels the sites get: the runtime that was asked, or the target's rules."""
    skipped: tuple[Skipped, ...]
    decisions: tuple[Decision, ...]
    verification: Verification
    notes: tuple[str, ...]


@dataclass(frozen=True)
class OutputComparison:
    """One output of both models over all samples."""

    name: str
    sqnr_db: float | None
    """None for an output that is not of a floating type."""
    cosine: float | None
    agreement: float | None
    """Share of equal answers: argmax over the last axis, or equal values of an integer output. None: no answers."""
    answers: int
    not_finite: int
    """Values that are finite in the reference and NaN or infinite in the other model."""
    other_shapes: int = 0
    """Samples for which the two models pick another number of values, so that nothing is compared."""


@dataclass(frozen=True)
class Accuracy:
    """Right answers of both models against the labels."""

    output: str
    answers: int
    reference: float
    """Share of right answers."""
    other: float
    drop_points: float
    """Percent points that the other model loses; negative where it gains."""
    standard_error: float
    """Of the drop, in points."""
    lost: int
    """Answers that only the reference gets right."""
    gained: int
    """Answers that only the other model gets right."""


@dataclass(frozen=True)
class Worth:
    """A method in a finished file, against the file without it; no figures where it cannot be taken out."""

    method: str
    places: int
    sqnr_db: float | None = None
    """Of the worst output without it."""
    accuracy: Accuracy | None = None
    """Of the file without it, and with it."""
    added_bytes: int | None = None
    ratio: tuple[float, float, float] | None = None
    """Of the time for one sample, with it over without: the median of the rounds, and their 10 and 90 %."""


@dataclass(frozen=True)
class Comparison:
    """How `other` differs from `reference`."""

    reference: str
    other: str
    reference_bytes: int
    other_bytes: int
    samples: int
    outputs: tuple[OutputComparison, ...]
    accuracy: Accuracy | None
    methods: tuple[Worth, ...] = ()
    """What each method in `other` is worth, where that was asked for."""


@dataclass(frozen=True)
class FoundSite:
    """An operator that `quantize` could quantize."""

    name: str
    op: str
    kind: str
    """`layer`, or `product` for a MatMul of two activations."""
    weight_shape: tuple[int, ...] | None


@dataclass(frozen=True)
class Count:
    """How often an operator occurs."""

    op: str
    count: int


@dataclass(frozen=True)
class Inspection:
    """What is in a file."""

    path: str
    file_bytes: int
    """With the weight files beside it."""
    producer: str
    opset: int
    domains: tuple[str, ...]
    """Operator sets besides the standard one, `com.microsoft 1`."""
    inputs: tuple[str, ...]
    """`x float32[N, 3, 224, 224]`"""
    outputs: tuple[str, ...]
    parameters: int
    """Numbers in constants."""
    operators: tuple[Count, ...]
    """The most frequent first."""
    quantization: tuple[Count, ...]
    """Those of the operators that quantize, dequantize or compute with codes."""
    sites: tuple[FoundSite, ...]
    """Empty in a file that is quantized; a report has them."""
    report: Report | None
    """How onnxcomp quantized the file."""
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Lint:
    """The rules of a target that a file breaks, and the kernels that its quantized layers get by them."""

    path: str
    target: str
    violations: tuple[Violation, ...]
    kernels: tuple[Kernel, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Operator:
    """Milliseconds per run that the operators of one type take."""

    op: str
    milliseconds: float


@dataclass(frozen=True)
class Timing(Latency):
    """The latency of one model; ratios are to the first."""

    model: str
    file_bytes: int
    operators: tuple[Operator, ...]
    """The costliest first; empty where they were not measured."""
    floor_ms: float | None = None
    """What no way of writing it down could save: its integer kernels, and the float work that the first model does too."""


@dataclass(frozen=True)
class Benchmark:
    """Models timed in turn on the same feeds."""

    models: tuple[Timing, ...]
    threads: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Damage:
    """What quantizing one site does to the output: squared error over the float output's energy."""

    name: str
    op: str
    kind: str
    bits: str
    """As in a SiteReport."""
    weights: int
    """Numbers in its weight."""
    isolated: float
    """This site alone quantized, everything else float."""
    weights_isolated: float
    activations_isolated: float
    weights_cumulative: float
    activations_cumulative: float

    @property
    def cumulative(self) -> float:
        """Its share of what the compressed model loses."""
        return self.weights_cumulative + self.activations_cumulative

    @property
    def figures(self) -> tuple[float, ...]:
        """Isolated and cumulative, each for the site, its weights, and its activations."""
        alone = (self.isolated, self.weights_isolated, self.activations_isolated)
        return *alone, self.cumulative, self.weights_cumulative, self.activations_cumulative


@dataclass(frozen=True)
class Analysis:
    """The sites of a model, the most damaging first."""

    model: str
    bits: str
    target: str
    samples: int
    passes: int
    """Over the whole model, besides the walk."""
    total: float
    """What the compressed model loses: squared error over the float output's energy."""
    sites: tuple[Damage, ...]
    suggestion: str
    """A piece of a recipe: the first three layers at 8 bits, in float if they have 8."""

    @property
    def sqnr_db(self) -> float:
        """The same in dB."""
        return sqnr_db(1.0, self.total)
