"""What the other commands find out, as plain frozen data: comparisons, inspections, timings."""

from __future__ import annotations

from dataclasses import dataclass

from onnxcomp.report.model import Report


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
class Comparison:
    """How `other` differs from `reference`."""

    reference: str
    other: str
    reference_bytes: int
    other_bytes: int
    samples: int
    outputs: tuple[OutputComparison, ...]
    accuracy: Accuracy | None


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
class Operator:
    """Milliseconds per run that the operators of one type take."""

    op: str
    milliseconds: float


@dataclass(frozen=True)
class Timing:
    """The latency of one model. Quantiles are over the rounds; ratios are to the first model, round by round."""

    model: str
    file_bytes: int
    median_ms: float
    low_ms: float
    """10 % quantile."""
    high_ms: float
    """90 % quantile."""
    ratio: float
    ratio_low: float
    ratio_high: float
    operators: tuple[Operator, ...]
    """The costliest first; empty where they were not measured."""


@dataclass(frozen=True)
class Benchmark:
    """Models timed in turn on the same feeds."""

    models: tuple[Timing, ...]
    threads: int
    notes: tuple[str, ...]
