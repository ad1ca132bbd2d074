"""The README's table: every model of the data folder at several widths, accuracy on its test half, size, kernels, latency.

    python tools/bench.py [--data ../shared/data] [--only vit,kwt1] [--samples 128] [--rounds 30]

Calibration samples come from the calibration half, accuracy from the test half, latency from one interleaved run per model
(one thread, batch 1). The language model's figure is its perplexity per token.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnxcomp import runtime
from onnxcomp.data import Data, InputSpec, Preprocess, open_data
from onnxcomp.methods.bias import BiasCompensation
from onnxcomp.pipeline import quantize
from onnxcomp.recipe import Bits, Recipe, find

HALF = Preprocess.parse("crop=224 mean=0.5 std=0.5")
IMAGENET = Preprocess.parse("mean=0.485,0.456,0.406 std=0.229,0.224,0.225")
RAW = Preprocess.parse("scale=1")


@dataclass(frozen=True)
class Subject:
    """A model with its calibration and test halves, and the settings (bits, recipe) to try."""

    file: str
    calibration: str
    test: str
    preprocess: Preprocess | None
    settings: tuple[tuple[str, str], ...]
    language: bool = False


W8, W4, W4A8 = ("w8a8", "auto"), ("w4a4", "auto"), ("w4a8", "auto")
SUBJECTS = {
    "vit": Subject(
        "vit_tiny_patch16_224.onnx",
        "imagenet/calib",
        "imagenet/val",
        HALF,
        (W8, W4A8, ("w4a4", "base"), ("w4a4", "base+bias"), W4, ("w4a4", "best")),
    ),
    "mobilenet": Subject("mobilenet_v2_1.0_224.onnx", "imagenet/calib", "imagenet/val", HALF, (W8, W4A8, W4)),
    "resnet20": Subject("cifar10_resnet20.onnx", "cifar10_calib.npz", "cifar10_test.npz", IMAGENET, (W8, W4A8, W4)),
    "kwt1": Subject("kwt1.onnx", "kwt1_calib.npz", "kwt1_test.npz", None, (W8, W4A8, W4)),
    "mnist": Subject("mnist.onnx", "mnist_calib.npz", "mnist_test.npz", RAW, (W8, W4A8, W4)),
    "stories260k": Subject(
        "stories260k.onnx", "stories260k_calib.npz", "stories260k_test.npz", None, (W8, W4A8), language=True
    ),
}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    model: str
    setting: str
    score: float
    drop: float
    megabytes: float
    size_ratio: float
    integer: str
    seconds: float
    latency: runtime.Latency


def stories(path: Path, limit: int | None = None) -> list[dict[str, np.ndarray]]:
    """One feed per story: input_ids int64 [1, T]."""
    with np.load(path) as archive:
        ids, lengths = archive["ids"], archive["lens"]
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    feeds = [{"input_ids": ids[s : s + n].astype(np.int64)[None]} for s, n in zip(starts, lengths, strict=True)]
    return feeds[:limit]


def load(subject: Subject, folder: Path, which: str, specs: list[InputSpec], limit: int | None) -> Data:
    """The calibration or test half as samples."""
    path = folder / (subject.calibration if which == "calibration" else subject.test)
    source = stories(path) if subject.language else path
    return open_data(source, specs, preprocess=subject.preprocess, limit=limit)


def accuracy(session: runtime.Session, batches: list[tuple[Mapping[str, np.ndarray], np.ndarray]]) -> float:
    """Top-1 in per cent."""
    right = sum(int((next(iter(session.run(feed).values())).argmax(-1) == y).sum()) for feed, y in batches)
    return 100.0 * right / sum(len(y) for _, y in batches)


def perplexity(session: runtime.Session, feeds: list[dict[str, np.ndarray]]) -> float:
    """The exponential of the mean negative log likelihood of the next token."""
    total, count = 0.0, 0
    for feed in feeds:
        logits = session.run(feed)["logits"][0].astype(np.float64)[:-1]
        logits -= logits.max(-1, keepdims=True)
        target = feed["input_ids"][0, 1:]
        total += float((np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(target)), target]).sum())
        count += len(target)
    return float(np.exp(total / count))


def stacked(data: Data, session: runtime.Session) -> list[tuple[Mapping[str, np.ndarray], np.ndarray]]:
    """Test samples in batches of 25 where the batch is free."""
    assert data.labels is not None
    free = all(not isinstance((kind.shape or (1,))[0], int) for _, kind in session.inputs)
    size = 25 if free else 1
    batches = []
    for start in range(0, len(data), size):
        feeds = [data[i] for i in range(start, min(start + size, len(data)))]
        feed = {name: np.concatenate([f[name] for f in feeds]) for name in feeds[0]}
        batches.append((feed, np.asarray(data.labels[start : start + size]).astype(int)))
    return batches


def run(name: str, subject: Subject, folder: Path, samples: int, rounds: int) -> Iterator[Row]:
    """Quantize one model at each of its settings and measure all the files together."""
    path = folder / subject.file
    reference = runtime.Session(path)
    specs = InputSpec.of(reference.inputs)
    test = load(subject, folder, "test", specs, None)
    feeds = [test[i] for i in range(len(test))] if subject.language else stacked(test, reference)

    def score(file: Path) -> float:
        session = runtime.Session(file)
        return perplexity(session, feeds) if subject.language else accuracy(session, feeds)  # type: ignore[arg-type]

    with tempfile.TemporaryDirectory() as scratch:
        made = []
        for bits, recipe_name in subject.settings:
            output = Path(scratch) / f"{bits}.{recipe_name}.onnx"
            named = find(recipe_name.removesuffix("+bias"))
            if recipe_name.endswith("+bias"):
                named = dataclasses.replace(named, compensate=(BiasCompensation(),))
            recipe: Recipe = dataclasses.replace(named, bits=Bits.parse(bits), samples=samples, preprocess=subject.preprocess)
            source = folder / subject.calibration
            start = time.perf_counter()
            result = quantize(path, stories(source) if subject.language else source, recipe, output=output)
            made.append((f"{bits} {recipe_name}", output, result.report, time.perf_counter() - start))
        single = [test[0]]
        latencies = runtime.measure([path, *(m[1] for m in made)], single, threads=1, rounds=rounds)
        base, bytes_before = score(path), path.stat().st_size
        yield Row(name, "fp32", base, 0.0, bytes_before / 1e6, 1.0, "", 0.0, latencies[0])
        for (setting, output, report, seconds), latency in zip(made, latencies[1:], strict=True):
            found = score(output)
            said = [s for s in report.sites if s.activations != "float"]
            integer = f"{sum(s.integer for s in said)}/{len(said)}"
            size = output.stat().st_size
            drop = 100 * (found / base - 1) if subject.language else base - found
            yield Row(name, setting, found, drop, size / 1e6, size / bytes_before, integer, seconds, latency)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = os.environ.get("ONNXCOMP_DATA", str(Path(__file__).resolve().parents[2] / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=Path(default))
    parser.add_argument("--only", default=",".join(SUBJECTS))
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    print("| model | setting | score | drop | MB | size | integer kernels | latency ms | ratio to fp32 (10-90 %) | seconds |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name in arguments.only.split(","):
        for row in run(name, SUBJECTS[name], arguments.data, arguments.samples, arguments.rounds):
            t = row.latency
            print(
                f"| {row.model} | {row.setting} | {row.score:.2f} | {row.drop:+.2f} | {row.megabytes:.2f} | "
                f"{row.size_ratio:.3f} | {row.integer} | {t.median_ms:.2f} | {t.ratio:.3f} "
                f"({t.ratio_low:.3f}-{t.ratio_high:.3f}) | {row.seconds:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
