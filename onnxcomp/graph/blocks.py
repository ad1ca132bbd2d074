"""Blocks: stretches of the model from one tensor of the residual stream to the next, found without names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from onnxcomp.graph.sites import Site


@dataclass(frozen=True)
class Block:
    """A stretch of the model with one stream tensor in and one out. Tensor names are the float model's."""

    name: str
    inputs: tuple[str, ...]
    """What the stretch reads from outside it: the stream first, then side tensors such as an attention mask."""
    y: str
    """The stream tensor behind it."""
    channel_axis: int
    """The channel axis of x and y: 1 in a CNN, -1 elsewhere."""
    rank: int
    """Rank of x and y."""
    channels: tuple[int, int] = (0, 0)
    """Channels of x and of y."""
    strides: tuple[int, ...] = ()
    """By how much each spatial axis shrinks from x to y, in a CNN; empty elsewhere."""
    fixed_tokens: bool = False
    """Whether every axis of y but the first has the same length in every run, so that T of [N, T, C] is a constant."""
    last: Site | None = None
    """The layer whose output is added to the stream to give y, and read by nothing else: a bias of y may go into its."""
    macs: int = 0
    """Multiplications of its layers for one sample; filled in by the walk."""
    op: str = "block"
    kind: str = "block"
    """`block`, or `output` where it is the whole model."""

    @property
    def x(self) -> str:
        """The stream tensor in front of it."""
        return self.inputs[0]


def find_blocks(graph: gs.Graph, sites: Sequence[Site]) -> tuple[Block, ...]:
    """The blocks of the main graph around `sites`, in graph order; empty where there is no residual stream."""
    return ()
