"""Open a source and make its samples on demand: which rows make a sample, which are kept, which label is whose."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import overload

import numpy as np

from onnxcomp.data import sources
from onnxcomp.data.inputs import Inputs, InputSpec
from onnxcomp.data.labels import join_labels, read_labels
from onnxcomp.data.sources import ARRAY_TYPES, IMAGE_TYPES, LABEL_KEYS, ArrayLike, Feed, Load, Part, Replay
from onnxcomp.errors import DataError, UsageError
from onnxcomp.preprocess import Preprocess, decode_image


@dataclass(frozen=True)
class Data:
    """Samples and, if known, labels: `labels[i]` belongs to `samples[i]`, an array [B] if the batch is fixed at B."""

    samples: Samples
    labels: np.ndarray | None

    def __len__(self) -> int:
        return len(self.samples)

    @cached_property
    def digest(self) -> str:
        """sha256 over the samples as stored (of an image, its file's bytes), input names and preprocess; no labels."""
        return self.samples.digest()


def open_data(
    source: object,
    inputs: Sequence[InputSpec],
    *,
    preprocess: Preprocess | None = None,
    labels: str | os.PathLike[str] | np.ndarray | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Data:
    """Open `source` as samples for a model that takes `inputs`.

    preprocess  used on image files, and on uint8 arrays [N, H, W, C] or [N, H, W] for float or uint8 inputs of rank 4
    labels      an array, .npy or .npz with one label a row, or a `file,label` CSV; replaces labels found in the source
    limit       keep this many samples, the first of a seeded permutation, in their original order

    Raises DataError if the data cannot be read or do not fit, UsageError for a limit below 1.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"the number of samples must be at least 1, found {limit}.")
    model = Inputs(tuple(inputs), preprocess)
    if isinstance(source, str | os.PathLike):
        where, parts = str(source), _open_path(Path(source), model)
        table = Path(source) / "labels.csv"
        if labels is None and parts[0].is_image and table.is_file():
            labels = table
    else:
        where, parts = "data", list(_open_object(source, model))
    group = _group(parts, model)
    rows = sum(part.rows for part in parts)
    total = rows // group
    if total == 0:
        found = f"found {rows} rows for a model whose batch is fixed at {group}" if rows else "found none"
        raise DataError(f"{where}: expected at least one sample, {found}.")
    chosen = np.sort(np.random.default_rng(seed).permutation(total)[:limit])
    by_row = join_labels(parts) if labels is None else read_labels(labels, parts)
    if by_row is not None and group > 1:
        by_row = by_row[: total * group].reshape(total, group, *by_row.shape[1:])
    samples = Samples(model, parts, group, chosen)
    _ = samples[0]
    return Data(samples, None if by_row is None else by_row[chosen])


class Samples(Sequence[Feed]):
    """Feeds by input name, each array with its batch axis, made anew on every access; a slice is as lazy.

    Every float is finite, or DataError names the sample (counted over the whole source) and the input.
    """

    def __init__(self, model: Inputs, parts: Sequence[Part], group: int, chosen: np.ndarray) -> None:
        self._model, self._parts, self._group, self._chosen = model, parts, group, chosen
        self._ends = np.cumsum([part.rows for part in parts])
        self._held: tuple[int, Feed] | None = None

    def __len__(self) -> int:
        return len(self._chosen)

    def __iter__(self) -> Iterator[Feed]:
        return (self[index] for index in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> Feed: ...
    @overload
    def __getitem__(self, index: slice) -> Samples: ...
    def __getitem__(self, index: int | slice) -> Feed | Samples:
        if isinstance(index, slice):
            return Samples(self._model, self._parts, self._group, self._chosen[index])
        where = self._where(index)
        color = self._model.preprocess.color if self._model.preprocess else "rgb"
        rows: list[Feed] = []
        for part, stored in self._read(index):
            if part.is_image:
                stored = {name: decode_image(encoded.tobytes(), color, where)[None] for name, encoded in stored.items()}
            rows.append(self._model.convert(stored, where, is_whole=part.is_whole))
        return {name: _join([row[name] for row in rows], f"{where}, input '{name}'") for name in self._model.names}

    def digest(self) -> str:
        """sha256 of the stored form of these samples, in order."""
        stored = (feed for index in range(len(self)) for _, feed in self._read(index))
        return sources.digest(stored, f"preprocess {self._model.preprocess}\n")

    def _read(self, index: int) -> Iterator[tuple[Part, Feed]]:
        """The rows of a sample as stored, each array with its batch axis."""
        start = int(self._chosen[index]) * self._group
        for row in range(start, start + self._group):
            number = self._part_of(row)
            part = self._parts[number]
            if self._held is None or self._held[0] != number:
                self._held = None  # so that two files are never held at once
                self._held = number, self._model.add_batch_axes(part.load())
            local = row - int(self._ends[number]) + part.rows
            chosen = ... if part.is_whole else slice(local, local + 1)
            yield part, {name: array[chosen] for name, array in self._held[1].items()}

    def _part_of(self, row: int) -> int:
        return int(np.searchsorted(self._ends, row, side="right"))

    def _where(self, index: int) -> str:
        sample = int(self._chosen[index])
        return f"{self._parts[self._part_of(sample * self._group)].where}: sample {sample}"


def _join(rows: Sequence[np.ndarray], where: str) -> np.ndarray:
    """The batch of these rows. Raises DataError if they differ in shape or hold NaN or Inf."""
    shapes = sorted({row.shape for row in rows})
    if len(shapes) > 1:
        found = ", ".join(str(list(shape[1:])) for shape in shapes)
        raise DataError(f"{where}: expected rows of one shape in a batch, found {found}.")
    x = rows[0] if len(rows) == 1 else np.concatenate(rows)
    count = np.count_nonzero(~np.isfinite(x)) if x.dtype.kind == "f" else 0
    if count:
        text = f"expected finite numbers, found {count} NaN or Inf among {x.size}. Repair or remove the sample."
        raise DataError(f"{where}: {text}")
    return x


def _open_path(path: Path, model: Inputs) -> list[Part]:
    if not path.exists():
        raise DataError(f"{path}: no such file or folder.")
    files = sources.list_folder(path) if path.is_dir() else [path]
    kind = files[0].suffix.lower()
    if kind in ARRAY_TYPES:
        return [_part(file, sources.read_arrays(file), partial(sources.read_arrays, file), model) for file in files]
    if kind not in IMAGE_TYPES:
        raise DataError(f"{path}: unknown file type '{kind}'. Give a .npz, a .npy, or a folder of these or of images.")
    if len(model.specs) != 1:
        names = ", ".join(model.names)
        raise DataError(f"{path}: images cannot feed the {len(model.names)} inputs {names}. Give .npz files.")
    return [Part(file, partial(sources.load_image, file, model.names[0]), rows=1) for file in files]


def _open_object(source: object, model: Inputs) -> Iterator[Part]:
    if isinstance(source, Mapping | ArrayLike):
        feed = sources.as_feed(source, model.names, "data")
        yield _part("data", feed, partial(sources.rename, feed), model)
    elif isinstance(source, Iterable):
        for number, item in enumerate(source):
            feed = sources.as_feed(item, model.names, f"feed {number}")
            if not isinstance(source, Sequence):  # a generator may fill one buffer again and again
                feed = {key: array.copy() for key, array in feed.items()}
            yield _part(f"feed {number}", feed, partial(sources.rename, feed), model, is_feed=True)
    elif isinstance(source, Callable):
        replay = Replay(source, model.names)
        for number, feed in enumerate(replay):
            yield _part(f"feed {number}", feed, partial(replay.load, number), model, is_feed=True)
    else:
        raise DataError(f"data: expected a path, arrays, or an iterable of feeds, found {type(source).__name__}.")


def _part(where: str | Path, found: Feed, load: Load, model: Inputs, *, is_feed: bool = False) -> Part:
    """Arrays as rows; `found` has their types and shapes, and of a feed their values too."""
    label_keys = [key for key in found if key in LABEL_KEYS and key not in model.names]
    if len(label_keys) > 1:
        raise DataError(f"{where}: expected one array of labels, found {', '.join(label_keys)}. Keep one.")
    keys = model.match_names([key for key in found if key not in label_keys], str(where), is_exact=is_feed)
    counted = model.count_rows({name: found[key] for name, key in keys.items()}, str(where), is_feed=is_feed)
    is_whole, rows = counted is None, 1 if counted is None else counted
    labels = None
    for key in label_keys:
        labels = np.array((found if is_feed else load({key: key}))[key])
        if is_whole or labels.ndim == 0:
            labels = labels.reshape(1) if labels.size == 1 else labels[None]
        if len(labels) != rows:
            raise DataError(f"{where}: expected {rows} labels, one a row, found {len(labels)} in '{key}'.")
    return Part(where, partial(load, keys), rows, is_whole, labels)


def _group(parts: Sequence[Part], model: Inputs) -> int:
    """Rows a sample takes."""
    whole = [part.where for part in parts if part.is_whole]
    if model.batch is None or model.batch == 1 or len(whole) == len(parts):
        return 1
    if whole:
        raise DataError(f"{whole[0]}: expected inputs that share their rows, as elsewhere, found different lengths.")
    return model.batch
