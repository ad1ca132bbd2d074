"""Where arrays come from: .npz and .npy files, image files, Python objects. Nothing here knows the model.

A *store* tells the types and shapes of its arrays before it reads them. A .npz is a zip archive with one .npy in it
for each array; headers are read alone, and arrays that are not compressed are mapped where they lie, so that opening a
large set costs little and a row costs a row. Pickled objects are never loaded.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol, runtime_checkable

import numpy as np

from onnxcomp.errors import DataError

Feed = dict[str, np.ndarray]
Shape = tuple[int, ...]
ARRAY_TYPES = (".npz", ".npy")
IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
LABEL_KEYS = ("y", "label", "labels")

_UNREADABLE = (OSError, EOFError, ValueError, RuntimeError, struct.error, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class Header:
    """Type and shape of a stored array."""

    dtype: np.dtype
    shape: Shape

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


class Store(Protocol):
    """Named arrays that can be described before they are read."""

    @property
    def where(self) -> str:
        """What errors call this store."""
        ...

    def headers(self) -> dict[str, Header]: ...

    def load(self, keys: Iterable[str]) -> Feed: ...


@dataclass(frozen=True)
class Part:
    """A store or image seen as rows: `keys` maps input names to its arrays; `is_whole`: all of it is the only row."""

    store: Store | ImageFile
    keys: Mapping[str, str]
    rows: int
    is_whole: bool = False
    labels: np.ndarray | None = None


@dataclass(frozen=True)
class ArrayFile:
    """A .npz, or a .npy, whose one array is called by the file's stem."""

    path: Path

    @property
    def where(self) -> str:
        return str(self.path)

    def headers(self) -> dict[str, Header]:
        with reading(self.path):
            if self.path.suffix.lower() == ".npy":
                with self.path.open("rb") as stream:
                    return {self.path.stem: _read_header(stream)[0]}
            with zipfile.ZipFile(self.path) as archive:
                return {_key(member): _member_header(archive, member) for member in archive.infolist()}

    def load(self, keys: Iterable[str]) -> Feed:
        with reading(self.path):
            if self.path.suffix.lower() == ".npy":
                return {key: _map_array(self.path, 0) for key in keys}
            with zipfile.ZipFile(self.path) as archive:
                members = {_key(member): member for member in archive.infolist()}
                return {key: _load_member(self.path, archive, members[key]) for key in keys}


@dataclass(frozen=True)
class ImageFile:
    """One image; its array, called `name`, is the encoded bytes of the file."""

    path: Path
    name: str

    @property
    def where(self) -> str:
        return str(self.path)

    def load(self, keys: Iterable[str]) -> Feed:
        with reading(self.path):
            encoded = np.frombuffer(self.path.read_bytes(), np.uint8)
        return dict.fromkeys(keys, encoded)


@dataclass(frozen=True, eq=False)
class Held:
    """Arrays in memory."""

    where: str
    arrays: Feed

    def headers(self) -> dict[str, Header]:
        return _describe(self.arrays)

    def load(self, keys: Iterable[str]) -> Feed:
        return {key: self.arrays[key] for key in keys}


class Replay:
    """The feeds of a callable that returns an iterator, by number; asking for an earlier one runs the callable anew."""

    def __init__(self, start: Callable[[], object], names: Sequence[str]) -> None:
        self._start, self._names = start, names
        self._iterator: Iterator[object] | None = None
        self._number = -1
        self._feed: Feed = {}

    def get(self, number: int) -> Feed | None:
        """Feed `number`, or None past the end."""
        if self._iterator is None or number < self._number:
            found = self._start()
            if not isinstance(found, Iterable):
                raise DataError(f"data: expected the callable to return an iterator of feeds, found {_kind(found)}.")
            self._iterator, self._number = iter(found), -1
        while self._number < number:
            try:
                item = next(self._iterator)
            except StopIteration:
                self._iterator = None
                return None
            self._number += 1
            self._feed = as_feed(item, self._names, f"feed {self._number}")
        return self._feed

    def stores(self) -> Iterator[Replayed]:
        """One pass over the feeds, in which each is described and remembered by its checksum."""
        number = 0
        while (feed := self.get(number)) is not None:
            yield Replayed(self, number, _describe(feed), _checksum(feed))
            number += 1


@dataclass(frozen=True, eq=False)
class Replayed:
    """One feed of a Replay, which must come out the same on every pass."""

    replay: Replay
    number: int
    described: dict[str, Header]
    checksum: int

    @property
    def where(self) -> str:
        return f"feed {self.number}"

    def headers(self) -> dict[str, Header]:
        return self.described

    def load(self, keys: Iterable[str]) -> Feed:
        feed = self.replay.get(self.number)
        if feed is None or _checksum(feed) != self.checksum:
            raise DataError(
                f"{self.where}: expected the callable to give the same feeds on every pass, "
                f"found {'other values' if feed is not None else 'fewer feeds'}. "
                "Seed it, or give its iterator, which is read once and kept."
            )
        return {key: feed[key] for key in keys}


@runtime_checkable
class ArrayLike(Protocol):
    """What numpy reads as an array: an ndarray, a torch or jax tensor on the CPU, a data frame."""

    def __array__(self) -> np.ndarray: ...


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


def keep_feeds(items: Iterable[object], names: Sequence[str]) -> Iterator[Held]:
    """The feeds of an iterable, copied unless it is a sequence, for a generator may fill one buffer again and again."""
    is_sequence = isinstance(items, Sequence)
    for number, item in enumerate(items):
        feed = as_feed(item, names, f"feed {number}")
        yield Held(f"feed {number}", feed if is_sequence else {key: array.copy() for key, array in feed.items()})


def as_feed(item: object, names: Sequence[str], where: str) -> Feed:
    """A dict of arrays, or one array for a model whose only input is `names[0]`, as a feed."""
    if isinstance(item, Mapping):
        return {str(key): _as_array(value, f"{where}, '{key}'") for key, value in item.items()}
    if not isinstance(item, ArrayLike):
        raise DataError(f"{where}: expected a dict of arrays by input name, or one array, found {_kind(item)}.")
    if len(names) != 1:
        raise DataError(f"{where}: expected a dict of the inputs {', '.join(names)}, found one array.")
    return {names[0]: np.asarray(item)}


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what the readers of files raise into a DataError that names the file."""
    try:
        yield
    except _UNREADABLE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: cannot be read as a {path.suffix} file: {reason.removesuffix('.')}.") from error


def _list_files(folder: Path, types: tuple[str, ...]) -> list[Path]:
    if not folder.is_dir():
        return []
    names = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in types and path.is_file())
    return [folder / name for name in names if not name.startswith(".")]


def _key(member: zipfile.ZipInfo) -> str:
    return member.filename.removesuffix(".npy")


def _read_header(stream: IO[bytes]) -> tuple[Header, bool]:
    """The header at the stream's position, and whether the array is in Fortran order."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read(stream)
    if dtype.hasobject:
        raise ValueError("it holds pickled Python objects, which are never loaded.")
    return Header(dtype, shape), is_fortran


def _member_header(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Header:
    with archive.open(member) as stream:
        return _read_header(stream)[0]


def _load_member(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    if member.compress_type != zipfile.ZIP_STORED:
        with archive.open(member) as stream:
            return np.lib.format.read_array(stream, allow_pickle=False)
    # A member's data follow its 30-byte local header and two fields whose lengths stand at its end.
    with path.open("rb") as stream:
        stream.seek(member.header_offset + 26)
        name_length, extra_length = struct.unpack("<HH", stream.read(4))
    return _map_array(path, member.header_offset + 30 + name_length + extra_length)


def _map_array(path: Path, offset: int) -> np.ndarray:
    with path.open("rb") as stream:
        stream.seek(offset)
        header, is_fortran = _read_header(stream)
        if 0 in header.shape:
            return np.zeros(header.shape, header.dtype)
        order = "F" if is_fortran else "C"
        return np.memmap(path, header.dtype, "r", offset=stream.tell(), shape=header.shape, order=order)


def _describe(arrays: Feed) -> dict[str, Header]:
    return {key: Header(array.dtype, array.shape) for key, array in arrays.items()}


def _as_array(value: object, where: str) -> np.ndarray:
    if isinstance(value, ArrayLike | int | float):
        return np.asarray(value)
    raise DataError(f"{where}: expected an array, found {_kind(value)}.")


def _checksum(feed: Feed) -> int:
    total = 0
    for key in sorted(feed):
        array = feed[key]
        total = zlib.crc32(array.tobytes(), zlib.crc32(f"{key} {array.dtype.str} {array.shape}".encode(), total))
    return total


def _kind(value: object) -> str:
    return type(value).__name__
