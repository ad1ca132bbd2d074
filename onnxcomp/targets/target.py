"""A target: one runtime, how it wants a quantized model written down, and the rules by which its files are judged.

A target plans *points* (activation quantizers on named tensors) around the chosen sites, and in the end lowers the abstract
quantizers of the compressed graph to the operators that its runtime runs fastest. Its rules are the same knowledge read
backwards: what is wrong with a file, ours or another's, node by node.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import final

from onnxcomp import runtime
from onnxcomp.graph.edit import Graph
from onnxcomp.graph.sites import Site
from onnxcomp.targets import lowering, regions
from onnxcomp.targets.base import Encoding, Plan, Rule, Settings
from onnxcomp.targets.settle import settle


@final
@dataclass(frozen=True)
class Target:
    """One runtime's rules."""

    name: str
    summary: str
    """What it is for, in a line."""
    encoding: Encoding
    needs: tuple[str, ...]
    """What its files need where they run, one sentence each."""
    packed_needs: tuple[str, ...] = ()
    """The same, of files whose weights are packed; in place of `needs` where there are any."""
    product_needs: tuple[str, ...] = ()
    """What files with products of codes need besides."""
    block_needs: tuple[str, ...] = ()
    """What files with weights in blocks need besides."""
    rules: tuple[Rule, ...] = ()
    """What is wrong with a node: refused, slower, or computed in float."""
    kernels: str = ""
    """The runtime that tells which kernels it executes, `onnxruntime`, `openvino` or `tensorrt`; where it is not installed, or
    there is none, the rules foretell them."""
    fixed: bool = False
    """Every axis has the length that it has in the first sample."""
    half: bool = False
    """Files may be float16 beside their codes."""
    oldest: bool = False
    """Files are written in the oldest opset that holds them."""

    def describe(self) -> str:
        """What it takes, in a line."""
        e = self.encoding
        kind = f"{'int8' if e.signed else 'uint8'}{' or uint16' if e.wide else ''}{', symmetric' if e.symmetric else ''}"
        weights = {"cast": "2 to 6 bits each", "native": "int4", "int8": "int8"}[e.packed]
        measured = ", ".join(["fixed", *e.run_time])
        weights += f", or in blocks of {', '.join(map(str, e.blocks))} beside float activations" if e.blocks else ""
        more = "; float16" if self.half else "; fixed shapes" if self.fixed else ""
        return f"activations {kind}, ranges {measured}; narrow weights stored as {weights}; bias {e.bias}{more}"

    def plan(
        self, graph: Graph, sites: Sequence[Site], settings: Mapping[str, Settings],
        wide: Mapping[str, Sequence[str]] = MappingProxyType({}),
    ) -> Plan:  # fmt: skip
        """Place the quantizers around `sites` in the float `graph`, which is only read; stored tensors that are `wide` have 16
        bits, also for the layers named there.
        """
        return regions.plan(graph, sites, settings, self.encoding, wide)

    def requirements(self, plan: Plan) -> tuple[str, ...]:
        """What the file needs where it runs."""
        widest = 6 if self.encoding.packed == "cast" else 4
        stored = [plan.settings[site.name] for site in plan.sites if site.weight is not None]
        is_cast = self.encoding.packed == "cast"  # where codes of 4 bits in blocks are not
        is_packed = any(s.weight_bits <= widest and not (is_cast and s.block and s.weight_bits == 4) for s in stored)
        needs = self.packed_needs if is_packed and self.packed_needs else self.needs
        multiplies = any(s.activations != "float" for s in plan.settings.values())
        needs = (*needs, *(self.product_needs if multiplies else ()))
        return (*needs, *(self.block_needs if any(s.block for s in stored) else ()))

    def is_exact_here(self) -> bool:
        """Whether the kernels of this CPU add up the products of its files right."""
        return self.encoding.saturates or not runtime.saturates()

    def proves_defaults(self, plan: Plan) -> bool:
        """Whether the file must compute the same with the defaults of the ONNX Runtime at hand: where that is what runs it, on
        a CPU like this one, and but for weights in blocks, beside which the defaults round activations to 8 bits.
        """
        is_here = self.kernels == "onnxruntime" and not self.encoding.signed and self.is_exact_here()
        return is_here and not any(settings.block for settings in plan.settings.values())

    def lower(self, graph: Graph) -> Graph:
        """Write the abstract quantizers of `graph` as standard operators. Changes `graph` and returns it."""
        lowering.lower(graph, self.encoding)
        self.settle(graph)
        return graph

    def settle(self, graph: Graph) -> None:
        """Bring a lowered `graph` into its last form, for the first time or after operators were taken out."""
        if self.encoding.fused:
            settle(graph, biased=self.encoding.biased)
