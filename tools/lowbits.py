"""The table of low bits: every model at W8A8, W4A8, W6A6, W4A4 and W3A8, and language models with weights alone.

    python tools/lowbits.py [--data ../shared/data] [--minilm FOLDER] [--only vit,kwt1] [--bits w4a4,w4] [--recipe auto]
    python tools/lowbits.py --blocks [--minilm FOLDER]

Scores on the test halves: top-1 in per cent, perplexity of stories260k, Spearman's rank correlation of MiniLM on STS-B dev (its
labels are never calibrated on). `w4` and `w3` keep activations float, and so does `w4b32`, with a scale per 32 inputs. What
follows a slash changes the recipe: `nearest` and `gptq` leave the bias out, `zeros` gives blocks zero points, `tables` stores
embeddings as codes too. Products of two activations are float in all of them. FOLDER is what tools/minilm.py writes.

Both scores are of the file in ONNX Runtime: with activations beside blocks in float, and by default, where they get 8 bits.
Times are ratios to fp32 with one thread, in turn: of a whole sample, and of its first token alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
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
BLOCKS = "w4b32,w4b32/zeros,w4b32/tables,w4b128,w8b32,w3b32/nearest,w3b32/gptq,w3b32"
HEAD = """| model | recipe | bits | fp32 | score | by default | MB | ratio | kernels | time | one token | other bits | s |
|---|---|---|---|---|---|---|---|---|---|---|---|---|"""
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
            self.sample: Feed = feeds[1]
            self.score = lambda session: spearman(session, feeds, scores)
            return
        subject = bench.SUBJECTS[self.name]
        self.path, self.preprocess = self.data / subject.file, subject.preprocess
        source = self.data / subject.calibration
        self.calibration = bench.stories(source) if subject.language else source
        reference = runtime.Session(self.path)
        specs = InputSpec.of(reference.inputs)
        test = bench.load(subject, self.data, "test", specs, None)
        if subject.language:
            stories = [dict(test[i]) for i in range(len(test))]
            self.score, self.sample = (lambda session: bench.perplexity(session, stories)), stories[0]
        else:
            batches = bench.stacked(test, reference)
            self.score, self.sample = (lambda session: bench.accuracy(session, batches)), dict(test[0])

    def ratio(self, output: Path, rounds: int, tokens: int | None = None) -> str:
        """The time of the file over that of fp32 on one sample, or on its first tokens."""
        feed = {key: array[:, :tokens] for key, array in self.sample.items()}
        (_, latency) = runtime.measure([self.path, output], [feed], rounds=rounds)
        return f"{latency.ratio:.3f} ({latency.ratio_low:.2f}-{latency.ratio_high:.2f})"


CHANGES: dict[str, dict[str, object]] = {
    "nearest": {"rounding": "nearest", "compensate": ()},
    "gptq": {"compensate": ()},
    "zeros": {"zero_points": True},
    "tables": {"embeddings": True},
}


def recipe_for(name: str, setting: str, samples: int) -> Recipe:
    """The named recipe at a setting such as w4a8, w4, w4b32 or w3b32/gptq."""
    written, *changes = setting.split("/")
    bits, _, block = written.partition("b")
    recipe = dataclasses.replace(find(name), bits=Bits.parse(bits), block=int(block or 0), samples=samples)
    for change in changes:
        recipe = dataclasses.replace(recipe, **CHANGES[change])
    return recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = os.environ.get("ONNXCOMP_DATA", str(Path(__file__).resolve().parents[2] / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=Path(default))
    parser.add_argument("--minilm", type=Path)
    parser.add_argument("--only")
    parser.add_argument("--bits")
    parser.add_argument("--blocks", action="store_true", help="Language models with weights in blocks.")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--recipe", default="auto")
    parser.add_argument("--samples", type=int, default=128)
    arguments = parser.parse_args()
    models = arguments.only or ("stories260k,minilm" if arguments.blocks else MODELS)
    widths = arguments.bits or (BLOCKS if arguments.blocks else WIDTHS)
    print(HEAD)
    for name in models.split(","):
        model = Model(name, arguments.data, arguments.minilm)
        before, bytes_before = model.score(runtime.Session(model.path)), model.path.stat().st_size
        for bits in widths.split(","):
            recipe = dataclasses.replace(recipe_for(arguments.recipe, bits, arguments.samples), preprocess=model.preprocess)
            with tempfile.TemporaryDirectory() as scratch:
                output, start = Path(scratch) / "q.onnx", time.perf_counter()
                report = quantize(model.path, model.calibration, recipe, output=output).report
                seconds = time.perf_counter() - start
                score, size = model.score(runtime.Session(output)), output.stat().st_size
                default = model.score(runtime.Session(output, faithful=False))
                tokens = 1 if name in ("minilm", "stories260k") else None
                times = [model.ratio(output, arguments.rounds, n) for n in dict.fromkeys((None, tokens))]
            others = [site.name for site in report.sites if site.kind == "layer" and site.bits != bits.split("/")[0]]
            others += [skipped.name for skipped in report.skipped if "product of two activations" not in skipped.reason]
            meant = [site.integer for site in report.sites if site.has_codes]
            scores = [f"{value:.4f}" for value in (before, score, default)]
            sizes = [f"{size / 1e6:.2f}", f"{size / bytes_before:.3f}", f"{sum(meant)}/{len(meant)}"]
            row = [name, recipe.name, bits, *scores, *sizes, *times, *["-"] * (2 - len(times))]
            print(f"| {' | '.join([*row, ', '.join(others) or '-', f'{seconds:.0f}'])} |", flush=True)


if __name__ == "__main__":
    main()
