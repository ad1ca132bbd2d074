"""Where arrays come from: .npz and .npy files, image files, Python objects. Nothing here knows the model.

Every source can be described before it is read: types and shapes stand in headers. A .npz is a zip archive of .npy
files; what it does not compress is mapped where it lies, so that opening a large set costs little and a row costs a
row. Pickled objects are never loaded.
"""

from __future__ import annotations

import hashlib
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Protocol, runtime_checkable

import numpy as np

from onnxcomp.errors import DataError

Feed = dict[str, np.ndarray]
Load = Callable[[Mapping[str, str]], Feed]
"""Gives arrays under new names, by the names they are stored under."""
ARRAY_TYPES = (".npz", ".npy")
IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
LABEL_KEYS = ("y", "label", "labels")

_UNREADABLE = (OSError, EOFError, ValueError, RuntimeError, struct.error, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True, eq=False)
class Part:
    """Arrays of one origin by input name, seen as rows; or an image, whose array is the bytes of its file."""

    where: str | Path
    """What errors call it: a file by its path."""
    load: Callable[[], Feed]
    rows: int
    is_whole: bool = False
    """All of it is one row, as it is."""
    labels: np.ndarray | None = None

    @property
    def is_image(self) -> bool:
        return isinstance(self.where, Path) and self.where.suffix.lower() in IMAGE_TYPES


@runtime_checkable
class ArrayLike(Protocol):
    """What numpy reads as an array: an ndarray, a torch or jax tensor on the CPU, a data frame."""

    def __array__(self) -> np.ndarray: ...


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what the readers of files raise into a DataError that names the file."""
    try:
        yield
    except _UNREADABLE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: cannot be read as a {path.suffix} file: {reason.removesuffix('.')}.") from error


def list_folder(folder: Path) -> list[Path]:
    """The array files or else the images of a folder (or of its subfolder `images`), by name."""
    arrays = _list_files(folder, ARRAY_TYPES)
    images = _list_files(folder, IMAGE_TYPES) or _list_files(folder / "images", IMAGE_TYPES)
    if arrays and images:
        found = f"{arrays[0].name} and {images[0].name}"
        raise DataError(f"{folder}: expected arrays or images, found both, {found}. Put them in separate folders.")
    if not arrays and not images:
        types = ", ".join((*ARRAY_TYPES, *IMAGE_TYPES))
        raise DataError(f"{folder}: expected a folder of arrays or of images ({types}), found none.")
    return arrays or images


def _list_files(folder: Path, types: tuple[str, ...]) -> list[Path]:
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return [file for file in files if file.suffix.lower() in types and file.is_file() and not file.name.startswith(".")]


def load_image(path: Path, name: str) -> Feed:
    """The bytes of an image file, as one row."""
    with reading(path):
        return {name: np.frombuffer(path.read_bytes(), np.uint8)[None]}


def read_arrays(path: Path, keys: Mapping[str, str] | None = None) -> Feed:
    """Arrays of a .npz or .npy under new names, by their own; that of a .npy is called as the file; mapped unless compressed.

    Without keys it is all of them, for their types and shapes: zeros that take no memory stand for compressed arrays.
    """
    with reading(path):
        if path.suffix.lower() == ".npy":
            return {name: _map_array(path, 0) for name in keys or [path.stem]}
        with zipfile.ZipFile(path) as archive:
            members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
            if keys is None:
                return {key: _read_member(path, archive, member, is_described=True) for key, member in members.items()}
            return {name: _read_member(path, archive, members[key]) for name, key in keys.items()}


def _read_member(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo, *, is_described: bool = False) -> np.ndarray:
    if member.compress_type == zipfile.ZIP_STORED:
        # A member's data follow its 30-byte local header and two fields whose lengths stand at its end.
        with path.open("rb") as stream:
            stream.seek(member.header_offset + 26)
            lengths = struct.unpack("<HH", stream.read(4))
        return _map_array(path, member.header_offset + 30 + sum(lengths))
    with archive.open(member) as stream:
        if not is_described:
            return np.lib.format.read_array(stream, allow_pickle=False)
        shape, _, dtype = _read_header(stream)
        return np.broadcast_to(np.zeros((), dtype), shape)


def _map_array(path: Path, offset: int) -> np.ndarray:
    with path.open("rb") as stream:
        stream.seek(offset)
        shape, is_fortran, dtype = _read_header(stream)
        if 0 in shape:
            return np.zeros(shape, dtype)
        return np.memmap(path, dtype, "r", offset=stream.tell(), shape=shape, order="F" if is_fortran else "C")


def _read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran order, and type of the .npy that starts at the stream's position."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read(stream)
    if dtype.hasobject:
        raise ValueError("it holds pickled Python objects, which are never loaded.")
    return shape, is_fortran, dtype


def as_feed(item: object, names: Sequence[str], where: str) -> Feed:
    """A dict of arrays, or one array for a model whose only input is `names[0]`, as a feed."""
    if isinstance(item, Mapping):
        for key, value in item.items():
            if not isinstance(value, ArrayLike | int | float):
                raise DataError(f"{where}, '{key}': expected an array, found {type(value).__name__}.")
        return {str(key): np.asarray(value) for key, value in item.items()}
    if not isinstance(item, ArrayLike):
        raise DataError(f"{where}: expected a dict of arrays by input name, or one array, found {type(item).__name__}.")
    if len(names) != 1:
        raise DataError(f"{where}: expected a dict of the inputs {', '.join(names)}, found one array.")
    return {names[0]: np.asarray(item)}


def rename(feed: Feed, keys: Mapping[str, str]) -> Feed:
    """Arrays of a feed under new names."""
    return {name: feed[key] for name, key in keys.items()}


def digest(feeds: Iterable[Feed], title: str = "") -> str:
    """sha256 over the names, types, shapes and values of feeds, in order."""
    total = hashlib.sha256(title.encode())
    for feed in feeds:
        for name, array in feed.items():
            total.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
            total.update(array.tobytes())
    return total.hexdigest()


class Replay:
    """The feeds of a callable: asking for an earlier one runs it anew, and it must give the same ones every time."""

    def __init__(self, start: Callable[[], object], names: Sequence[str]) -> None:
        self._start, self._names = start, names
        self._digests: list[str] = []
        self._feeds: Iterator[Feed] = iter(())
        self._next = 0

    def __iter__(self) -> Iterator[Feed]:
        """All feeds, of which digests are kept."""
        for feed in self._run():
            self._digests.append(digest([feed]))
            yield feed
        self._next = len(self._digests)

    def load(self, number: int, keys: Mapping[str, str]) -> Feed:
        """Arrays of feed `number`. Raises DataError if it is not what it was."""
        if number < self._next:
            self._feeds, self._next = self._run(), 0
        feed = next(islice(self._feeds, number - self._next, None), None)
        self._next = number + 1
        if feed is not None and digest([feed]) == self._digests[number]:
            return rename(feed, keys)
        raise DataError(
            f"feed {number}: expected the callable to give the same feeds on every pass, "
            f"found {'fewer feeds' if feed is None else 'other values'}. "
            "Seed it, or give its iterator, which is read once and kept."
        )

    def _run(self) -> Iterator[Feed]:
        items = self._start()
        if not isinstance(items, Iterable):
            raise DataError(f"data: expected the callable to return an iterator of feeds, found {type(items).__name__}.")
        return (as_feed(item, self._names, f"feed {number}") for number, item in enumerate(items))
