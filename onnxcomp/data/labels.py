"""Labels: one for each row of the data, from the source itself, an array, a file of arrays or a `file,label` CSV."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from onnxcomp.data.sources import ARRAY_TYPES, LABEL_KEYS, ArrayFile, Header, ImageFile, Part, reading
from onnxcomp.errors import DataError


def find_beside(path: Path, parts: Sequence[Part]) -> Path | None:
    """The `labels.csv` in a folder of images."""
    found = path / "labels.csv"
    return found if found.is_file() and all(isinstance(part.store, ImageFile) for part in parts) else None


def join(parts: Sequence[Part]) -> np.ndarray | None:
    """The labels stored with the samples. Raises DataError if only some have them, or their shapes differ."""
    found = [part.labels for part in parts if part.labels is not None]
    if not found:
        return None
    for part in parts:
        if part.labels is None:
            raise DataError(f"{part.store.where}: expected labels, as {len(found)} of {len(parts)} have, found none.")
        if part.labels.shape[1:] != found[0].shape[1:]:
            shapes = f"{list(found[0].shape[1:])}, found {list(part.labels.shape[1:])}"
            raise DataError(f"{part.store.where}: expected each label of shape {shapes}.")
    return _check(np.concatenate(found), "labels", sum(part.rows for part in parts))


def given(labels: str | os.PathLike[str] | np.ndarray, parts: Sequence[Part]) -> np.ndarray:
    """The labels that the user gave. Raises DataError if they cannot be read or are not one a row."""
    rows = sum(part.rows for part in parts)
    if isinstance(labels, np.ndarray):
        return _check(labels, "labels", rows)
    files = [part.store.path for part in parts if isinstance(part.store, ImageFile | ArrayFile) and part.rows == 1]
    return _check(_read(Path(labels), files if len(files) == len(parts) else None), str(labels), rows)


def _check(labels: np.ndarray, where: str, rows: int) -> np.ndarray:
    found = Header(labels.dtype, labels.shape)
    if labels.shape[:1] != (rows,):
        raise DataError(f"{where}: expected {rows} labels, one a row, found {found}.")
    if labels.dtype.kind not in "iufb":
        raise DataError(f"{where}: expected numbers as labels, found {found}.")
    return np.array(labels)


def _read(path: Path, files: Sequence[Path] | None) -> np.ndarray:
    if not path.is_file():
        raise DataError(f"{path}: no such label file.")
    kind = path.suffix.lower()
    if kind in ARRAY_TYPES:
        store = ArrayFile(path)
        keys = list(store.headers())
        named = keys if len(keys) == 1 else [key for key in keys if key in LABEL_KEYS]
        if len(named) != 1:
            names = f"{', '.join(LABEL_KEYS)}, found {', '.join(keys) or 'none'}"
            raise DataError(f"{path}: expected one array, or one of the arrays called {names}.")
        return store.load(named)[named[0]]
    if kind != ".csv":
        raise DataError(f"{path}: unknown label file type '{kind}'. Give a .npy, a .npz, or a .csv of file,label.")
    if files is None:
        raise DataError(f"{path}: names files, but the samples are not one file each. Give the labels as .npy.")
    table = _read_table(path)
    missing = [file.name for file in files if file.name not in table]
    if missing:
        found = f"{len(files) - len(missing)}, none for {missing[0]}"
        raise DataError(f"{path}: expected a label for each of {len(files)} files, found {found}.")
    labels = [table[file.name] for file in files]
    return np.array(labels, np.int64 if all(isinstance(label, int) for label in labels) else np.float64)


def _read_table(path: Path) -> dict[str, int | float]:
    """Labels by file name without its folder. A first row whose label is no number is the header."""
    with reading(path), path.open(newline="", encoding="utf-8-sig") as stream:
        rows = [(number, row) for number, row in enumerate(csv.reader(stream), 1) if row]
    table: dict[str, int | float] = {}
    for index, (number, row) in enumerate(rows):
        label = _parse_number(row[1]) if len(row) > 1 else None
        if label is not None:
            table[PurePosixPath(row[0].strip().replace("\\", "/")).name] = label
        elif index > 0 or len(row) < 2:
            raise DataError(f"{path}: line {number}: expected file,label with a number, found '{','.join(row)}'.")
    return table


def _parse_number(text: str) -> int | float | None:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return None
