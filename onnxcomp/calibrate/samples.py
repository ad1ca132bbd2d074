"""The calibration samples on their way through the model, and the few operations on them.

A store holds, for every batch of samples, the tensors alive at the current cut as the compressed model computes them:

    advance   run one stretch of the compressed model and drop what no later stretch reads
    add       put one more tensor beside them
    cut       offer named reads of them, to `reduce`: a function mapped over the batches, the results added up
    first     what a function makes of the first batches

Nothing else looks at them, so they may lie in memory, in files (`calibrate.room`) or on other machines
(`calibrate.cluster`). Batches are fixed at the start, and results are added up in a tree over neighbours that is fixed with
them: the same bytes come out wherever the batches lie, and however many threads or workers run them.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from onnxcomp.calibrate.room import Room, Tensors
from onnxcomp.calibrate.work import Work
from onnxcomp.errors import DataError, ModelError
from onnxcomp.graph.blocks import Block
from onnxcomp.graph.convert import to_model
from onnxcomp.graph.edit import Graph, extract
from onnxcomp.graph.files import ModelProto
from onnxcomp.graph.mapped import embed
from onnxcomp.graph.sites import Site
from onnxcomp.methods.base import Array, S
from onnxcomp.numerics.arrays import energies, sqnr_db
from onnxcomp.runtime import Feed, Session, each

BATCH, BATCH_BYTES = 8, 1 << 23
"""Samples that travel together, fewer where the widest tensor of so many would take more bytes: of such batches a step works
on several at once, with copies of each.
"""
SAME_DB = 60.0
"""SQNR from which two runs of the same samples count as equal."""
P = TypeVar("P", Site, Block)


@dataclass
class LiveBatch:
    """A few samples that travel together: their numbers and the live tensors by name."""

    indices: tuple[int, ...]
    live: Mapping[str, Array]
    reads: Reads = field(default_factory=dict)
    """What is read under a name that is no live tensor's."""

    def read(self, name: str) -> list[Array]:
        """The named read, one array per sample where the leading axis can be split evenly over the samples."""
        source = self.reads.get(name, name)
        return split(self.live[source] if isinstance(source, str) else source.output(self.live), len(self.indices))

    def alone(self, names: Collection[str]) -> Iterator[LiveBatch]:
        """These live tensors of each sample, as a batch of its own; of all together where they cannot be split."""
        parts = {name: split(self.live[name], len(self.indices)) for name in names}
        if {len(found) for found in parts.values()} != {len(self.indices)}:
            return iter([LiveBatch(self.indices, {name: self.live[name] for name in parts})])
        rows = ({name: found[i] for name, found in parts.items()} for i in range(len(self.indices)))
        return (LiveBatch((index,), row) for index, row in zip(self.indices, rows, strict=True))

    def __sizeof__(self) -> int:
        """Bytes of the live tensors, by which a cluster plans."""
        return sum(array.nbytes for array in self.live.values())


@dataclass(frozen=True)
class Run:
    """What computes tensors from live ones: a model, whose inputs `feeds` maps to live names. Loaded where it is first run."""

    model: ModelProto
    feeds: Mapping[str, str]

    @functools.cached_property
    def session(self) -> Session:
        """The loaded model."""
        return Session(self.model, threads=1)

    def __getstate__(self) -> dict[str, Any]:
        """The model travels, with its weights; the session that has loaded it stays, and so do the files."""
        return {"model": embed(self.model), "feeds": self.feeds}

    def outputs(self, live: Mapping[str, Array]) -> dict[str, Array]:
        """The tensors, of one batch."""
        return self.session.run({k: live[v] for k, v in self.feeds.items()})

    def output(self, live: Mapping[str, Array]) -> Array:
        """The one tensor that it computes, of one batch."""
        (found,) = self.outputs(live).values()
        return found


Reads = Mapping[str, str | Run]
"""What each read is: a live tensor under its own name (`xh` -> the site's input), or what is computed when it is asked for."""


Compute = Callable[[Mapping[str, Array]], Mapping[str, Array]]
"""Takes the live tensors of a batch, and returns new ones."""


@dataclass(frozen=True)
class Cut:
    """The samples at one site, with what may be read there: what `methods.base.Samples` promises."""

    batches: Sequence[LiveBatch]
    reads: Reads

    @property
    def count(self) -> int:
        """How many samples there are."""
        return sum(len(batch.indices) for batch in self.batches)

    def reduce(self, fn: Callable[[LiveBatch], S]) -> S:
        """Map every batch with `fn` and add up the results, in sample order."""
        return combine(each(fn, (replace(batch, reads=self.reads) for batch in self.batches)))


class Store:
    """The live activations of every sample at the current cut, here: in the memory and the files of a `room`."""

    def __init__(self, feeds: Iterable[Feed], batchable: bool, batch_size: int = BATCH, work: Work | None = None) -> None:
        self._work = work or Work(Room())
        if self._work.live is None:
            found = batches(feeds, batchable, batch_size)
            self._batches = [replace(batch, live=self._work.room.take(batch.live)) for batch in found]
        else:
            self._batches = [LiveBatch(indices, Tensors(files)) for indices, files in self._work.live]
        if not self._batches:
            raise DataError("The data hold no samples. Give at least one.")

    def advance(self, run: Run | None, needed: Collection[str]) -> None:
        """Run one stretch on every batch, None if it computes nothing, and keep only the tensors in `needed`."""
        self._move(lambda live: {} if run is None else run.outputs(live), frozenset(needed))

    def add(self, name: str, run: Run) -> None:
        """Put one more tensor, or another value of one, beside the live ones until the next stretch."""
        self._move(lambda live: {name: run.output(live)}, None)

    def cut(self, reads: Reads) -> Cut:
        """The samples, with what may be read."""
        return Cut(self._batches, reads)

    def first(self, fn: Callable[[LiveBatch], S], count: int = 1) -> list[S]:
        """What `fn` makes of the first batches."""
        return list(each(fn, self._batches[:count]))

    def finish(self, name: str = "") -> None:
        """Keep what is needed to go on behind the step called `name`."""
        self._work.finish([(batch.indices, batch.live.kept) for batch in self._batches if isinstance(batch.live, Tensors)])

    def _move(self, compute: Compute, needed: Collection[str] | None) -> None:
        for number, new in enumerate(each(lambda batch: compute(batch.live), list(self._batches))):
            batch = self._batches[number]
            self._batches[number] = replace(batch, live=self._work.room.take(new, batch.live, needed))


def combine(parts: Iterable[S], add: Callable[[Any, Any], Any] = operator.add) -> S:
    """All parts added up in order: in pairs of neighbours, then in pairs of pairs and so on.

    So the sum of 2^k parts that begin at a multiple of 2^k is the same wherever it is made, and the order of all other
    additions does not depend on it.
    """
    sums: list[tuple[int, S]] = []
    for part in parts:
        size = 1
        while sums and sums[-1][0] == size:
            part, size = add(sums.pop()[1], part), 2 * size
        sums.append((size, part))
    return functools.reduce(lambda right, left: add(left, right), (part for _, part in reversed(sums)))


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


def stacking(session: Session, feeds: Sequence[Feed], *, is_cut: bool) -> tuple[bool, list[str]]:
    """Whether they `can_stack`; and what to say of rows that were cut from one array and look like steps of a sequence: each
    gives other results beside another than alone. Raises DataError where such a row cannot be run.
    """
    advice = "If the first axis of the data is no batch, stack whole feeds, with one axis more."
    try:
        found = can_stack(session, feeds)
    except ModelError as error:
        raise (DataError(f"{error} It was given one row of the data. {advice}") if is_cut else error) from error
    if found or not is_cut or len(feeds) < 2:
        return found, []
    try:
        first, second = feeds[0], feeds[1]
        session.run({name: np.concatenate([first[name], second[name]]) for name in first})
    except (ModelError, ValueError):
        return False, []
    return False, [f"A row of the data is a sample, and gives other results beside another than alone. {advice}"]


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
        session = Session(to_model(part, like))
        one, two = session.run(feeds[0]), session.run({k: np.concatenate([feeds[0][k], feeds[1][k]]) for k in feeds[0]})
        kept = {n for n in names if two[n].shape == (2 * one[n].shape[0], *one[n].shape[1:])}
    return tuple(replace(site, fixed_tokens=site.fixed_tokens and site.y in kept) for site in sites)


def _agree(parts: Sequence[Array], alone: Sequence[Array]) -> bool:
    """Equal up to the order of float32 sums, which leaves far more than `SAME_DB`; a mix-up leaves far less."""
    alike = [part.shape for part in parts] == [whole.shape for whole in alone]
    return alike and all(sqnr_db(*energies(whole, part)) > SAME_DB for part, whole in zip(parts, alone, strict=True))


def split(array: Array, samples: int) -> list[Array]:
    """Views of the samples in a batch along the leading axis; the whole where it cannot be split evenly."""
    if samples == 1 or array.ndim == 0 or array.shape[0] % samples:
        return [array]
    return list(array.reshape(samples, array.shape[0] // samples, *array.shape[1:]))


def batch_size(graph: Graph, feed: Feed) -> int:
    """How many samples like `feed` travel together, as far as the shapes in the graph are known."""
    lengths = {dim: n for t in graph.inputs for dim, n in zip(t.shape or (), feed[t.name].shape, strict=False)}
    shapes = [t.shape for node in graph.nodes for t in node.outputs if t.shape]
    widest = max(math.prod(n if isinstance(n, int) else lengths.get(n, 1) for n in shape) for shape in [(1,), *shapes])
    return min(max(BATCH_BYTES // (4 * widest), 1), BATCH)


def batches(feeds: Iterable[Feed], batchable: bool, size: int = BATCH) -> Iterator[LiveBatch]:
    """Runs of up to `size` feeds of equal shapes, stacked along the leading axis, or every feed alone."""
    for _, alike in itertools.groupby(enumerate(feeds), lambda pair: [(name, a.shape) for name, a in pair[1].items()]):
        while some := list(itertools.islice(alike, size if batchable else 1)):
            parts = [feed for _, feed in some]
            live = dict(parts[0]) if len(parts) == 1 else {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
            yield LiveBatch(tuple(index for index, _ in some), live)
