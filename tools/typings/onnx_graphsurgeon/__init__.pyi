"""What the project uses of onnx-graphsurgeon, with the types that its own annotations leave out."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx

from .ir.tensor import LazyValues

class Tensor:
    name: str
    inputs: list[Node]
    outputs: list[Node]
    dtype: Any
    shape: Any
    values: Any
    """Of a Constant only."""
    def is_empty(self) -> bool: ...
    def copy(self) -> Tensor: ...
    def to_constant(self, values: np.ndarray, data_location: int | None = ...) -> Constant: ...

class Variable(Tensor):
    def __init__(self, name: str, dtype: Any = ..., shape: Any = ..., type: str = ...) -> None: ...
    @staticmethod
    def empty() -> Variable: ...

class Constant(Tensor):
    _values: np.ndarray | LazyValues
    def __init__(
        self, name: str, values: np.ndarray | LazyValues, data_location: int | None = ..., export_dtype: Any = ...
    ) -> None: ...

class Node:
    """An operator; `OnnxExporter.export_node` takes one."""

    op: str
    name: str
    attrs: dict[str, Any]
    inputs: list[Tensor]
    outputs: list[Tensor]
    domain: str | None
    def __init__(
        self,
        op: str,
        name: str | None = ...,
        attrs: dict[str, Any] | None = ...,
        inputs: Sequence[Tensor] | None = ...,
        outputs: Sequence[Tensor] | None = ...,
        domain: str | None = ...,
    ) -> None: ...
    def subgraphs(self, recursive: bool = ...) -> Iterator[Graph]: ...
    def i(self, tensor_idx: int = ..., producer_idx: int = ...) -> Node: ...
    def o(self, consumer_idx: int = ..., tensor_idx: int = ...) -> Node: ...

class Graph:
    nodes: list[Node]
    inputs: list[Tensor]
    outputs: list[Tensor]
    name: str
    doc_string: str
    opset: int
    import_domains: Any
    functions: list[Any]
    ir_version: int | None
    def __init__(
        self,
        nodes: Sequence[Node] | None = ...,
        inputs: Sequence[Tensor] | None = ...,
        outputs: Sequence[Tensor] | None = ...,
        name: str | None = ...,
        doc_string: str | None = ...,
        opset: int | None = ...,
        import_domains: Any = ...,
        producer_name: str | None = ...,
        producer_version: str | None = ...,
        functions: Any = ...,
        ir_version: int | None = ...,
    ) -> None: ...
    def copy(self) -> Graph: ...
    def tensors(self, check_duplicates: bool = ...) -> dict[str, Tensor]: ...
    def cleanup(
        self,
        remove_unused_node_outputs: bool = ...,
        recurse_subgraphs: bool = ...,
        remove_unused_graph_inputs: bool = ...,
    ) -> Graph: ...
    def toposort(self) -> Graph: ...
    def subgraphs(self, recursive: bool = ...) -> Iterator[Graph]: ...

def import_onnx(model: onnx.ModelProto) -> Graph: ...
def export_onnx(graph: Graph, do_type_check: bool = ..., **attributes: Any) -> onnx.ModelProto: ...
