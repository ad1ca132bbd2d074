"""Inspect an ONNX file: what is in it, what could be quantized, or how onnxcomp quantized it.

A file that onnxcomp wrote carries its recipe and its report, and these are read back. Of any other file the sites are
found as `quantize` would find them, under the names that --include and --exclude take.

Limits: only the main graph is counted; no sites are sought in a file that is quantized already; a report says what was
true where the file was made.
"""

import math
import re
from collections import Counter
from pathlib import Path

from onnxcomp import runtime
from onnxcomp.errors import ModelError
from onnxcomp.graph import files
from onnxcomp.graph.convert import to_graph
from onnxcomp.graph.edit import Graph
from onnxcomp.graph.opset import standard_opset
from onnxcomp.graph.prepare import prepare
from onnxcomp.graph.sites import find_holders, find_sites
from onnxcomp.graph.types import Tensor, type_name
from onnxcomp.numerics.arrays import describe
from onnxcomp.report.json import from_json
from onnxcomp.report.model import Count, FoundSite, Inspection

QUANTIZES = re.compile(r"(?i:quantize)|^QLinear|^QGemm|(Integer|IntegerToFloat|NBits)$")
"""The names of operators that quantize, dequantize or compute with codes."""


def inspect(path: str | Path) -> Inspection:
    """Read the file at `path`.

    Raises ModelError for a file that is no ONNX model.
    """
    model = files.load(path)
    graph = to_graph(model)
    size = files.size(path)
    operators = tuple(Count(*pair) for pair in Counter(sorted(node.op for node in graph.nodes)).most_common())
    quantization = tuple(count for count in operators if QUANTIZES.search(count.op))
    stored = files.metadata(model).get(files.REPORT)
    report, sites, notes = None, (), []
    try:
        if stored is not None:
            report = from_json(stored, output_bytes=size)
    except ModelError as error:
        notes.append(str(error))
    if report is None and not quantization:
        sites = _sites(model, graph, notes)
    producer = f"{model.producer_name} {model.producer_version}".strip()
    domains = tuple(f"{o.domain} {o.version}" for o in model.opset_import if o.domain not in ("", "ai.onnx"))
    inputs, outputs = tuple(map(_port, graph.inputs)), tuple(map(_port, graph.outputs))
    parameters = sum(math.prod(tensor.dims) for tensor in model.graph.initializer)
    return Inspection(
        str(path), size, producer, standard_opset(model), domains, inputs, outputs, parameters,
        operators, quantization, sites, report, tuple(notes),
    )  # fmt: skip


def _sites(model: files.ModelProto, graph: Graph, notes: list[str]) -> tuple[FoundSite, ...]:
    """Of the graph that `quantize` would work on; of the file's own where it cannot be brought to that form."""
    try:
        graph = prepare(model, runtime.infer_types).graph
    except ModelError as error:
        notes.append(f"This model cannot be quantized as it is. {error}")
    tensors = graph.tensors()
    return tuple(
        FoundSite(site.name, site.op, site.kind, None if site.weight is None else tuple(tensors[site.weight].shape))
        for site in (*find_sites(graph), *find_holders(graph))
    )


def _port(tensor: Tensor) -> str:
    return f"{tensor.name} {describe(type_name(tensor.dtype) or None, tensor.shape)}"
