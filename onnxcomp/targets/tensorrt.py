"""TensorRT, where it is installed (`tensorrt`, or `tensorrt_rtx`, which builds engines on machines without a GPU too).

A file is parsed and built as a strongly typed network, and the types of every layer are read from the builder's log; a layer
is integer where both of its factors arrive as Int8, or its weight as Int4. Limits: an engine is built for one sample, not run.
"""

import importlib
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from onnxcomp.errors import VerificationError
from onnxcomp.graph.edit import Graph
from onnxcomp.targets.rules import LAYERS

NAMES = ("tensorrt", "tensorrt_rtx")


@cache
def installed() -> Any:
    """The package; None where there is none that can build an engine here: `tensorrt` cannot without a GPU."""
    for name in NAMES:
        try:
            package = importlib.import_module(name)
            package.Builder(package.Logger(package.Logger.ERROR))
        except (ImportError, OSError, TypeError):  # none, one whose libraries are missing, no GPU
            continue
        return package
    return None


def version() -> str:
    """`tensorrt_rtx 1.7`."""
    return f"{installed().__name__} {'.'.join(installed().__version__.split('.')[:2])}"


def kernels(path: Path, lowered: Graph, shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[str, bool]]:
    """The kernel of every layer of the lowered graph, by its node's name, and whether it is an integer one.

    Raises VerificationError for a file that TensorRT does not parse or build.
    """
    trt, lines = installed(), []

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            lines.append((severity, message))

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    parsed = trt.OnnxParser(network, log).parse_from_file(str(path))
    for index in range(network.num_inputs):
        network.get_input(index).shape = tuple(shapes[network.get_input(index).name])
    if not parsed or builder.build_serialized_network(network, config) is None:
        reason = next((text for severity, text in lines if severity <= trt.ILogger.ERROR), "no reason is given")
        raise VerificationError(f"{version()} does not take the model: {' '.join(reason.split())}. Nothing was written.")
    built = [line for _, text in lines if text.startswith("Layers:") for line in text.splitlines() if line.startswith("Name: ")]
    return {node.name: _kernel(node.name, built) for node in lowered.nodes if node.op in LAYERS}


def _kernel(node: str, built: Sequence[str]) -> tuple[str, bool]:
    """What computes the node: of the layers that name it one that multiplies, else the last."""
    mine = [line for line in built if f"[ONNX Layer: {node}]" in line]
    kinds = [re.findall(r"LayerType: (\w+)", line)[0] for line in mine]
    products = [i for i, kind in enumerate(kinds) if re.search("conv|gemm|correlation|matmul", kind, re.IGNORECASE)]
    if not mine:
        return "", False
    index = (products or [len(mine) - 1])[0]
    read = re.findall(r"Datatype: (\w+)", mine[index].split(", Outputs: ")[0])
    return kinds[index], read.count("Int8") >= 2 or "Int4" in read
