"""Labels: one for each row of the data, from the source itself, an array, a file of arrays or a `file,label` CSV."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from onnxcomp.data.sources import ARRAY_TYPES, LABEL_KEYS, Part, read_arrays, reading
from onnxcomp.errors import DataError


def join_labels(parts: Sequence[Part]) -> np.ndarray | None:
    """The labels stored with the samples. Raises DataError if only some have them, or their shapes differ."""
    found = [part.labels for part in parts if part.labels is not None]
    if not found:
        return None
    for part in parts:
        if part.labels is None:
            raise DataError(f"{part.where}: expected labels, as {len(found)} of {len(parts)} have, found none.")
        wanted, shape = list(found[0].shape[1:]), list(part.labels.shape[1:])
        if shape != wanted:
            raise DataError(f"{part.where}: expected each label of shape {wanted}, found {shape}.")
    return _check(np.concatenate(found), "labels", parts)


def read_labels(labels: str | os.PathLike[str] | np.ndarray, parts: Sequence[Part]) -> np.ndarray:
    """The labels that the user gave. Raises DataError if they cannot be read or are not one a row."""
    if isinstance(labels, np.ndarray):
        return _check(labels, "labels", parts)
    path = Path(labels)
    kind = path.suffix.lower()
    if not path.is_file():
        raise DataError(f"{path}: no such label file.")
    if kind in ARRAY_TYPES:
        return _check(_read_array(path), str(path), parts)
    if kind != ".csv":
        raise DataError(f"{path}: unknown label file type '{kind}'. Give a .npy, a .npz, or a .csv of file,label.")
    names = [part.where.name for part in parts if isinstance(part.where, Path) and part.rows == 1]
    if len(names) < len(parts):
        raise DataError(f"{path}: names files, but the samples are not one file each. Give the labels as .npy.")
    table = _read_table(path)
    missing = [name for name in names if name not in table]
    if missing:
        found = f"{len(names) - len(missing)}, none for {missing[0]}"
        raise DataError(f"{path}: expected a label for each of {len(names)} files, found {found}.")
    return np.array([table[name] for name in names])


def _check(labels: np.ndarray, where: str, parts: Sequence[Part]) -> np.ndarray:
    rows, found = sum(part.rows for part in parts), f"{labels.dtype}{list(labels.shape)}"
    if labels.shape[:1] != (rows,):
        raise DataError(f"{where}: expected {rows} labels, one a row, found {found}.")
    if labels.dtype.kind not in "iufb":
        raise DataError(f"{where}: expected numbers as labels, found {found}.")
    return np.array(labels)


def _read_array(path: Path) -> np.ndarray:
    keys = list(read_arrays(path))
    named = keys if len(keys) == 1 else [key for key in keys if key in LABEL_KEYS]
    if len(named) != 1:
        names = f"{', '.join(LABEL_KEYS)}, found {', '.join(keys) or 'none'}"
        raise DataError(f"{path}: expected one array, or one of the arrays called {names}.")
    return read_arrays(path, {"labels": named[0]})["labels"]


def _read_table(path: Path) -> dict[str, float]:
    """Labels by file name without its folder. A first row whose label is no number is the header."""
    table: dict[str, float] = {}
    with reading(path), path.open(newline="", encoding="utf-8-sig") as stream:
        lines = csv.reader(stream)
        for number, row in enumerate(filter(None, lines)):
            try:
                label = float(row[1])
                name = PurePosixPath(row[0].strip().replace("\\", "/")).name
                table[name] = int(label) if label.is_integer() else label
            except (IndexError, ValueError) as error:
                if number > 0 or len(row) < 2:
                    text = f"expected file,label with a number, found '{','.join(row)}'"
                    raise DataError(f"{path}: line {lines.line_num}: {text}.") from error
    return table
