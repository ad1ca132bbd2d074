"""Where live tensors lie: in memory up to a budget, beyond it in files that are mapped where they are read.

One file holds one tensor of one batch and is never changed. A temporary folder is made with the first file and removed with
the room, whatever has happened in between. In a folder that stays, every tensor is a file, and goes when it is settled that
no step needs it any more.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from onnxcomp import scratch
from onnxcomp.errors import ResourceError, UsageError
from onnxcomp.graph.files import settle
from onnxcomp.graph.weights import reason

Array = np.ndarray
Kept = Sequence[tuple[tuple[int, ...], Mapping[str, Array | Path]]]
"""The live tensors of every batch: the samples' numbers, and each tensor or its file."""
FREE = "Make room there, set TMPDIR to another folder, or raise --memory."
AGAIN = "Make room there and start again: what is finished is kept."
SMALL = 1 << 12
"""Bytes up to which a tensor always stays in memory: a file would take as much."""


def free_memory() -> int:
    """Bytes of memory that no one uses; where the system does not say, those of a small machine."""
    return _read("/proc/meminfo", "MemAvailable:", 4 << 30)


def peak_memory() -> int:
    """The most bytes of memory that this process has held; 0 where the system does not say."""
    return _read("/proc/self/status", "VmHWM:", 0)


def _read(path: str, name: str, otherwise: int) -> int:
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except OSError:
        return otherwise
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) << 10


class Tensors(Mapping[str, Array]):
    """Arrays by name, some of which are files, mapped when they are read."""

    def __init__(self, kept: Mapping[str, Array | Path]) -> None:
        self.kept = dict(kept)

    def __getitem__(self, name: str) -> Array:
        found = self.kept[name]
        return np.asarray(np.load(found, mmap_mode="r")) if isinstance(found, Path) else found

    def __iter__(self) -> Iterator[str]:
        return iter(self.kept)

    def __len__(self) -> int:
        return len(self.kept)


class Room(ExitStack):
    """Memory for `budget` bytes of live tensors, and a temporary folder for what is more; or a `folder` that stays, for all."""

    def __init__(self, budget: float = math.inf, folder: Path | None = None) -> None:
        super().__init__()
        self.budget, self.folder = budget, folder
        self.advice = FREE if folder is None else AGAIN
        self.held = 0
        """Bytes of the tensors in memory."""
        self._numbers = itertools.count()
        self._temporary: Path | None = None
        self._dropped = list[Path]()
        if folder is not None:
            with storing(folder, AGAIN):
                folder.mkdir(parents=True, exist_ok=True)
                try:
                    self.enter_context(scratch.lock(folder / scratch.LOCK))
                except BlockingIOError:
                    raise UsageError(f"{folder} is in use by another run. Wait for it, or give another folder.") from None

    def adopt(self, kept: Kept) -> None:
        """Remove every tensor of the folder but these, of which a run before has spoken last."""
        assert self.folder is not None
        known = {path for _, files in kept for path in files.values() if isinstance(path, Path)}
        for path in self.folder.glob("*.npy"):
            if path not in known:
                path.unlink()
        self._numbers = itertools.count(max((int(path.stem) + 1 for path in known), default=0))

    def settle(self) -> None:
        """Remove what was dropped from the folder that stays."""
        while self._dropped:
            self._dropped.pop().unlink()

    def take(
        self, new: Mapping[str, Array], old: Mapping[str, Array] | None = None, needed: Collection[str] | None = None
    ) -> Tensors:
        """The tensors of one batch: `new` ones and the `old` ones, as far as they are `needed` (None: all)."""
        kept = old.kept if isinstance(old, Tensors) else {}
        stay = {k: v for k, v in kept.items() if k not in new and (needed is None or k in needed)}
        for name in kept.keys() - stay.keys():
            self._drop(kept[name])
        return Tensors(stay | {k: self._keep(v) for k, v in new.items() if needed is None or k in needed})

    def _keep(self, array: Array) -> Array | Path:
        if self.folder is None and (array.nbytes <= SMALL or self.held + array.nbytes <= self.budget):
            self.held += array.nbytes
            return array
        where = self.folder or self._temporary
        with storing(where or Path(tempfile.gettempdir()), self.advice):
            if where is None:
                where = self._temporary = self.enter_context(scratch.folder())
            path, array = where / f"{next(self._numbers)}.npy", np.asarray(array, order="C")
            with path.open("wb") as stream:
                np.lib.format.write_array_header_1_0(stream, np.lib.format.header_data_from_array_1_0(array))
                stream.write(array.data)
                if self.folder is not None:
                    settle(stream)
        return path

    def _drop(self, kept: Array | Path) -> None:
        if not isinstance(kept, Path):
            self.held -= kept.nbytes
        elif self.folder is None:
            kept.unlink()
        else:
            self._dropped.append(kept)


@contextmanager
def storing(where: Path, advice: str) -> Iterator[None]:
    """Raise ResourceError where something cannot be written in the folder."""
    try:
        yield
    except OSError as error:
        raise ResourceError(f"{where} cannot hold the samples' activations: {reason(error)}. {advice}") from error
