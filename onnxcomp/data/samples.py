"""Open a source and make its samples on demand: which rows make a sample, which are kept, which label is whose."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from onnxcomp.data.inputs import LABEL_KEYS, Inputs, InputSpec
from onnxcomp.data.sources import Feed, Part, Row, digest, open_source, read_arrays
from onnxcomp.errors import DataError, UsageError
from onnxcomp.numerics.arrays import describe
from onnxcomp.preprocess import Preprocess


def open_data(
    source: object, inputs: Sequence[InputSpec], *, preprocess: Preprocess | None = None,
    labels: str | os.PathLike[str] | np.ndarray | None = None, limit: int | None = None, seed: int = 0,
    skip: int = 0,
) -> Data:  # fmt: skip
    """Open `source` as samples for a model that takes `inputs`.

    preprocess  used on image files, and on uint8 arrays [N, H, W, C] or [N, H, W] for inputs of rank 4
    labels      an array, .npy or .npz with one label a row, or a `file,label` CSV; replaces labels found in the source
    limit       keep this many samples, the first of a seeded permutation, in their original order

    skip        leave out those that a limit of so many keeps

    Raises DataError if the data cannot be read or do not fit, UsageError for a limit below 1.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"the number of samples must be at least 1, found {limit}.")
    model = Inputs(tuple(inputs), preprocess)
    parts = [_look(part, model) for part in open_source(source)]
    rows = [(part, row) for part in parts for row in part.rows]
    batch = model.batch or 1 if all(isinstance(row, slice) for _, row in rows) else 1
    total = len(rows) // batch
    if total == 0:
        where = source if isinstance(source, str | os.PathLike) else "data"
        raise DataError(f"{where}: expected at least one sample of batch {batch}, found {len(rows)} rows.")
    if labels is None and isinstance(source, str | os.PathLike) and (Path(source) / "labels.csv").is_file():
        labels = Path(source) / "labels.csv"
    found = _join_labels(parts) if labels is None else _read_labels(labels, parts)
    if found is not None and batch > 1:
        found = found[: total * batch].reshape(total, batch, *found.shape[1:])
    chosen = np.sort(np.random.default_rng(seed).permutation(total)[skip:][:limit])
    places = [(f"sample {i}", rows[i * batch : (i + 1) * batch]) for i in chosen]
    data = Data(model, places, None if found is None else found[chosen])
    _ = data[0]
    return data


def _look(part: Part, model: Inputs) -> Part:
    """The part with what its arrays say, which are not kept: one file at a time is held."""
    feed, labels = model.arrange(part.load(), part.where)
    rows = model.rows(feed, part.where)
    if labels is not None and len(rows) == 1 and labels.shape[:1] != (1,):
        labels = labels[None]
    return replace(part, rows=rows, labels=labels)


@dataclass(eq=False)
class Data(Sequence[Feed]):
    """Samples: feeds by input name, each array with its batch axis, made anew on every access; there are no slices.

    Every float is finite, or DataError names the sample (counted over the whole source) and the input.
    """

    model: Inputs
    places: Sequence[tuple[str, Sequence[tuple[Part, Row]]]]
    """What errors call each sample, and its rows."""
    labels: np.ndarray | None
    """`labels[i]` belongs to sample `i`, an array [B] if the batch is fixed at B; None if there are none."""
    _held: tuple[Part, Feed] | None = field(default=None, init=False)
    """The part that was read last, and its arrays."""

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[Feed]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Feed:  # pyright: ignore[reportIncompatibleMethodOverride]
        name, rows = self.places[index]
        return self.model.fit([self._read(*row) for row in rows], f"{rows[0][0].where}: {name}")

    @property
    def is_cut(self) -> bool:
        """Whether samples are rows of larger arrays."""
        rows = self.places[0][1]
        return len(rows[0][0].rows) > len(rows) and isinstance(rows[0][1], slice)

    @cached_property
    def digest(self) -> str:
        """sha256 over the samples as stored (of an image, its file's bytes), input names and preprocess; no labels."""
        return digest((self._read(*row) for _, rows in self.places for row in rows), f"preprocess {self.model.preprocess}\n")

    def _read(self, part: Part, row: Row) -> Feed:
        """A row as stored, each array with its batch axis."""
        if self._held is None or self._held[0] is not part:
            self._held = None  # so that two files are never held at once
            self._held = part, self.model.arrange(part.load(), part.where)[0]
        return {name: array[row] for name, array in self._held[1].items()}


def _join_labels(parts: Sequence[Part]) -> np.ndarray | None:
    """The labels stored with the samples."""
    first = next((part.labels for part in parts if part.labels is not None), None)
    if first is None:
        return None
    return np.concatenate([_check(part.labels, len(part.rows), first, part.where) for part in parts])


def _read_labels(labels: str | os.PathLike[str] | np.ndarray, parts: Sequence[Part]) -> np.ndarray:
    """The labels that the user gave."""
    if isinstance(labels, np.ndarray):
        found = labels
    elif Path(labels).suffix.lower() == ".csv":
        found = _read_table(Path(labels), [Path(part.where).name for part in parts])
    else:
        arrays = read_arrays(Path(labels))
        named = [array for key, array in arrays.items() if key in LABEL_KEYS or len(arrays) == 1]
        if len(named) != 1:
            raise DataError(f"{labels}: expected one array, or one of {', '.join(LABEL_KEYS)}, found {', '.join(arrays)}.")
        found = np.array(named[0])
    return _check(found, sum(len(part.rows) for part in parts), found, "labels" if found is labels else str(labels))


def _check(labels: np.ndarray | None, rows: int, like: np.ndarray, where: str) -> np.ndarray:
    """The labels, which must be a number for each row, or an array as those of `like` are."""
    shape = (rows, *like.shape[1:])
    if labels is None or labels.shape != shape or labels.dtype.kind not in "iufb":
        found = "none" if labels is None else describe(labels.dtype, labels.shape)
        raise DataError(f"{where}: expected numbers of shape {list(shape)} as labels, one a row, found {found}.")
    return labels


def _read_table(path: Path, files: Sequence[str]) -> np.ndarray:
    """A label for each file, by its name without the folder; the header may be left out."""
    try:
        rows = [row for row in csv.reader(path.read_text("utf-8-sig").splitlines()) if row]
        table = {Path(name.strip()).name: float(label) for name, label in rows if label != "label"}
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected rows of file,label with a number: {error}.") from error
    missing = [name for name in files if name not in table]
    if missing:
        found = f"{len(files) - len(missing)}, none for {missing[0]}"
        raise DataError(f"{path}: expected a label for each of {len(files)} files, found {found}.")
    labels = np.array([table[name] for name in files])
    return labels.astype(np.int64) if np.all(labels % 1 == 0) else labels
