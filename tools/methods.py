"""The four methods side by side: base (MSE ranges alone), base + each method, and everything, per model and width.

    python tools/methods.py [--data ../shared/data] [--only vit,kwt1] [--bits w4a4,w6a6,w4a8] [--samples 128] [--rounds 20]
    python tools/methods.py --series [--only vit,kwt1]      the series of xint without any data, term by term

Scores are accuracies on the test half (which calibration never saw). What is random, the draws of `noisyquant`, is run
with three seeds: mean and spread. Latency (one thread, batch 1) is the ratio to the base of the same width, all files of
one model and width timed in turn in one run; bytes are what the file is larger than the base's.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from bench import HALF, IMAGENET, Subject, accuracy, load, stacked

from onnxcomp import runtime
from onnxcomp.data import InputSpec
from onnxcomp.methods.base import Compensation
from onnxcomp.methods.xint import XInt
from onnxcomp.numerics.arrays import energies, sqnr_db
from onnxcomp.pipeline import quantize
from onnxcomp.recipe import Bits, Recipe, find

MODELS = Path(__file__).resolve().parents[1] / "models"
SUBJECTS = {
    "vit": Subject("vit_tiny_patch16_224.onnx", "imagenet/calib", "imagenet/val", HALF, ()),
    "kwt1": Subject("kwt1.onnx", "kwt1_calib.npz", "kwt1_test.npz", None, ()),
    "resnet20": Subject("cifar10_resnet20.onnx", "cifar10_calib.npz", "cifar10_test.npz", IMAGENET, ()),
    "mobilenet": Subject("mobilenet_v2_1.0_224.onnx", "imagenet/calib", "imagenet/val", HALF, ()),
    "vit_digits": Subject(
        str(MODELS / "vit_digits.onnx"), str(MODELS / "digits_calib.npz"), str(MODELS / "digits_test.npz"), None, ()
    ),
    "cnn_digits": Subject(
        str(MODELS / "cnn_digits.onnx"), str(MODELS / "digits_calib.npz"), str(MODELS / "digits_test.npz"), None, ()
    ),
}
RECIPES = ("base", "bc", "nbc", "noisyquant", "xint", "best")
SEEDS = {"noisyquant": (0, 1, 2)}


def seeded(recipe: Recipe, seed: int) -> Recipe:
    """The recipe with every random choice of its methods drawn anew."""

    def draw(method: Compensation) -> Compensation:
        return dataclasses.replace(method, seed=seed) if hasattr(method, "seed") else method

    return dataclasses.replace(recipe, compensate=tuple(draw(method) for method in recipe.compensate))


def rows(name: str, subject: Subject, folder: Path, bits: str, options: argparse.Namespace) -> None:
    """Print the lines of one model at one width."""
    path = folder / subject.file
    reference = runtime.Session(path)
    specs = InputSpec.of(reference.inputs)
    test = load(subject, folder, "test", specs, None)
    batches = stacked(test, reference)
    whole = accuracy(reference, batches)
    with tempfile.TemporaryDirectory() as scratch:
        made: list[tuple[str, Path, list[float], float, str]] = []
        for recipe_name in options.recipes.split(","):
            named = find(recipe_name)
            samples = options.samples if named.samples else 0
            named = dataclasses.replace(named, bits=Bits.parse(bits), samples=samples, preprocess=subject.preprocess)
            scores, seconds, kept = [], 0.0, ""
            output = Path(scratch) / f"{recipe_name}.onnx"
            for seed in SEEDS.get(recipe_name, (0,)):
                start = time.perf_counter()
                result = quantize(path, folder / subject.calibration, seeded(named, seed), output=output, force=True)
                seconds = time.perf_counter() - start
                scores.append(accuracy(runtime.Session(output), batches))
                decisions = result.report.decisions
                methods = dict.fromkeys(d.method for d in decisions if d.method != "token")
                kept = ", ".join(
                    f"{m} {sum(d.adopted for d in decisions if d.method == m)}/{sum(d.method == m for d in decisions)}"
                    for m in methods
                )
            made.append((recipe_name, output, scores, seconds, kept))
        latencies = runtime.measure([m[1] for m in made], [test[0]], threads=1, rounds=options.rounds)
        base = float(np.mean(made[0][2]))
        for (recipe_name, output, scores, seconds, kept), latency in zip(made, latencies, strict=True):
            score = f"{np.mean(scores):.2f}" + (f" +- {np.std(scores):.2f}" if len(scores) > 1 else "")
            added, gain = (output.stat().st_size - made[0][1].stat().st_size) / 1e3, np.mean(scores) - base
            print(
                f"| {name} | {bits} | {recipe_name} | {whole:.2f} | {score} | {gain:+.2f} | {added:+.0f} | "
                f"{latency.ratio:.3f} ({latency.ratio_low:.3f}-{latency.ratio_high:.3f}) | {seconds:.0f} | {kept} |",
                flush=True,
            )


def series(name: str, subject: Subject, folder: Path, options: argparse.Namespace) -> None:
    """Print what each further 4-bit term of weights and activations brings, without data, and what weight terms cost."""
    path = folder / subject.file
    reference = runtime.Session(path)
    specs = InputSpec.of(reference.inputs)
    test = load(subject, folder, "test", specs, None)
    batches, few = stacked(test, reference), [test[i] for i in range(20)]
    expected = [next(iter(reference.run(feed).values())) for feed in few]

    def quantized(k: int, t: int) -> bytes:
        recipe = dataclasses.replace(find("xint"), compensate=(XInt(weight_terms=k, activation_terms=t, keep="always"),))
        return quantize(path, None, recipe).model.SerializeToString()

    def sqnr(model: bytes) -> float:
        session = runtime.Session(model)
        found = [next(iter(session.run(feed).values())) for feed in few]
        pairs = [energies(e, f) for e, f in zip(expected, found, strict=True)]
        return sqnr_db(*map(sum, zip(*pairs, strict=True)))

    models = {(k, t): quantized(k, t) for k, t in ((1, 1), (2, 2), (3, 3), (4, 4), (2, 1))}
    terms = " / ".join(f"{sqnr(models[n, n]):.1f}" for n in (1, 2, 3, 4))
    scores = f"{accuracy(reference, batches):.2f} -> {accuracy(runtime.Session(models[2, 2]), batches):.2f}"
    timed = [models[1, 1], models[2, 1], models[2, 2], path.read_bytes()]
    times = runtime.measure(timed, [test[0]], threads=1, rounds=options.rounds)
    ratios = " | ".join(f"{t.median_ms / times[3].median_ms:.3f}" for t in times[:3])
    print(f"| {name} | {terms} | {scores} | {ratios} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = os.environ.get("ONNXCOMP_DATA", str(Path(__file__).resolve().parents[2] / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=Path(default))
    parser.add_argument("--only", default=",".join(SUBJECTS))
    parser.add_argument("--bits", default="w4a4,w6a6,w4a8")
    parser.add_argument("--recipes", default=",".join(RECIPES), help="the first is what the others are compared with")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--series", action="store_true", help="the terms of xint, without data")
    options = parser.parse_args()
    if options.series:
        print("| model | SQNR dB at k = t = 1 / 2 / 3 / 4 | fp32 -> k = t = 2 | time / fp32: k = 1 | k = 2 | k = t = 2 |")
        print("|---|---|---|---|---|---|")
        for name in options.only.split(","):
            series(name, SUBJECTS[name], options.data, options)
        return
    print("| model | bits | recipe | fp32 | score | gain | kB added | time / base (10-90 %) | seconds | kept |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name in options.only.split(","):
        for bits in options.bits.split(","):
            rows(name, SUBJECTS[name], options.data, bits, options)


if __name__ == "__main__":
    main()
