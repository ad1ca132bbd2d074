"""What 8-bit products cost on a CPU without VNNI, which adds them in pairs in 16 bits: error, and time over fp32.

    python tools/saturation.py [--data ../shared/data] [--only mobilenet,kwt1] [--samples 64] [--test 32] [--rounds 15]

Two files and three ways to run them, W8A8: as for a CPU with VNNI, with codes that are held to what 16 bits take, and the first
one again in ONNX Runtime's exact kernels (session.x64quantprecision). The SQNR is that of all test samples against the float
model, the time the median ratio of rounds in turn, one thread. On a CPU with VNNI there is nothing to see.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import bench
import numpy as np
import onnxruntime as ort

from onnxcomp import runtime
from onnxcomp.data import InputSpec
from onnxcomp.numerics.arrays import energies, sqnr_db
from onnxcomp.pipeline import quantize
from onnxcomp.recipe import Bits, find

WAYS = {"as for VNNI": ("ort-x86", False), "held": ("ort-x86-avx2", False), "in exact kernels": ("ort-x86", True)}
"""The target of the file, and whether ONNX Runtime is asked for exact sums."""


def load(path: Path, *, exact: bool = False) -> runtime.Session:
    """The file on one thread with the runtime's own defaults, or with its option for exact sums."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.x64quantprecision", str(int(exact)))
    return runtime.Session(path, options=options)


def rows(subject: bench.Subject, folder: Path, samples: int, tests: int, rounds: int) -> Iterator[tuple[str, float, float]]:
    """Of each way: its name, SQNR in dB, and time over fp32."""
    reference = load(folder / subject.file)
    specs = InputSpec.of(reference.inputs)
    data = bench.load(subject, folder, "calibration", specs, samples)
    test = bench.load(subject, folder, "test", specs, tests)
    feeds, sessions = [test[i] for i in range(len(test))], [reference]
    with tempfile.TemporaryDirectory() as scratch:
        for target, exact in WAYS.values():
            path = Path(scratch) / f"{target}.onnx"
            if not path.exists():
                recipe = dataclasses.replace(find("auto"), target=target, bits=Bits(8, 8), samples=samples)
                quantize(folder / subject.file, data, recipe, output=path)
            sessions.append(load(path, exact=exact))
    times = np.array([[seconds(session, feeds[:3]) for session in sessions] for _ in range(rounds)])
    ratios = np.median(times / times[:, :1], axis=0)
    want = [reference.run(feed) for feed in feeds]
    for name, session, ratio in zip(WAYS, sessions[1:], ratios[1:], strict=True):
        yield name, error(want, [session.run(feed) for feed in feeds]), float(ratio)


def seconds(session: runtime.Session, feeds: list[dict[str, np.ndarray]]) -> float:
    """Of one pass over the feeds."""
    start = time.perf_counter()
    for feed in feeds:
        session.run(feed)
    return time.perf_counter() - start


def error(want: list[dict[str, np.ndarray]], found: list[dict[str, np.ndarray]]) -> float:
    """The SQNR of the first output over all samples, dB."""
    (name, *_), pairs = want[0], zip(want, found, strict=True)
    return sqnr_db(*np.sum([energies(a[name], b[name]) for a, b in pairs], axis=0))


def main() -> None:
    parser = argparse.ArgumentParser(description="What 8-bit products cost on a CPU without VNNI.")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("ONNXCOMP_DATA", "../shared/data")))
    parser.add_argument("--only", default="mobilenet,resnet20,kwt1,vit")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--test", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    print(f"| {'VNNI is missing' if runtime.saturates() else 'This CPU has VNNI'} | {' | '.join(WAYS)} |")
    print(f"|{'---|' * (len(WAYS) + 1)}")
    for name in options.only.split(","):
        made = rows(bench.SUBJECTS[name], options.data, options.samples, options.test, options.rounds)
        print(f"| {name} | {' | '.join(f'{db:.1f} ({ratio:.2f})' for _, db, ratio in made)} |", flush=True)


if __name__ == "__main__":
    main()
