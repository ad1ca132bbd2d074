"""What quantizing takes, measured in a process of its own beside what was foretold: memory, disk, time, traffic of a cluster.

    python tools/schedule.py [--only vit,mobilenet] [--samples 64,256,1024] [--memory 32] [--bits w8a8] [--recipe auto]
    python tools/schedule.py --workers 0,1,2,4 --samples 64      0: without a cluster
    python tools/schedule.py --only vit_digits --work DIR        with the folder that keeps what is finished

Memory is the peak resident set of the process that quantizes (of a cluster: of the one that asks), in MB; sent and moved are
what left that process, and what workers sent to one another and home. Images come from both halves of the folder of data.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import SUBJECTS, Subject, stories

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "models"
OWN = {
    name: Subject(str(MODELS / f"{name}.onnx"), str(MODELS / "digits_calib.npz"), "", None, ())
    for name in ("vit_digits", "cnn_digits")
}
HEADER = (
    "model",
    "bits",
    "samples",
    "workers",
    "foretold MB",
    "MB",
    "foretold s",
    "s",
    "files MB",
    "sent MB",
    "moved MB",
    "sha256",
)


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Quantize once, in this process."""
    from onnxcomp.calibrate.room import peak_memory
    from onnxcomp.pipeline import quantize
    from onnxcomp.recipe import Bits, find
    from onnxcomp.report.model import Forecast

    subject, foretold = (SUBJECTS | OWN)[options.only], list[Forecast]()
    recipe = dataclasses.replace(find(options.recipe), bits=Bits.parse(options.bits), samples=int(options.samples))
    recipe = dataclasses.replace(recipe, preprocess=subject.preprocess)
    source = options.data / subject.calibration
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        if source.is_dir():
            for half in (subject.calibration, subject.test):
                for path in sorted((options.data / half).rglob("*.[jJ]*")):
                    (Path(folder) / f"{Path(half).name}-{path.stem}.jpg").symlink_to(path)
            source = Path(folder)
        result = quantize(
            options.data / subject.file, stories(source) if subject.language else source, recipe,
            memory=int(options.memory * 1e6), work=options.work, announce=foretold.append,
            cluster=f"local:{options.workers}" if int(options.workers) else None,
        )  # fmt: skip
    return {
        "foretold": dataclasses.asdict(foretold[0]),
        "seconds": time.perf_counter() - start,
        "memory_bytes": peak_memory(),
        "traffic": result.traffic,
        "sha256": hashlib.sha256(result.model.SerializeToString(deterministic=True)).hexdigest(),
    }


def row(options: argparse.Namespace, name: str, samples: str, workers: str) -> list[str]:
    """One line of the table, from a process of its own."""
    given = vars(options) | {"only": name, "samples": samples, "workers": workers}
    arguments = [f"--{key}={value}" for key, value in given.items() if key != "child" and value is not None]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, __file__, "--child", *arguments]
    found = json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout)
    told, traffic = found["foretold"], found["traffic"]
    sent, moved = (sum(step[column] for step in traffic) / 1e6 for column in (1, 2))
    numbers = [told["memory_bytes"] / 1e6, found["memory_bytes"] / 1e6, told["seconds"], found["seconds"]]
    numbers += [told["disk_bytes"] / 1e6, sent, moved]
    return [name, options.bits, samples, workers, *(f"{number:.1f}" for number in numbers), found["sha256"][:12]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = os.environ.get("ONNXCOMP_DATA", str(Path(__file__).resolve().parents[2] / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=Path(default))
    parser.add_argument("--only", default="vit,mobilenet")
    parser.add_argument("--samples", default="64,256,1024")
    parser.add_argument("--memory", type=float, default=32, help="MB for the samples' activations")
    parser.add_argument("--workers", default="0")
    parser.add_argument("--bits", default="w8a8")
    parser.add_argument("--recipe", default="auto")
    parser.add_argument("--work")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options)))
        return
    print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}")
    for name in options.only.split(","):
        for samples in options.samples.split(","):
            for workers in options.workers.split(","):
                print(f"| {' | '.join(row(options, name, samples, workers))} |", flush=True)


if __name__ == "__main__":
    main()
