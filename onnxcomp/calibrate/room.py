"""Where live tensors lie: in memory up to a budget, beyond it in files that are mapped where they are read.

One file holds one tensor of one batch and is never changed. The folder is made with the first file and removed with the
room, whatever has happened in between.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from onnxcomp.errors import StorageError
from onnxcomp.graph.weights import reason

Array = np.ndarray
FREE = "Make room there, set TMPDIR to another folder, or raise --memory."
SMALL = 1 << 12
"""Bytes up to which a tensor always stays in memory: a file would take as much."""


def free_memory() -> int:
    """Bytes of memory that no one uses; where the system does not say, those of a small machine."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) << 10
    except OSError:
        return 4 << 30


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
    """Memory for `budget` bytes of live tensors, and a folder for what is more."""

    def __init__(self, budget: float = math.inf) -> None:
        super().__init__()
        self.budget = budget
        self.held = 0
        """Bytes of the tensors in memory."""
        self._numbers = itertools.count()
        self._folder: Path | None = None

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
        if array.nbytes <= SMALL or self.held + array.nbytes <= self.budget:
            self.held += array.nbytes
            return array
        try:
            if self._folder is None:
                where = tempfile.TemporaryDirectory(prefix="onnxcomp-", ignore_cleanup_errors=True)
                self._folder = Path(self.enter_context(where))
            path, array = self._folder / f"{next(self._numbers)}.npy", np.asarray(array, order="C")
            with path.open("wb") as stream:
                np.lib.format.write_array_header_1_0(stream, np.lib.format.header_data_from_array_1_0(array))
                stream.write(array.data)
        except OSError as error:
            where = self._folder or tempfile.gettempdir()
            raise StorageError(f"{where} cannot hold the samples' activations: {reason(error)}. {FREE}") from error
        return path

    def _drop(self, kept: Array | Path) -> None:
        if isinstance(kept, Path):
            kept.unlink()
        else:
            self.held -= kept.nbytes
