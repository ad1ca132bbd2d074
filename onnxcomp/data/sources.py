"""Where arrays come from: .npz and .npy files, image files, Python objects. Nothing here knows the model.

A .npy, the bytes of an image and a large array of a .npz are mapped where they lie, and if the .npz is compressed, in a
temporary file that has no name and so is gone with the process. Pickled objects are never loaded.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import struct
import tempfile
import tokenize
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import EllipsisType
from typing import IO

import numpy as np

from onnxcomp.errors import DataError, ResourceError

Feed = dict[str, np.ndarray]
IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
TYPES = (".npz", ".npy", *IMAGE_TYPES)
MAPPED_BYTES = 1 << 24
"""From which an array of a .npz is not read into memory."""
Row = slice | int | EllipsisType
"""Where a row lies in arrays; `...` if all of them are one row as they are, a number where they are stacks of whole feeds."""


@dataclass(frozen=True, eq=False)
class Part:
    """Arrays of one origin, loaded when asked for, by the names they are stored under."""

    where: str
    """What errors call it: a file by its path."""
    load: Callable[[], Feed]
    rows: Sequence[Row] = ()
    labels: np.ndarray | None = None


def open_source(source: object) -> Iterator[Part]:
    """The parts of a path, of arrays, of an iterable of feeds, or of a callable that returns one."""
    if isinstance(source, str | os.PathLike):
        yield from (Part(str(file), partial(read_arrays, file)) for file in _list_files(Path(source)))
    elif isinstance(source, Mapping) or hasattr(source, "__array__"):
        yield Part("data", _as_feed(source, "data").copy)
    else:
        for number, feed in enumerate(_as_feeds(source() if callable(source) else source)):
            kept = {key: array.copy() for key, array in feed.items()}  # a generator may fill one buffer again and again
            yield Part(f"feed {number}", kept.copy)


def _list_files(path: Path) -> list[Path]:
    """A file itself; of a folder, or else of its subfolder `images`, the arrays or the images by name."""
    if not path.exists():
        raise DataError(f"{path}: no such file or folder.")
    if not path.is_dir():
        return [path]
    files = [file for file in sorted(path.iterdir()) if file.suffix.lower() in TYPES and not file.name.startswith(".")]
    if not files and (path / "images").is_dir():
        return _list_files(path / "images")
    first = {file.suffix.lower() in IMAGE_TYPES: file.name for file in reversed(files)}
    if len(first) != 1:
        found = " and ".join(sorted(first.values())) or "none"
        raise DataError(f"{path}: expected a folder of arrays or one of images ({', '.join(TYPES)}), found {found}.")
    return files


def read_arrays(path: Path) -> Feed:
    """The arrays of a file by name; that of a .npy is called `array`, and an image is the bytes of its file as one void."""
    kind = path.suffix.lower()
    if kind not in TYPES:
        raise DataError(f"{path}: unknown file type '{kind}'. Give one of {', '.join(TYPES)}.")
    try:
        if kind == ".npy":
            return {"array": np.lib.format.open_memmap(path, mode="r")}
        if kind in IMAGE_TYPES:
            return {"image": np.memmap(path, f"V{path.stat().st_size}", "r")}
        with zipfile.ZipFile(path) as archive:
            return {info.filename.removesuffix(".npy"): _read_member(path, archive, info) for info in archive.infolist()}
    except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error, tokenize.TokenError) as error:
        raise DataError(f"{path}: cannot be read as a {kind} file ({' '.join(str(error).split())}).") from error


def _read_member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """An array of a .npz, every byte of which has been looked at once: zipfile compares a checksum."""
    with archive.open(info.filename) as stream:
        if info.file_size < MAPPED_BYTES:
            return np.lib.format.read_array(stream, allow_pickle=False)
        is_packed, start = info.compress_type != zipfile.ZIP_STORED, 0
        with _unpacked(stream, path) if is_packed else path.open("rb") as file:
            if not is_packed:
                deque(iter(partial(stream.read, 1 << 20), b""), maxlen=0)
                file.seek(info.header_offset + 26)
                start = info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
            file.seek(start)
            version_1 = np.lib.format.read_magic(file) == (1, 0)
            header = np.lib.format.read_array_header_1_0 if version_1 else np.lib.format.read_array_header_2_0
            shape, is_fortran, dtype = header(file)
            if dtype.hasobject or file.tell() + math.prod(shape) * dtype.itemsize != start + info.file_size:
                raise ValueError(f"{info.filename} holds objects, or not what its header says")
            return np.asarray(np.memmap(file, dtype, "r", file.tell(), shape, "F" if is_fortran else "C"))


@contextmanager
def _unpacked(stream: IO[bytes], path: Path) -> Iterator[IO[bytes]]:
    """A temporary file with what the stream of the file at `path` holds. Raises ResourceError where there is no room for it."""
    try:
        with tempfile.TemporaryFile() as file:
            shutil.copyfileobj(stream, file)
            yield file
    except OSError as error:
        text = f"{tempfile.gettempdir()} cannot hold {path} unpacked: {(error.strerror or str(error)).lower()}."
        raise ResourceError(f"{text} Point $TMPDIR to a folder on a larger disk.") from error


def _as_feeds(items: object) -> Iterator[Feed]:
    if not isinstance(items, Iterable):
        raise DataError(f"data: expected a path, arrays, or an iterable of feeds, found {type(items).__name__}.")
    return (_as_feed(item, f"feed {number}") for number, item in enumerate(items))


def _as_feed(item: object, where: str) -> Feed:
    arrays = item if isinstance(item, Mapping) else {"array": item}
    for value in arrays.values():
        if not hasattr(value, "__array__") and not isinstance(value, int | float):
            raise DataError(f"{where}: expected an array or a dict of arrays by input name, found {type(value).__name__}.")
    return {str(key): np.asarray(value) for key, value in arrays.items()}


def digest(feeds: Iterable[Feed], title: str = "") -> str:
    """sha256 over the names, types, shapes and values of feeds, in order."""
    total = hashlib.sha256(title.encode())
    for feed in feeds:
        for name, array in feed.items():
            total.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
            total.update(array.tobytes())
    return total.hexdigest()
