"""Open a source and make its samples on demand: which rows make a sample, which are kept, which label is whose."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import EllipsisType
from typing import overload

import numpy as np

from onnxcomp.data import labels as label_sources
from onnxcomp.data.inputs import Inputs, InputSpec
from onnxcomp.data.sources import (
    ARRAY_TYPES,
    IMAGE_TYPES,
    LABEL_KEYS,
    ArrayFile,
    ArrayLike,
    Feed,
    Held,
    ImageFile,
    Part,
    Replay,
    Store,
    as_feed,
    keep_feeds,
    list_folder,
)
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
        where, path = str(source), Path(source)
        parts = _open_path(path, model)
        labels = label_sources.find_beside(path, parts) if labels is None else labels
    else:
        where, parts = "data", _open_object(source, model)
    group = _group(parts, model)
    rows = sum(part.rows for part in parts)
    total = rows // group
    if total == 0:
        found = f"found {rows} rows for a model whose batch is fixed at {group}" if rows else "found none"
        raise DataError(f"{where}: expected at least one sample, {found}.")
    chosen = np.arange(total)
    if limit is not None and limit < total:
        chosen = np.sort(np.random.default_rng(seed).permutation(total)[:limit])
    by_row = label_sources.join(parts) if labels is None else label_sources.given(labels, parts)
    if by_row is not None and group > 1:
        by_row = by_row[: total * group].reshape(total, group, *by_row.shape[1:])
    samples = Samples(model, parts, group, chosen)
    samples.make(0)
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
        feed = self.make(index)
        for name, array in feed.items():
            count = int(array.size - np.isfinite(array).sum()) if array.dtype.kind == "f" else 0
            if count > 0:
                raise DataError(
                    f"{self._where(index)}, input '{name}': expected finite numbers, found {count} NaN or Inf among "
                    f"{array.size}. Repair or remove the sample."
                )
        return feed

    def make(self, index: int) -> Feed:
        """Sample `index`, checked for everything but NaN and Inf."""
        where = self._where(index)
        pieces: list[Feed] = []
        for part, stored in self._rows(index):
            if isinstance(part.store, ImageFile):
                pixels = decode_image(stored[part.store.name].tobytes(), self._model.color, where)
                stored = {part.store.name: pixels[None]}
            pieces.append(self._model.convert(stored, where, is_whole=part.is_whole))
        if len(pieces) == 1:
            return pieces[0]
        for name in pieces[0]:
            shapes = {piece[name].shape[1:] for piece in pieces}
            if len(shapes) > 1:
                found = ", ".join(str(list(shape)) for shape in sorted(shapes))
                raise DataError(f"{where}, input '{name}': expected rows of one shape in a batch, found {found}.")
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}

    def digest(self) -> str:
        """sha256 of the stored form of these samples, in order."""
        total = hashlib.sha256(f"preprocess {self._model.preprocess}\n".encode())
        for index in range(len(self)):
            for _, stored in self._rows(index):
                for name, array in stored.items():
                    total.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
                    total.update(array.tobytes())
        return total.hexdigest()

    def _rows(self, index: int) -> Iterator[tuple[Part, Feed]]:
        sample = int(self._chosen[index])
        for row in range(sample * self._group, (sample + 1) * self._group):
            number = int(np.searchsorted(self._ends, row, side="right"))
            part = self._parts[number]
            if self._held is None or self._held[0] != number:
                self._held = None  # so that two files are never held at once
                self._held = number, part.store.load(part.keys.values())
            local = row - int(self._ends[number]) + part.rows
            yield part, self._select(part, self._held[1], ... if part.is_whole else slice(local, local + 1))

    def _select(self, part: Part, arrays: Feed, rows: slice | EllipsisType) -> Feed:
        """Rows as stored, each array with its batch axis; of an image, the encoded bytes."""
        if isinstance(part.store, ImageFile):
            return arrays
        found = {spec: arrays[part.keys[spec.name]] for spec in self._model.specs}
        return {spec.name: self._model.add_batch_axis(spec, array)[rows] for spec, array in found.items()}

    def _where(self, index: int) -> str:
        sample = int(self._chosen[index])
        part = self._parts[int(np.searchsorted(self._ends, sample * self._group, side="right"))]
        return f"{part.store.where}: sample {sample}"


def _group(parts: Sequence[Part], model: Inputs) -> int:
    """Rows a sample takes."""
    whole = [part.store.where for part in parts if part.is_whole]
    if model.batch is None or model.batch == 1 or len(whole) == len(parts):
        return 1
    if whole:
        raise DataError(f"{whole[0]}: expected inputs that share their rows, as elsewhere, found different lengths.")
    return model.batch


def _open_path(path: Path, model: Inputs) -> list[Part]:
    if not path.exists():
        raise DataError(f"{path}: no such file or folder.")
    files = list_folder(path) if path.is_dir() else [path]
    kind = files[0].suffix.lower()
    if kind in ARRAY_TYPES:
        return [_part(ArrayFile(file), model) for file in files]
    if kind not in IMAGE_TYPES:
        raise DataError(f"{path}: unknown file type '{kind}'. Give a .npz, a .npy, or a folder of these or of images.")
    if len(model.specs) != 1:
        names = ", ".join(model.names)
        raise DataError(f"{path}: images cannot feed the {len(model.names)} inputs {names}. Give .npz files.")
    name = model.names[0]
    return [Part(ImageFile(file, name), {name: name}, 1) for file in files]


def _open_object(source: object, model: Inputs) -> list[Part]:
    if isinstance(source, Mapping | ArrayLike):
        return [_part(Held("data", as_feed(source, model.names, "data")), model)]
    if isinstance(source, Iterable):
        return [_part(store, model, is_feed=True) for store in keep_feeds(source, model.names)]
    if isinstance(source, Callable):
        return [_part(store, model, is_feed=True) for store in Replay(source, model.names).stores()]
    raise DataError(f"data: expected a path, arrays, or an iterable of feeds, found {type(source).__name__}.")


def _part(store: Store, model: Inputs, *, is_feed: bool = False) -> Part:
    headers = store.headers()
    label_keys = [key for key in headers if key in LABEL_KEYS and key not in model.names]
    if len(label_keys) > 1:
        raise DataError(f"{store.where}: expected one array of labels, found {', '.join(label_keys)}. Keep one.")
    keys = model.match_names([key for key in headers if key not in label_keys], store.where, is_exact=is_feed)
    found = {name: headers[key] for name, key in keys.items()}
    counted = model.count_rows(found, store.where, is_feed=is_feed)
    is_whole, rows = counted is None, 1 if counted is None else counted
    labels = store.load(label_keys)[label_keys[0]] if label_keys else None
    if labels is not None and (is_whole or labels.ndim == 0):
        labels = labels.reshape(1) if labels.size == 1 else labels[None]
    if labels is not None and len(labels) != rows:
        raise DataError(f"{store.where}: expected {rows} labels, one a row, found {len(labels)} in '{label_keys[0]}'.")
    return Part(store, keys, rows, is_whole, labels)
