"""What `quantize` costs, in forward equivalents: its time over that of one plain float pass over the same samples.

    python tools/forwards.py [--data ../shared/data] [--samples 128] [--rounds 3] [--venvs FOLDER] [--peers] [--stack]

The float pass runs batches of 8 with every core, before and after each `quantize`, in the same process; the median of its
times counts. The parts are CPU seconds: running sessions (the passes), loading them, what is computed of samples besides
(statistics), the proof, and the rest on the main thread (factorizations, searches, graphs). --stack quantizes stacks of 12,
24 and 48 equal blocks and gives the time per block. --peers times NNCF and ONNX Runtime's percentile calibration on the same
samples, each in the environment that tools/peers.py made under --venvs; files read before are not counted.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bench
import numpy as np
import onnx
from onnx import numpy_helper, parser
from peer_tools import ask, environment, save_feeds

from onnxcomp import pipeline, runtime
from onnxcomp.calibrate import samples as calibration
from onnxcomp.data import InputSpec
from onnxcomp.methods.nbc import NonlinearBipolarCompensation
from onnxcomp.recipe import Bits, Recipe, find

Feed = dict[str, np.ndarray]
ALL = dataclasses.replace(find("auto"), compensate=(*find("auto").compensate, NonlinearBipolarCompensation()))
SETTINGS = {
    "w8a8 ranges + BC": (find("bc"), "w8a8"),
    "w8a8 auto": (find("auto"), "w8a8"),
    "w4a8 auto": (find("auto"), "w4a8"),
    "w4a4 rotation + GPTQ + BC + NBC": (ALL, "w4a4"),
    "w4a4 best": (find("best"), "w4a4"),
}
WIDTH, TOKENS = 192, 64


@contextmanager
def parts() -> Iterator[Counter[str]]:
    """CPU seconds by what they are spent on, while the context lasts."""
    seconds, local = Counter[str](), threading.local()
    load, run, each, verify = runtime.Session.__init__, runtime.Session.run, calibration.each, pipeline.verify

    def timed(name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(fn)
        def measured(*args: Any, **kwargs: Any) -> Any:
            outer, local.inner, start = getattr(local, "inner", 0.0), 0.0, time.thread_time()
            try:
                return fn(*args, **kwargs)
            finally:
                spent = time.thread_time() - start
                seconds[name] += spent - local.inner  # what other parts took inside is theirs
                local.inner = outer + spent

        return measured

    def mapped(fn: Callable[..., Any], batches: Any) -> Any:
        return each(timed("statistics", fn), batches)

    runtime.Session.__init__, runtime.Session.run = timed("sessions", load), timed("passes", run)  # type: ignore[method-assign]
    calibration.each, pipeline.verify = mapped, timed("proof", verify)  # type: ignore[assignment]
    start = time.process_time()
    try:
        yield seconds
    finally:
        runtime.Session.__init__, runtime.Session.run = load, run  # type: ignore[method-assign]
        calibration.each, pipeline.verify = each, verify
        seconds["rest"] = time.process_time() - start - sum(seconds.values())


def forward(session: runtime.Session, batches: Sequence[Feed]) -> float:
    """Seconds of one pass."""
    start = time.perf_counter()
    for batch in batches:
        session.run(batch)
    return time.perf_counter() - start


def equivalents(
    model: Path, data: Any, recipe: Recipe, batches: Sequence[Feed], rounds: int
) -> tuple[float, float, Counter[str]]:
    """Seconds of `quantize`, the median of all rounds, of a float pass, and the parts of the last round."""
    session, passes, times, found = runtime.Session(model), [], [], []
    session.run(batches[0])
    for _ in range(rounds):
        passes.append(forward(session, batches))
        with parts() as spent:
            start = time.perf_counter()
            pipeline.quantize(model, data, recipe)
            times.append(time.perf_counter() - start)
        found.append(spent)
        passes.append(forward(session, batches))
    return float(np.median(times)), float(np.median(passes)), found[-1]


def stack(blocks: int) -> onnx.ModelProto:
    """So many equal blocks of a residual stream: LayerNormalization, two layers and a GELU."""
    rng, lines, weights = np.random.default_rng(0), [], {}
    for i in range(blocks):
        lines.append(f"""
            [norm{i}] n{i} = LayerNormalization<axis = -1>(x{i}, gain{i}, shift{i})
            [wide{i}] a{i} = MatMul(n{i}, u{i})
            [wide_bias{i}] b{i} = Add(a{i}, c{i})
            [bend{i}] g{i} = Gelu(b{i})
            [thin{i}] d{i} = MatMul(g{i}, v{i})
            [thin_bias{i}] e{i} = Add(d{i}, f{i})
            [join{i}] x{i + 1} = Add(x{i}, e{i})""")
        for key, shape in {"u": (WIDTH, 4 * WIDTH), "v": (4 * WIDTH, WIDTH), "c": (4 * WIDTH,), "f": (WIDTH,)}.items():
            weights[f"{key}{i}"] = rng.normal(0, shape[0] ** -0.5 if len(shape) > 1 else 0.1, shape)
        weights |= {f"gain{i}": rng.uniform(0.5, 2, WIDTH), f"shift{i}": rng.normal(0, 0.1, WIDTH)}
    kind = f"float[N, {TOKENS}, {WIDTH}]"
    text = f'<ir_version: 10, opset_import: ["" : 21]> stack ({kind} x0) => ({kind} y) {{'
    model = parser.parse_model(f"{text}{''.join(lines)}\n[last] y = Identity(x{blocks}) }}")
    model.graph.initializer.extend(numpy_helper.from_array(a.astype(np.float32), name) for name, a in weights.items())
    return model


def stacks(samples: int, folder: Path) -> None:
    """The time per block of stacks of 12, 24 and 48, in turn."""
    rng = np.random.default_rng(1)
    feeds = [{"x0": rng.normal(size=(1, TOKENS, WIDTH)).astype(np.float32)} for _ in range(samples)]
    recipe = dataclasses.replace(ALL, bits=Bits.parse("w4a4"), samples=samples)
    seconds: dict[int, list[float]] = {12: [], 24: [], 48: []}
    for _ in range(3):
        for count, found in seconds.items():
            path = folder / f"stack{count}.onnx"
            onnx.save(stack(count), path)
            start = time.perf_counter()
            pipeline.quantize(path, feeds, recipe)
            found.append((time.perf_counter() - start) / count)
    base = np.array(seconds[12])
    for count, found in seconds.items():
        ratios = np.array(found) / base
        spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
        figures = f"{np.median(found):.3f} s a block | {np.median(ratios):.3f} of 12 ({spread})"
        print(f"| {count} blocks | {figures} |")


def peers(model: Path, feeds: Sequence[Feed], batches: Sequence[Feed], venvs: Path, folder: Path, rounds: int) -> None:
    """The seconds of other tools beside those of a float pass and of ours."""
    save_feeds(feeds, folder / "feeds.npz")
    session, recipe = runtime.Session(model), dataclasses.replace(find("auto"), samples=len(feeds))
    asked = {"nncf int8-transformer": ("nncf", "int8-transformer"), "onnxruntime percentile": ("ort", "static-u8s8-percentile")}
    times: dict[str, list[float]] = {name: [] for name in ("onnxcomp w8a8 auto", *asked)}
    passes = []
    for _ in range(rounds):
        passes.append(forward(session, batches))
        start = time.perf_counter()
        pipeline.quantize(model, list(feeds), recipe)
        times["onnxcomp w8a8 auto"].append(time.perf_counter() - start)
        for name, (tool, setting) in asked.items():
            output = folder / f"{tool}.onnx"
            ask(environment(tool, venvs), tool, setting, model, folder / "feeds.npz", output)
            log = output.with_suffix(".log").read_text(encoding="utf-8")
            times[name].append(float(log.rpartition("seconds: ")[2]))
    for name, found in times.items():
        ratios = np.array(found) / times["onnxcomp w8a8 auto"]
        spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
        forwards = np.median(found) / np.median(passes)
        figures = f"{forwards:.1f} forwards | {np.median(ratios):.2f} of ours ({spread})"
        print(f"| {name} | {np.median(found):.1f} s | {figures} |")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data", type=Path, default=Path(os.environ.get("ONNXCOMP_DATA", "../shared/data")))
    arguments.add_argument("--samples", type=int, default=128)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--venvs", type=Path, default=Path(tempfile.gettempdir()) / "peers")
    arguments.add_argument("--peers", action="store_true")
    arguments.add_argument("--stack", action="store_true")
    given = arguments.parse_args()
    subject = bench.SUBJECTS["vit"]
    model, data = given.data / subject.file, given.data / subject.calibration
    specs = InputSpec.of(runtime.Session(model).inputs)
    loaded = bench.load(subject, given.data, "calibration", specs, given.samples)
    feeds = [dict(loaded[i]) for i in range(len(loaded))]
    batches = [{k: np.concatenate([f[k] for f in feeds[i : i + 8]]) for k in feeds[0]} for i in range(0, len(feeds), 8)]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if given.stack:
            stacks(32, folder)
        if given.peers:
            peers(model, feeds, batches, given.venvs, folder, given.rounds)
        if given.stack or given.peers:
            return
    for name, (recipe, bits) in SETTINGS.items():
        asked = dataclasses.replace(recipe, bits=Bits.parse(bits), samples=given.samples, preprocess=subject.preprocess)
        seconds, once, spent = equivalents(model, data, asked, batches, given.rounds)
        shares = ", ".join(f"{part} {cpu:.1f}" for part, cpu in spent.most_common())
        print(f"| {name} | {seconds:.1f} s | {seconds / once:.1f} forwards of {once:.2f} s | {shares} |", flush=True)


if __name__ == "__main__":
    main()
