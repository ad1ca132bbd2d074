"""What quantizing a model of more than 2 GiB takes, on one that is generated: time, memory, and how close the file comes.

    python tools/large.py [--layers 36] [--width 4096] [--bits w8a8,w4] [--recipe base] [--samples 16] [--folder DIR]

The model is a residual stack of linear layers, half of them MatMul and half Gemm with a transposed weight, which has to be
rewritten, with its weights beside it. Memory is the peak of a process of its own: what it had for itself (anonymous), and all
that was resident, of which the rest are pages of files that the system takes back when it needs them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper
from onnx.external_data_helper import set_external_data

ROOT = Path(__file__).resolve().parents[1]
MAIN = "from onnxcomp.cli import main; main()"
HEADER = ("bits", "MB before", "MB after", "SQNR dB", "s", "anonymous MB", "of the model", "resident MB")


@dataclass(frozen=True)
class Run:
    """What a command printed as JSON, and what it took."""

    answer: dict
    seconds: float
    anonymous: int
    """Bytes, at most, of memory of its own."""
    resident: int
    """Bytes, at most, with pages of files."""


def build(path: Path, layers: int, width: int) -> int:
    """Write the model and its weights, always the same bytes; returns the bytes of the weights."""
    rng, nodes, stored, x = np.random.default_rng(0), [], [], "x"
    with path.with_name(f"{path.name}.data").open("wb") as data:
        for number in range(layers):
            w = rng.standard_normal((width, width), dtype=np.float32) * np.float32((2 / width) ** 0.5)
            stored.append(TensorProto(name=f"w{number}", data_type=TensorProto.FLOAT, dims=w.shape, raw_data=b""))
            set_external_data(stored[-1], f"{path.name}.data", data.tell(), w.nbytes)
            stored[-1].ClearField("raw_data")
            data.write(w.data)
            op, how = ("Gemm", {"transB": 1}) if number % 2 else ("MatMul", {})
            nodes.append(helper.make_node(op, [x, f"w{number}"], [f"h{number}"], f"layer{number}", **how))
            nodes.append(helper.make_node("Relu", [f"h{number}"], [f"r{number}"], f"relu{number}"))
            nodes.append(helper.make_node("Add", [x, f"r{number}"], [f"x{number}"], f"add{number}"))
            x = f"x{number}"
            if number % 4 == 3:
                nodes.append(helper.make_node("LayerNormalization", [x, "gamma"], [f"n{number}"], f"norm{number}"))
                x = f"n{number}"
    nodes.append(helper.make_node("Identity", [x], ["y"], "last"))
    stored.append(helper.make_tensor("gamma", TensorProto.FLOAT, [width], np.ones(width, np.float32)))
    ports = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", width])] for name in "xy"]
    graph = helper.make_graph(nodes, "large", *ports, stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return 4 * layers * width**2


def sample(path: Path, width: int, count: int) -> Path:
    """Write that many samples."""
    np.savez(path, x=np.random.default_rng(1).standard_normal((count, width), dtype=np.float32))
    return path


def run(*arguments: object) -> Run:
    """Run a command of onnxcomp in a process of its own. Raises CalledProcessError where it fails."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", MAIN, *map(str, arguments), "--json"]
    start, peaks = time.perf_counter(), {"RssAnon": 0, "VmRSS": 0}
    with tempfile.TemporaryFile("w+") as out, subprocess.Popen(command, env=environment, stdout=out) as process:
        while process.poll() is None:
            for line in Path(f"/proc/{process.pid}/status").read_text("utf-8").splitlines():
                key, _, value = line.partition(":")
                if key in peaks:
                    peaks[key] = max(peaks[key], int(value.split()[0]) << 10)
            time.sleep(0.02)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
        out.seek(0)
        return Run(json.loads(out.read()), time.perf_counter() - start, peaks["RssAnon"], peaks["VmRSS"])


def row(folder: Path, size: int, data: Path, bits: str, recipe: str) -> list[str]:
    """One line of the table."""
    model, output = folder / "large.onnx", folder / f"large.{bits}.onnx"
    made = run("quantize", model, "--data", data, "--bits", bits, "--recipe", recipe, "-o", output, "--force")
    (compared,) = run("compare", model, output, "--data", data).answer["outputs"]
    after = made.answer["output_bytes"]
    output.unlink()
    numbers = [size / 1e6, after / 1e6, compared["sqnr_db"], made.seconds, made.anonymous / 1e6]
    return [bits, *(f"{n:.0f}" for n in numbers), f"{made.anonymous / size:.2f}", f"{made.resident / 1e6:.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--bits", default="w8a8,w4")
    parser.add_argument("--recipe", default="base")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--folder", type=Path, help="where the model goes, which takes twice its size on disk")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        size = build(folder / "large.onnx", options.layers, options.width)
        data = sample(folder / "data.npz", options.width, options.samples)
        print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}")
        for bits in options.bits.split(","):
            print(f"| {' | '.join(row(folder, size, data, bits, options.recipe))} |", flush=True)


if __name__ == "__main__":
    main()
