"""Side by side with other tools: the same calibration samples, every file scored and all files of a model timed together.

    python tools/peers.py [--data ../shared/data] [--minilm FOLDER] [--only vit,kwt1] [--peers ort,nncf:int8]
                          [--ours w8a8,w4a8:static] [--venvs FOLDER] [--files FOLDER] [--reuse] [--rounds 30] [--json FILE]

Each tool is installed with pip into an environment of its own under --venvs, once, and makes its files there; a tool that fails
gets a row with its reason. Ours are the default recipe at the widths of --ours, `:static` with static ranges. Scores are those
of tools/bench.py and tools/lowbits.py on the test halves; a file is correct if it loses no more than --bound points (per cent
of the perplexity, hundredths of Spearman's correlation). Times are ratios to fp32 with the 10-90 % of the rounds, one thread,
all files in one process and in turn, at batch 1 and batch 8. --files keeps the files and their scores, and --reuse takes them
from there, so that only the timing is done anew. FOLDER of --minilm is what tools/minilm.py writes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lowbits
import numpy as np
from lowbits import Model
from peer_tools import TOOLS, RefusedError, ask, environment, save_feeds, version
from peer_worker import SETTINGS

from onnxcomp import runtime
from onnxcomp.data import InputSpec, open_data
from onnxcomp.errors import OnnxcompError
from onnxcomp.pipeline import quantize

Feed = dict[str, np.ndarray]
BATCHES = 1, 8


@dataclass
class Row:
    """One file of one model, or why there is none."""

    model: str
    tool: str
    setting: str
    score: float = float("nan")
    drop: float = float("nan")
    megabytes: float = float("nan")
    ratios: dict[int, tuple[float, float, float]] = dataclasses.field(default_factory=dict)
    """Median, 10 and 90 % of the ratio to fp32, by batch."""
    milliseconds: dict[int, float] = dataclasses.field(default_factory=dict)
    reason: str = ""
    """Why it is not there, or cannot be run."""

    def is_correct(self, bound: float) -> bool:
        return not self.reason and self.drop <= bound

    def line(self, bound: float) -> str:
        if self.reason:
            return f"| {self.model} | {self.tool} | {self.setting} | | | | | | {self.reason} |"
        times = [f"{r[0]:.3f} ({r[1]:.3f}-{r[2]:.3f})" if (r := self.ratios.get(batch)) else "-" for batch in BATCHES]
        verdict = "" if self.is_correct(bound) else "not correct"
        return (
            f"| {self.model} | {self.tool} | {self.setting} | {self.score:.4g} | {self.drop:+.2f} | {self.megabytes:.2f} | "
            f"{times[0]} | {times[1]} | {verdict} |"
        )


@dataclass
class Place:
    """One model with its samples, and the folder where its files lie."""

    model: Model
    folder: Path
    samples: list[Feed]
    reuse: bool

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.feeds = self.folder / "feeds.npz"
        save_feeds(self.samples, self.feeds)
        self.fp32 = self.scored("fp32", self.model.path)

    def scored(self, key: str, path: Path) -> float:
        """The score of a file, remembered beside it."""
        kept = self.folder / f"{key}.score"
        if not (self.reuse and kept.exists()):
            kept.write_text(repr(self.model.score(runtime.Session(path, threads=1))), encoding="utf-8")
        return float(kept.read_text(encoding="utf-8"))

    def row(self, tool: str, setting: str, key: str, path: Path) -> Row:
        """The row of a finished file, without its times."""
        row = Row(self.model.name, tool, setting, megabytes=path.stat().st_size / 1e6)
        try:
            row.score = self.scored(key, path)
        except OnnxcompError as error:
            row.reason = str(error)
            return row
        language = self.model.name == "stories260k"
        points = 100 * (row.score - self.fp32) if self.model.name == "minilm" else row.score - self.fp32
        row.drop = 100 * (row.score / self.fp32 - 1) if language else -points
        return row

    def ours(self, setting: str) -> tuple[Row, Path]:
        """Our file at a width, made in this process."""
        bits, _, activations = setting.partition(":")
        recipe = lowbits.recipe_for("auto", bits, len(self.samples))
        changes = {"activations": activations} if activations else {}
        recipe = dataclasses.replace(recipe, preprocess=self.model.preprocess, **changes)
        key = f"onnxcomp.{setting.replace(':', '-')}"
        path = self.folder / f"{key}.onnx"
        if not (self.reuse and path.exists()):
            quantize(self.model.path, self.model.calibration, recipe, output=path, force=True)
        return self.row("onnxcomp", setting, key, path), path

    def peer(self, python: Path, tool: str, shown: str, setting: str) -> tuple[Row, Path]:
        """A file of another tool; its refusal is remembered like a file."""
        key = f"{tool}.{setting}"
        path, refusal = self.folder / f"{key}.onnx", self.folder / f"{key}.refused"
        if not (self.reuse and (path.exists() or refusal.exists())):
            path.unlink(missing_ok=True)
            refusal.unlink(missing_ok=True)
            try:
                ask(python, tool, setting, self.model.path, self.feeds, path)
            except RefusedError as error:
                refusal.write_text(str(error), encoding="utf-8")
        if refusal.exists():
            return Row(self.model.name, shown, setting, reason=refusal.read_text(encoding="utf-8")), path
        return self.row(shown, setting, key, path), path


def calibration(model: Model, limit: int) -> list[Feed]:
    """The samples that the pipeline calibrates on, in its order."""
    specs = InputSpec.of(runtime.Session(model.path).inputs)
    data = open_data(model.calibration, specs, preprocess=model.preprocess, limit=limit)
    return [{name: np.ascontiguousarray(array) for name, array in feed.items()} for feed in data]


def batch_of(samples: Sequence[Feed], size: int) -> Feed:
    """So many samples as one feed; texts are cut, or repeated, to the median length."""
    by_length = sorted(samples, key=lambda feed: next(iter(feed.values())).shape[1])
    length = next(iter(by_length[len(samples) // 2].values())).shape[1]
    chosen = by_length[len(samples) // 2 :][:size]
    ragged = len({next(iter(feed.values())).shape for feed in samples}) > 1
    return {n: np.concatenate([f[n][:, :length] if ragged else f[n] for f in chosen]) for n in chosen[0]}


def take_times(place: Place, made: Sequence[tuple[Row, Path]], rounds: int) -> None:
    """Time fp32 and every file that runs, all in turn, at each batch."""
    for batch in BATCHES:
        feed, runs = batch_of(place.samples, batch), []
        for row, path in made:
            try:
                if not row.reason:
                    runtime.Session(path, threads=1).run(feed)
                    runs.append((row, path))
            except OnnxcompError:
                continue  # a file that takes no such batch has no time at it
        times = runtime.measure([place.model.path, *(path for _, path in runs)], [feed], threads=1, rounds=rounds)
        for (row, _), latency in zip(runs, times[1:], strict=True):
            row.ratios[batch] = latency.ratio, latency.ratio_low, latency.ratio_high
            row.milliseconds[batch] = latency.median_ms


def verdicts(rows: Sequence[Row], bound: float) -> list[str]:
    """For each batch: our W8A8 against the fastest correct file of another tool, our other widths against our W8A8."""
    said = []
    for batch in BATCHES:
        timed = {(r.tool, r.setting): r.ratios[batch][0] for r in rows if batch in r.ratios and r.is_correct(bound)}
        ours = {setting: ratio for (tool, setting), ratio in timed.items() if tool == "onnxcomp"}
        peers = {key: ratio for key, ratio in timed.items() if key[0] != "onnxcomp"}
        first = ours.pop("w8a8", None)
        if first is None:
            continue
        name = f"{rows[0].model}, batch {batch}"
        if peers:
            best = min(peers, key=peers.__getitem__)
            gap = 100 * (first / peers[best] - 1)
            said.append(f"{name}: w8a8 {first:.3f}, {' '.join(best)} {peers[best]:.3f}: {gap:+.1f} %")
        others = ", ".join(f"{setting} {100 * (ratio / first - 1):+.1f} %" for setting, ratio in ours.items())
        said += [f"{name}: beside w8a8 {others}"] if others else []
    return said


def compare(place: Place, arguments: argparse.Namespace, pythons: Mapping[str, tuple[Path, str]]) -> list[Row]:
    """All the rows of one model."""
    made = [place.ours(setting) for setting in filter(None, arguments.ours.split(","))]
    for tool, settings in asked(arguments.peers).items():
        if tool not in pythons:
            continue
        python, shown = pythons[tool]
        for setting in settings:
            start = time.monotonic()
            made.append(place.peer(python, tool, shown, setting))
            print(f"{place.model.name}: {tool} {setting}, {time.monotonic() - start:.0f} s", file=arguments.log, flush=True)
    if arguments.rounds:
        take_times(place, made, arguments.rounds)
    return [row for row, _ in made]


def asked(peers: str) -> dict[str, list[str]]:
    """The settings of each tool: `ort` stands for all of them, `ort:dynamic` for one."""
    found: dict[str, list[str]] = {}
    for part in filter(None, peers.split(",")):
        tool, _, setting = part.partition(":")
        found.setdefault(tool, []).extend([setting] if setting else SETTINGS[tool])
    return found


def install(names: Iterable[str], folder: Path) -> tuple[dict[str, tuple[Path, str]], dict[str, str]]:
    """The Python and the name with version of each tool, and why others are not there."""
    pythons, refused = {}, {}
    for name in names:
        try:
            pythons[name] = environment(name, folder), f"{TOOLS[name].shown} {version(name, folder)}"
        except RefusedError as error:
            refused[name] = str(error)
    return pythons, refused


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    data = os.environ.get("ONNXCOMP_DATA", str(Path(__file__).resolve().parents[2] / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=Path(data))
    parser.add_argument("--minilm", type=Path)
    parser.add_argument("--only", default=lowbits.MODELS)
    parser.add_argument("--peers", default=",".join(TOOLS))
    parser.add_argument("--ours", default="w8a8")
    parser.add_argument("--venvs", type=Path, default=Path(tempfile.gettempdir()) / "onnxcomp-peers" / "venvs")
    parser.add_argument("--files", type=Path, default=Path(tempfile.gettempdir()) / "onnxcomp-peers" / "files")
    parser.add_argument("--reuse", action="store_true", help="take files and scores from --files where they are there")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=30, help="0 takes no times")
    parser.add_argument("--bound", type=float, default=5.0, help="the drop up to which a file is correct")
    parser.add_argument("--json", type=Path)
    parser.set_defaults(log=sys.stderr)
    arguments = parser.parse_args()
    pythons, refused = install(asked(arguments.peers), arguments.venvs)
    print("| model | tool | setting | score | drop | MB | batch 1: time / fp32 (10-90 %) | batch 8 | |")
    print("|---|---|---|---|---|---|---|---|---|")
    every: list[dict[str, Any]] = []
    said: list[str] = [f"{TOOLS[name].shown} is not installed: {reason}" for name, reason in refused.items()]
    for name in arguments.only.split(","):
        model = Model(name, arguments.data, arguments.minilm)
        place = Place(model, arguments.files / name, calibration(model, arguments.samples), arguments.reuse)
        rows = compare(place, arguments, pythons)
        print(f"| {name} | fp32 | | {place.fp32:.4g} | | {model.path.stat().st_size / 1e6:.2f} | 1 | 1 | |")
        print("\n".join(row.line(arguments.bound) for row in rows), flush=True)
        said += verdicts(rows, arguments.bound)
        every += [dataclasses.asdict(row) for row in rows]
        if arguments.json is not None:
            arguments.json.write_text(json.dumps({"rows": every, "verdicts": said}, indent=1), encoding="utf-8")
    print("\n" + "\n".join(said))


if __name__ == "__main__":
    main()
