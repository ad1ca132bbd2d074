"""`--bits auto`: widths per site, and sites left in float, by what they cost the output and what they save.

A site of n weights at b bits takes n b / 8 bytes (as the target packs them) and is foretold to cost the output

    weights 4^(4-b) + activations 4^-4        its damage as measured at w4a4; a bit less doubles every error; nothing in float

For each price of a byte every site takes the width of least damage plus price: a ladder of choices, from large files to
small ones. Its rungs are quantized, run and compared on samples that calibration did not see, halving what is left: at most
five. The smallest file that keeps --max-drop is taken, or where that is not asked for the one of least damage.

Activations have 8 bits throughout: fewer make a file neither smaller nor faster on any target (W4A4 of ViT-Ti takes 0.66 of
fp32, W4A8 0.55). Where only the time is missed, the ladder is climbed again with ranges fixed at calibration and nothing mixed.
"""

import dataclasses
import glob
from pathlib import Path

import numpy as np

from onnxcomp import pipeline, runtime, targets
from onnxcomp.analysis import analyze
from onnxcomp.comparison import compare, lost
from onnxcomp.data import InputSpec, open_data
from onnxcomp.errors import BoundError, DataError
from onnxcomp.graph import files
from onnxcomp.recipe import Bits, Recipe, SiteRule, dumps
from onnxcomp.report.model import Analysis
from onnxcomp.targets.base import Encoding
from onnxcomp.targets.nbits import stored_bits

FLOAT = 32
WIDTHS = (2, 3, 4, 5, 6, 8, FLOAT)
RUNGS = 31
HELD_OUT = 256
"""Samples, at most, that a rung is judged on."""
PRICES = np.geomspace(1e-8, 1e4, 400)
"""Of all weights as bytes of 8 bits, over the damage of all."""


def quantize(
    model: str | Path, data: object, recipe: Recipe, *, max_drop: float | None = None, max_size: float | None = None,
    max_latency: float | None = None, labels: str | None = None, output: str | Path | None = None, force: bool = False,
    memory: int | None = None, work: str | Path | None = None, cluster: str | None = None,
    progress: runtime.Progress = runtime.ignore,
) -> tuple[pipeline.Result, tuple[str, ...]]:  # fmt: skip
    """The model within the bounds, written to `output` beside the recipe that gives it again, and what was measured.

    max_drop     points of accuracy, or of agreement where there are no labels, on held-out samples
    max_size     bytes, or below 1 a share of the float file's
    max_latency  time of one sample, one thread, over the float model's

    Raises BoundError, with what came closest, where no choice keeps the bounds, and DataError for a single sample.
    """
    samples = open_data(data, InputSpec.of(runtime.Session(model).inputs), preprocess=recipe.preprocess)
    if len(samples) < 2:
        raise DataError("One sample cannot be calibrated on and held out. Give at least two.")
    kept = min(recipe.samples, 3 * len(samples) // 4)
    recipe = dataclasses.replace(recipe, bits=Bits(8, 8), samples=kept, sensitive="asked")

    limits = {"--max-size": max_size, "--max-latency": max_latency, "--max-drop": max_drop}
    limits = {option: limit for option, limit in limits.items() if limit is not None}
    whole = files.size(model) if max_size is not None and max_size < 1 else 1

    def measure(result: pipeline.Result) -> dict[str, tuple[float, str]]:
        found: dict[str, tuple[float, str]] = {}
        if max_size is not None:
            size = result.report.output_bytes / whole
            found["--max-size"] = size, f"takes {size:.0f} bytes" if whole == 1 else f"takes {size:.3g} of the float file"
        if max_latency is not None:
            ratio = runtime.measure([model, result.finished], [samples[0]])[1].ratio
            found["--max-latency"] = ratio, f"takes {ratio:.3f} of the float model's time"
        if max_drop is not None:
            unseen = {"labels": labels, "limit": HELD_OUT, "preprocess": recipe.preprocess, "seed": recipe.seed, "skip": kept}
            compared = compare(model, result.finished, data, **unseen)
            points, what = lost(compared)
            found["--max-drop"] = points, f"loses {points:.2f} points of {what} on {compared.samples} held-out samples"
        return found

    analysis = analyze(model, data, dataclasses.replace(recipe, bits=Bits(4, 4)), progress=progress)
    ways = (recipe, dataclasses.replace(recipe, activations="static", rotation="folded"))
    best, closest, missed = None, np.inf, ""
    for way in ways[: 1 if max_latency is None else 2]:
        rungs = ladder(analysis, way, targets.find(recipe.target).encoding)
        low, high = 0, len(rungs) - 1
        while low <= high and (best is None or way is recipe):
            middle = (low + high) // 2
            result = pipeline.quantize(model, data, rungs[middle], memory=memory, work=work, cluster=cluster, progress=progress)
            found = measure(result)
            excess = {option: (found[option][0] - limit) / max(abs(limit), 0.01) for option, limit in limits.items()}
            misses = [option for option in limits if excess[option] > 0]
            if not misses:
                best = result, rungs[middle], tuple(f"{option} {limits[option]:g}: {found[option][1]}" for option in limits)
            elif max(excess.values()) < closest:
                closest = max(excess.values())
                missed = " and ".join(f"{found[option][1]}, more than {option} {limits[option]:g}" for option in misses)
            is_narrower = "--max-drop" not in misses and (bool(misses) or max_drop is not None)
            low, high = (middle + 1, high) if is_narrower else (low, middle - 1)
    if best is None:
        raise BoundError(f"No choice of bits keeps the bounds: the closest {missed}. Nothing was written.")
    result, rung, said = best
    if output is not None:
        files.save(result.finished, Path(output), force=force, source=Path(model))
        files.save_text(dumps(rung), Path(output).with_suffix(".recipe.toml"))
    return result, said


def ladder(found: Analysis, recipe: Recipe, encoding: Encoding) -> list[Recipe]:
    """The recipe with widths per site, from the least damage to the smallest file; see the head of this module."""
    sites = [row for row in found.sites if row.kind == "layer"]
    measured = [[(s.weights_isolated, s.weights_cumulative), (s.activations_isolated, s.activations_cumulative)] for s in sites]
    weights, activations = (np.maximum(measured, 0).mean(axis=2) + 1e-3 * found.total / len(sites)).T
    counts = np.array([row.weights for row in sites])
    sizes = np.array([[n * (b if b == FLOAT else stored_bits(b, n, encoding)) / 8 for b in WIDTHS] for n in counts])
    damage = np.array([weights * 4.0 ** (4 - b) + activations / 256 if b != FLOAT else 0 * weights for b in WIDTHS]).T
    prices = PRICES * (weights + activations).sum() / counts.sum()
    choices = dict.fromkeys(tuple(WIDTHS[i] for i in np.argmin(damage + price * sizes, axis=1)) for price in prices)
    rungs = [widths for widths in choices if set(widths) != {FLOAT}]
    few = [rungs[i] for i in np.unique(np.linspace(0, len(rungs) - 1, RUNGS).round().astype(int))]
    return [_recipe(recipe, {glob.escape(s.name): w for s, w in zip(sites, widths, strict=True)}) for widths in few]


def _recipe(recipe: Recipe, widths: dict[str, int]) -> Recipe:
    """The recipe with these widths; its own rules stand behind them and win."""
    rules = tuple(SiteRule(where, Bits(bits, 8)) for where, bits in widths.items() if bits not in (8, FLOAT))
    excluded = tuple(where for where, bits in widths.items() if bits == FLOAT)
    return dataclasses.replace(recipe, site=(*rules, *recipe.site), exclude=(*recipe.exclude, *excluded))
