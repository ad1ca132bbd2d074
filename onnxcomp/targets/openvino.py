"""OpenVINO, where it is installed (the extra `openvino`): the kernels that it executes, and what it computes.

A layer is integer where both operands of its kernel arrive as 8-bit integers; a kernel's precision alone is none of that. An
operator of the compiled model lists those fused into it, its own first, under the names of the ONNX file or with a suffix;
where a bias was pulled in, under the bias's. So a layer is looked for under its own names, then under those of the operators
behind it, up to the next layer or branch.

Limits: CPU plugin, one thread, float32 where nothing is quantized; layers whose name is lost count as not found.
"""

import importlib.util
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from onnxcomp.errors import VerificationError
from onnxcomp.graph.edit import Graph, Node
from onnxcomp.targets.rules import LAYERS, in_blocks

# What is proven is what the file says: activations beside weights in blocks stay float, which have 8 bits there by default.
CONFIG = {
    "INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
}  # fmt: skip
CODES = {"i8", "u8"}
KERNELS = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")
SUFFIXES = ("/WithoutBiases", "_original", "/DequantizationMultiply", "/DequantizationSubtract")


def is_installed() -> bool:
    """Whether OpenVINO is here."""
    return importlib.util.find_spec("openvino") is not None


@cache
def version() -> str:
    """`openvino 2026.4`."""
    import openvino

    return f"openvino {'.'.join(openvino.__version__.split('.')[:2])}"


def compile_model(path: Path) -> Any:
    """The model at `path`, compiled for the CPU. Raises VerificationError for one that OpenVINO does not take."""
    import openvino

    core = openvino.Core()
    try:
        return core.compile_model(core.read_model(path), "CPU", CONFIG)
    except RuntimeError as error:  # its last line says what, those before where in its sources
        reason = str(error).strip().splitlines()[-1].rstrip(".")
        raise VerificationError(f"{version()} does not take the model: {reason}. Nothing was written.") from error


def run(compiled: Any, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs for one feed, by name."""
    found = compiled(dict(feed))
    return {name: np.asarray(found[port]) for port in compiled.outputs for name in port.get_names()}


def kernels(compiled: Any, lowered: Graph) -> dict[str, tuple[str, bool]]:
    """The kernel of every layer of the lowered graph, by its node's name, and whether it is an integer one."""
    by_name: dict[str, tuple[str, set[str]]] = {}
    for op in compiled.get_runtime_model().get_ordered_ops():
        info = {key: op.get_rt_info()[key].astype(str) for key in ("layerType", "originalLayersNames")}
        types = {port.get_element_type().get_type_name() for port in op.inputs()[:2]}
        for name in (info["originalLayersNames"].split(",")[0], op.get_friendly_name()) if info["layerType"] in KERNELS else ():
            for suffix in SUFFIXES:
                name = name.removesuffix(suffix)
            by_name[name] = (info["layerType"], types)
    found: dict[str, tuple[str, bool]] = {}
    for node in (node for node in lowered.nodes if node.op in LAYERS):
        kernel, types = next((by_name[name] for name in _names(node) if name in by_name), ("", {""}))
        found[node.name] = (kernel, types <= CODES or (in_blocks(node) and not types.isdisjoint(CODES | {"i4", "u4"})))
    return found


def _names(node: Node) -> Iterator[str]:
    yield from (node.name, node.outputs[0].name)
    readers = node.outputs[0].outputs
    if len(readers) == 1 and readers[0].op not in LAYERS:
        yield from _names(readers[0])
