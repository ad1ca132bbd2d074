"""Lint: what a runtime will refuse, compute in float or run slowly, of any ONNX file, node by node, with a remedy.

The rules are those that the target writes its own files by; see `onnxcomp.targets`.
Limits: the main graph only; types are those that ONNX Runtime infers, or those in the file where it cannot load it.
"""

from pathlib import Path

from onnxcomp import runtime, targets
from onnxcomp.errors import ModelError
from onnxcomp.graph import files
from onnxcomp.graph.convert import to_graph
from onnxcomp.graph.prepare import set_types, tidy_nodes
from onnxcomp.graph.sites import LAYER_OPS
from onnxcomp.report.model import Lint
from onnxcomp.targets.audit import check, foretell
from onnxcomp.targets.rules import maker


def lint(path: str | Path, target: str = "auto") -> Lint:
    """Judge the file at `path` by the rules of a target.

    Raises ModelError for a file that is no ONNX model, RecipeError for an unknown target.
    """
    judge, model, notes = targets.find(target), files.load(path), []
    tidy_nodes(model)
    graph = to_graph(model)
    try:
        set_types(graph, runtime.infer_types(model))
    except ModelError as error:
        notes.append(f"Types and shapes are those in the file. {error}")
    read = [n for n in graph.nodes if n.op in LAYER_OPS and any(maker(t) == "DequantizeLinear" for t in n.inputs)]
    layers = [*(n.name for n in read), *(n.name for n in graph.nodes if n.op == "MatMulInteger")]
    violations = check(graph, judge)
    return Lint(str(path), judge.name, violations, foretell(graph, violations, layers), tuple(notes))
