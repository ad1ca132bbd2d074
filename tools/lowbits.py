"""The table of low bits: every model at W8A8, W4A8, W6A6, W4A4 and W3A8, and language models with weights alone.

    python tools/lowbits.py [--data ../shared/data] [--minilm FOLDER] [--only vit,kwt1] [--bits w4a4,w4] [--recipe auto]

Scores on the test halves: top-1 in per cent, perplexity of stories260k, Spearman's rank correlation of MiniLM on STS-B dev (its
labels are never calibrated on). `w4` and `w3` keep activations float; products of two activations are float in all of them.
FOLDER is what tools/minilm.py writes.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import bench
import numpy as np

from onnxcomp import runtime
from onnxcomp.data import InputSpec
from onnxcomp.pipeline import quantize
from onnxcomp.recipe import Bits, Recipe, find

WIDTHS = "w8a8,w4a8,w6a6,w4a4,w3a8"
MODELS = "vit,mobilenet,resnet20,kwt1,minilm,stories260k"
Feed = Mapping[str, np.ndarray]


def sentences(folder: Path) -> tuple[list[Feed], np.ndarray]:
    """The sentences of the STS-B pairs, two by two, and the pairs' scores."""
    with np.load(folder / "stsb.npz") as archive:
        ids, ends, scores = archive["ids"], np.cumsum(archive["lens"]), archive["scores"]
    parts = [part.astype(np.int64)[None] for part in np.split(ids, ends[:-1])]
    return [{"input_ids": part, "attention_mask": np.ones_like(part)} for part in parts], scores


def spearman(session: runtime.Session, feeds: list[Feed], scores: np.ndarray) -> float:
    """The rank correlation of the pairs' cosine similarity and their scores."""
    vectors = np.concatenate([next(iter(session.run(feed).values())) for feed in feeds])
    return float(np.corrcoef(ranks((vectors[0::2] * vectors[1::2]).sum(axis=1)), ranks(scores))[0, 1])


def ranks(values: np.ndarray) -> np.ndarray:
    """The rank of each value; equal ones share the mean of theirs."""
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[where]


@dataclasses.dataclass
class Model:
    """One model with what it is calibrated on and scored with."""

    name: str
    data: Path
    minilm: Path | None

    def __post_init__(self) -> None:
        if self.name == "minilm":
            assert self.minilm is not None, "--minilm FOLDER is needed: see tools/minilm.py"
            self.path, self.preprocess = self.minilm / "minilm.onnx", None
            feeds, scores = sentences(self.minilm)
            self.calibration: object = feeds[::10]
            self.score = lambda session: spearman(session, feeds, scores)
            return
        subject = bench.SUBJECTS[self.name]
        self.path, self.preprocess = self.data / subject.file, subject.preprocess
        source = self.data / subject.calibration
        self.calibration = bench.stories(source) if subject.language else source
        reference = runtime.Session(self.path)
        specs = [InputSpec(n, kind.dtype or np.dtype(np.float32), kind.shape) for n, kind in reference.inputs]
        test = bench.load(subject, self.data, "test", specs, None)
        if subject.language:
            stories = [dict(test[i]) for i in range(len(test))]
            self.score = lambda session: bench.perplexity(session, stories)
        else:
            batches = bench.stacked(test, reference)
            self.score = lambda session: bench.accuracy(session, batches)


def recipe_for(name: str, bits: str, samples: int) -> Recipe:
    """The named recipe at these bits; `w4` stands for weights alone."""
    found = re.fullmatch(r"w(\d)", bits)
    recipe = dataclasses.replace(find(name), bits=Bits(int(found[1]), 8) if found else Bits.parse(bits), samples=samples)
    return dataclasses.replace(recipe, activations="float") if found else recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = os.environ.get("ONNXCOMP_DATA", str(Path(__file__).resolve().parents[2] / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=Path(default))
    parser.add_argument("--minilm", type=Path)
    parser.add_argument("--only", default=MODELS)
    parser.add_argument("--bits", default=WIDTHS)
    parser.add_argument("--recipe", default="auto")
    parser.add_argument("--samples", type=int, default=128)
    arguments = parser.parse_args()
    print("| model | recipe | bits | fp32 | score | MB | not at these bits | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for name in arguments.only.split(","):
        model = Model(name, arguments.data, arguments.minilm)
        before = model.score(runtime.Session(model.path))
        for bits in arguments.bits.split(","):
            recipe = dataclasses.replace(recipe_for(arguments.recipe, bits, arguments.samples), preprocess=model.preprocess)
            with tempfile.TemporaryDirectory() as scratch:
                output, start = Path(scratch) / "q.onnx", time.perf_counter()
                report = quantize(model.path, model.calibration, recipe, output=output).report
                seconds = time.perf_counter() - start
                score, size = model.score(runtime.Session(output)), output.stat().st_size / 1e6
            others = [site.name for site in report.sites if site.kind == "layer" and site.bits != bits]
            others += [skipped.name for skipped in report.skipped if "product of two activations" not in skipped.reason]
            print(
                f"| {name} | {recipe.name} | {bits} | {before:.4g} | {score:.4g} | {size:.2f} | {', '.join(others) or '-'} | "
                f"{seconds:.0f} |", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
