"""What a model takes, and how stored arrays become that.

Types are changed where nothing is lost that the model would keep: any float to the model's float, int32 to int64 and
back if the values fit. uint8 pixels become floats only through a Preprocess, since nothing else says what they mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxcomp.data.sources import Feed, Row
from onnxcomp.errors import DataError, ModelError
from onnxcomp.numerics.arrays import describe
from onnxcomp.preprocess import Preprocess, decode_image, suggest

LABEL_KEYS = ("y", "label", "labels")


@dataclass(frozen=True)
class InputSpec:
    """One input of the model. A dimension that is not fixed is its symbol or None; shape None means unknown rank."""

    name: str
    dtype: np.dtype
    shape: tuple[int | str | None, ...] | None

    @staticmethod
    def of(ports: Iterable[tuple[str, Any]]) -> list[InputSpec]:
        """Those of a session's inputs. Raises ModelError for one that takes neither numbers nor strings."""
        found = [InputSpec(name, kind.dtype, kind.shape) for name, kind in ports]
        other = next((spec.name for spec in found if spec.dtype is None or spec.dtype.kind not in "biufO"), None)
        if other is not None:
            raise ModelError(f"Input '{other}' is no tensor of numbers or strings, so it cannot be fed.")
        return found

    def __str__(self) -> str:
        return describe("string" if self.dtype.kind == "O" else self.dtype, self.shape)

    def misfit(self, array: np.ndarray, *, is_whole: bool = True) -> str | None:
        """Why the array cannot be fed, or None. Unless it is whole its rows are shared out later, so they are not compared."""
        types = {np.dtype(object) if array.dtype.kind == "U" else array.dtype, self.dtype}
        if len(types) > 1 and {t.kind for t in types} != {"f"} and types != {np.dtype(np.int32), np.dtype(np.int64)}:
            return f"{array.dtype} is not safely {self.dtype}"
        if self.shape is not None and array.ndim != len(self.shape):
            return f"rank {array.ndim} is not {len(self.shape)}"
        for axis, (size, wanted) in enumerate(zip(array.shape, self.shape or (), strict=False)):
            if isinstance(wanted, int) and size != wanted and (axis > 0 or is_whole):
                return f"axis {axis} is {size}, not {wanted}"
        return None

    def check(self, array: np.ndarray, where: str, *, is_whole: bool = True) -> None:
        """Raise DataError if there is a misfit."""
        reason = self.misfit(array, is_whole=is_whole)
        if reason is not None:
            raise self.error(f"{reason}.{suggest(self.shape)}", array, where)

    def fit(self, array: np.ndarray, where: str) -> np.ndarray:
        """The array in the model's type and in C order. Raises DataError if it, or one of its values, cannot be fed."""
        self.check(array, where)
        with np.errstate(over="ignore"):  # a float too large becomes Inf and is reported as such
            x = np.array(array, self.dtype, order="C")
        bad = ~np.isfinite(x) if self.dtype.kind == "f" else x != array
        if np.any(bad):
            found = f"{np.count_nonzero(bad)} of {x.size} values are NaN, Inf or out of range, the first {array[bad][0]}"
            raise self.error(f"{found}. Repair or remove the sample.", array, where)
        return x

    def error(self, reason: str, array: np.ndarray, where: str) -> DataError:
        """What is said of an array that cannot be fed."""
        return DataError(f"{where}: input '{self.name}' expects {self}, found {describe(array.dtype, array.shape)}: {reason}")


@dataclass(frozen=True)
class Inputs:
    """The inputs of a model, and the preprocess for those that take pictures."""

    specs: tuple[InputSpec, ...]
    preprocess: Preprocess | None

    @property
    def batch(self) -> int:
        """Rows that a sample takes; 0 if the inputs have no batch axis in common."""
        leading = {spec.shape[0] if spec.shape else 0 for spec in self.specs if spec.shape is not None}
        fixed = {size for size in leading if isinstance(size, int)} or {1}
        return fixed.pop() if len(fixed) == 1 else 0

    def arrange(self, stored: Feed, where: str) -> tuple[Feed, np.ndarray | None]:
        """Stored arrays by input name with the axes they were stored without, and the labels among them.

        An only array feeds an only input, whatever it is called. Raises DataError unless names, types and shapes fit;
        the number of rows and what comes of pictures are left to `fit`.
        """
        names = [spec.name for spec in self.specs]
        label = next((key for key in LABEL_KEYS if key in stored and key not in names), None)
        found = {key: array for key, array in stored.items() if key != label}
        if len(names) == len(found) == 1:
            found = dict(zip(names, found.values(), strict=True))
        if found.keys() != set(names):
            raise DataError(f"{where}: expected arrays called {', '.join(names)}, found {', '.join(found) or 'none'}.")
        feed = found
        if not self._is_stack(found):
            feed = {spec.name: self._arrange(spec, found[spec.name], where) for spec in self.specs}
        return feed, None if label is None else np.array(stored[label])

    def rows(self, feed: Feed, where: str) -> Sequence[Row]:
        """Where the rows of arranged arrays lie; if they do not share their rows they are one as they are."""
        if self._is_stack(feed):
            return range(len(feed[self.specs[0].name]))
        lengths: dict[str, int] = {}
        for spec in self.specs:
            axis, array = spec.shape[0] if spec.shape else None, feed[spec.name]
            if isinstance(axis, str) and lengths.setdefault(axis, len(array)) != len(array):
                raise spec.error(f"another input has {lengths[axis]} of '{axis}'. Make them equal.", array, where)
        shared = {array.shape[:1] for array in feed.values()}
        is_one = not self.batch or () in shared or len(shared) > 1
        return [...] if is_one else [slice(row, row + 1) for row in range(*shared.pop())]

    def fit(self, rows: Sequence[Feed], where: str) -> Feed:
        """The feed that arranged rows make. Raises DataError if the model cannot take it."""
        return {spec.name: self._fit(spec, [row[spec.name] for row in rows], where) for spec in self.specs}

    def _fit(self, spec: InputSpec, rows: list[np.ndarray], where: str) -> np.ndarray:
        if rows[0].dtype.kind == "V":  # the bytes of image files
            rows = [decode_image(row.tobytes(), where)[None] for row in rows]
        steps = self._steps(spec, rows[0])
        if steps is not None:
            rows = [steps.apply(picture, where, spec.dtype)[None] for row in rows for picture in row]
        other = next((row for row in rows if row.shape[1:] != rows[0].shape[1:]), None)
        if other is not None:
            raise spec.error(f"other rows of its batch are {list(rows[0].shape[1:])}.", other, where)
        return spec.fit(rows[0] if len(rows) == 1 else np.concatenate(rows), where)

    def _arrange(self, spec: InputSpec, array: np.ndarray, where: str) -> np.ndarray:
        if array.dtype.kind == "V":
            return array
        if self._steps(spec, array) is not None:
            if array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3):  # one picture, for none is 3 pixels wide
                array = array[None]
            return array if array.ndim == 4 else array[..., None]
        if self.batch and spec.shape and array.ndim == len(spec.shape) - 1:
            array = array[None]
        spec.check(array, where, is_whole=False)
        return array

    def _is_stack(self, feed: Feed) -> bool:
        """Whether every array has one axis more than the model takes, all of one length: a stack of whole feeds."""
        arrays = [(spec, feed[spec.name]) for spec in self.specs]
        lengths = {array.shape[:1] for _, array in arrays}
        if len(lengths) != 1 or lengths & {(), (0,)} or any(self._steps(*pair) for pair in arrays):
            return False
        return all(spec.shape is not None and spec.misfit(array[0, ...]) is None for spec, array in arrays)

    def _steps(self, spec: InputSpec, array: np.ndarray) -> Preprocess | None:
        """The preprocess, if these are pixels and the input takes pictures."""
        is_pixels = array.dtype == np.uint8 and array.ndim in (2, 3, 4) and (spec.shape is None or len(spec.shape) == 4)
        return self.preprocess if is_pixels else None
