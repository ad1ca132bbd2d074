"""Inspect an ONNX file: what is in it, what could be quantized, or how onnxcomp quantized it.

A file that onnxcomp wrote carries its recipe and its report, and these are read back. Of any other file the sites are
found as `quantize` would find them, under the names that --include and --exclude take.

Limits: only the main graph is counted; no sites are sought in a file that is quantized already; a report says what was
true where the file was made.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from onnxcomp import runtime
from onnxcomp.errors import ModelError
from onnxcomp.graph import files
from onnxcomp.graph.convert import to_graph
from onnxcomp.graph.edit import Graph
from onnxcomp.graph.opset import standard_opset
from onnxcomp.graph.prepare import prepare
from onnxcomp.graph.sites import find_sites
from onnxcomp.report.json import from_json
from onnxcomp.report.model import Report
from onnxcomp.report.results import Count, FoundSite, Inspection

REPORT_KEY = "onnxcomp.report"


def inspect(path: str | Path) -> Inspection:
    """Read the file at `path`.

    Raises ModelError for a file that is no ONNX model.
    """
    model = files.load(path)
    graph = to_graph(model)
    size = files.size(path)
    counts = Counter(node.op for node in graph.nodes)
    operators = tuple(Count(op, n) for op, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])))
    quantization = tuple(count for count in operators if _quantizes(count.op))
    notes: list[str] = []
    report = _stored_report(files.metadata(model), size, notes)
    sites: tuple[FoundSite, ...] = ()
    if report is None and not quantization:
        sites = _sites(_prepared(model, graph, notes))
    return Inspection(
        path=str(path),
        file_bytes=size,
        producer=f"{model.producer_name} {model.producer_version}".strip(),
        opset=standard_opset(model),
        domains=tuple(f"{o.domain} {o.version}" for o in model.opset_import if o.domain not in ("", "ai.onnx")),
        inputs=tuple(_port(tensor) for tensor in graph.inputs),
        outputs=tuple(_port(tensor) for tensor in graph.outputs),
        parameters=sum(math.prod(tensor.dims) for tensor in model.graph.initializer),
        operators=operators,
        quantization=quantization,
        sites=sites,
        report=report,
        notes=tuple(notes),
    )


def _stored_report(metadata: dict[str, str], size: int, notes: list[str]) -> Report | None:
    if REPORT_KEY not in metadata:
        return None
    try:
        return dataclasses.replace(from_json(metadata[REPORT_KEY]), output_bytes=size)
    except ModelError as error:
        notes.append(str(error))
        return None


def _prepared(model: files.ModelProto, graph: Graph, notes: list[str]) -> Graph:
    """The graph that `quantize` would work on; the file's own where it cannot be brought to that form."""
    try:
        return prepare(model, runtime.infer_types).graph
    except ModelError as error:
        notes.append(f"This model cannot be quantized as it is. {error}")
        return graph


def _sites(graph: Graph) -> tuple[FoundSite, ...]:
    tensors = graph.tensors()
    found = []
    for site in find_sites(graph):
        shape = None if site.weight is None else tuple(int(n) for n in tensors[site.weight].shape)
        found.append(FoundSite(site.name, site.op, site.kind, shape))
    return tuple(found)


def _quantizes(op: str) -> bool:
    return (
        "quantize" in op.lower() or op.startswith(("QLinear", "QGemm")) or op.endswith(("Integer", "IntegerToFloat", "NBits"))
    )


def _port(tensor: Any) -> str:
    kind = np.dtype(tensor.dtype).name if isinstance(tensor.dtype, type | np.dtype) else str(tensor.dtype)
    if tensor.shape is None:
        return f"{tensor.name} {kind} of unknown rank"
    return f"{tensor.name} {kind}[{', '.join('?' if n is None else str(n) for n in tensor.shape)}]"
