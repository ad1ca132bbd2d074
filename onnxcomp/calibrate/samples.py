"""The calibration samples on their way through the model: live activations, and the one way to look at them.

The store holds, for every batch of samples, the tensors alive at the current cut as the compressed model computes
them. `Cut.reduce` maps a function over the batches and merges the results in sample order; `Store.advance` runs one stretch of
the compressed model and drops what no later stretch reads. Batches are fixed at the start and independent of how many
threads or workers run them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

from onnxcomp.errors import DataError, ModelError
from onnxcomp.graph.blocks import Block
from onnxcomp.graph.convert import to_model
from onnxcomp.graph.edit import Graph, extract
from onnxcomp.graph.files import ModelProto, to_bytes
from onnxcomp.graph.sites import Site
from onnxcomp.methods.base import Array, S
from onnxcomp.runtime import Session

Feed = Mapping[str, Array]
P = TypeVar("P", Site, Block)


@dataclass
class LiveBatch:
    """A few samples that travel together: their numbers and the live tensors by name."""

    indices: tuple[int, ...]
    live: dict[str, Array]


@dataclass(frozen=True)
class BatchView:
    """What a method may read of one batch; computed when it is asked for."""

    indices: tuple[int, ...]
    live: Mapping[str, Array]
    runs: Mapping[str, SiteRun]

    def read(self, name: str) -> list[Array]:
        """The named read, one array per sample where the leading axis can be split evenly over the samples."""
        if name not in self.runs:
            return split(self.live[name], len(self.indices))
        return split(self.runs[name].compute(self.live), len(self.indices))


@dataclass(frozen=True)
class SiteRun:
    """A session that computes one tensor of a site from live tensors: `feeds` maps its inputs to live names."""

    session: Session
    feeds: Mapping[str, str]
    output: str

    def compute(self, live: Mapping[str, Array]) -> Array:
        """The tensor, of one batch."""
        return self.session.run({k: live[v] for k, v in self.feeds.items()}, [self.output])[self.output]


@dataclass(frozen=True)
class Cut:
    """The samples at one site: what `methods.base.Samples` promises."""

    batches: Sequence[LiveBatch]
    runs: Mapping[str, SiteRun] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Reads that are live tensors under another name: `xh` -> the site's input."""

    def reduce(self, fn: Callable[[BatchView], S], reads: frozenset[str]) -> S:
        """Map every batch with `fn` and merge in sample order."""
        assert reads <= self.runs.keys() | self.aliases.keys(), f"{sorted(reads)} are not all available here"
        total: S | None = None
        for batch in self.batches:
            live = dict(batch.live, **{alias: batch.live[name] for alias, name in self.aliases.items()})
            part = fn(BatchView(batch.indices, live, self.runs))
            total = part if total is None else total.merge(part)
        assert total is not None, "a store is never empty"
        return total


class Store:
    """The live activations of every sample at the current cut."""

    def __init__(self, feeds: Iterable[Feed], batchable: bool, batch_size: int = 8) -> None:
        self.batches = list(_batches(feeds, batch_size if batchable else 1))
        if not self.batches:
            raise DataError("The data hold no samples. Give at least one.")

    def advance(self, session: Session | None, needed: Collection[str], feeds: Mapping[str, str]) -> None:
        """Run one stretch on every batch and keep only the tensors in `needed`.

        `feeds` maps the session's inputs to live names. `session` is None for a stretch that computes nothing.
        """
        for batch in self.batches:
            if session is not None:
                batch.live.update(session.run({k: batch.live[v] for k, v in feeds.items()}))
            batch.live = {name: array for name, array in batch.live.items() if name in needed}

    def beside(self, name: str, run: SiteRun) -> list[LiveBatch]:
        """The batches with one more tensor beside the live ones, computed once for every sample."""
        return [LiveBatch(b.indices, {**b.live, name: run.compute(b.live)}) for b in self.batches]

    def update(self, name: str, run: SiteRun, also: Sequence[LiveBatch]) -> None:
        """Compute one live tensor anew, here and in the batches that lie beside these."""
        for batch, other in zip(self.batches, also, strict=True):
            batch.live[name] = other.live[name] = run.compute(batch.live)


def can_stack(session: Session, feeds: Sequence[Feed]) -> bool:
    """Whether samples may be run together along the leading axis: every input's is free and two samples agree with
    themselves alone. A model with a fixed batch inside, or one that mixes its samples, runs one at a time.
    """
    if len(feeds) < 2 or not all(t.shape and not isinstance(t.shape[0], int) for _, t in session.inputs):
        return False
    first, second = feeds[0], feeds[1]
    if any(first[name].shape != second[name].shape for name in first):
        return False
    alone = [session.run(first), session.run(second)]
    try:
        together = session.run({name: np.concatenate([first[name], second[name]]) for name in first})
    except ModelError:
        return False
    return all(_agree(split(together[name], 2), [outputs[name] for outputs in alone]) for name in together)


def confirm_tokens(
    graph: Graph, like: ModelProto, sites: Sequence[P], feeds: Sequence[Feed], *, stackable: bool
) -> tuple[P, ...]:
    """`sites`, with `fixed_tokens` only where running one sample and then two shows that y is [N, T, C] with the samples
    along the first axis: inferred shapes cannot tell [N, T, C] from [T, N, C].
    """
    asked = [site for site in sites if site.fixed_tokens]
    if not asked or all(isinstance(t.shape[0], int) for t in graph.inputs):
        return tuple(sites)
    kept: set[str] = set()
    if stackable:
        names = list(dict.fromkeys(site.y for site in asked))
        part = extract(graph, [t.name for t in graph.inputs], names)
        session = Session(to_bytes(to_model(part, like)))
        one, two = session.run(feeds[0]), session.run({k: np.concatenate([feeds[0][k], feeds[1][k]]) for k in feeds[0]})
        kept = {n for n in names if two[n].shape == (2 * one[n].shape[0], *one[n].shape[1:])}
    return tuple(replace(site, fixed_tokens=site.fixed_tokens and site.y in kept) for site in sites)


def _agree(parts: Sequence[Array], alone: Sequence[Array]) -> bool:
    """Equal up to the order of float32 sums: 1e-3 of the largest value is far above it and far below a mix-up."""
    if len(parts) != len(alone):
        return False
    return all(_equal(part, whole) for part, whole in zip(parts, alone, strict=True))


def _equal(part: Array, whole: Array) -> bool:
    largest = float(np.abs(whole[np.isfinite(whole)]).max(initial=0))
    return part.shape == whole.shape and np.allclose(part, whole, rtol=0, atol=1e-3 * largest + 1e-30, equal_nan=True)


def split(array: Array, samples: int) -> list[Array]:
    """Views of the samples in a batch along the leading axis; the whole where it cannot be split evenly."""
    if samples == 1 or array.ndim == 0 or array.shape[0] % samples:
        return [array]
    return list(array.reshape(samples, array.shape[0] // samples, *array.shape[1:]))


def _batches(feeds: Iterable[Feed], size: int) -> Iterable[LiveBatch]:
    """Runs of up to `size` feeds of equal shapes, stacked along the leading axis."""
    pending: list[tuple[int, Feed]] = []

    def shapes(feed: Feed) -> list[tuple[str, tuple[int, ...]]]:
        return [(name, array.shape) for name, array in feed.items()]

    def stacked() -> LiveBatch:
        names = pending[0][1]
        live = {name: np.concatenate([feed[name] for _, feed in pending]) for name in names}
        if len(pending) == 1:
            live = dict(pending[0][1])
        return LiveBatch(tuple(index for index, _ in pending), live)

    for index, feed in enumerate(feeds):
        if pending and (len(pending) == size or shapes(feed) != shapes(pending[0][1])):
            yield stacked()
            pending = []
        pending.append((index, feed))
    if pending:
        yield stacked()
