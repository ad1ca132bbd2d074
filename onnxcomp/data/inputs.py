"""What a model takes, and how stored arrays become that.

Types are changed where nothing is lost that the model would keep: any float to the model's float, int32 to int64 and
back if the values fit. uint8 pixels become floats only through a Preprocess, since nothing else says what they mean.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from onnxcomp.data.sources import Feed, Header, Shape
from onnxcomp.errors import DataError
from onnxcomp.preprocess import Preprocess, suggest


@dataclass(frozen=True)
class InputSpec:
    """One input of the model. A dimension that is not fixed is its symbol or None; shape None means unknown rank."""

    name: str
    dtype: np.dtype
    shape: tuple[int | str | None, ...] | None

    def __str__(self) -> str:
        if self.shape is None:
            return f"{self.dtype} of unknown rank"
        return f"{self.dtype}[{', '.join('?' if size is None else str(size) for size in self.shape)}]"


@dataclass(frozen=True)
class Inputs:
    """The inputs of a model, and the preprocess for those that take pictures."""

    specs: tuple[InputSpec, ...]
    preprocess: Preprocess | None

    @property
    def names(self) -> list[str]:
        return [spec.name for spec in self.specs]

    @property
    def color(self) -> str:
        """The colour to decode images in."""
        return "rgb" if self.preprocess is None else self.preprocess.color

    @property
    def batch(self) -> int | None:
        """Rows a sample takes; None if the inputs have no batch axis in common."""
        fixed = {spec.shape[0] for spec in self.specs if spec.shape and isinstance(spec.shape[0], int)}
        if len(fixed) > 1 or 0 in fixed or any(spec.shape == () for spec in self.specs):
            return None
        return fixed.pop() if fixed else 1

    def match_names(self, found: list[str], where: str, *, is_exact: bool) -> dict[str, str]:
        """Input name -> key. Unless names are exact, an only array feeds an only input, whatever it is called."""
        names = self.names
        if len(names) == len(found) == 1 and not is_exact:
            return {names[0]: found[0]}
        missing = [name for name in names if name not in found]
        extra = [name for name in found if name not in names]
        if not missing and not extra:
            return {name: name for name in names}
        text = f"{where}: expected the inputs {', '.join(names)}, found {', '.join(found) or 'none'}"
        text += f"; missing {', '.join(missing)}" if missing else ""
        text += f"; unknown {', '.join(extra)}" if extra else ""
        near = [(key, difflib.get_close_matches(key, missing, n=1)) for key in extra]
        advice = "".join(f" Did you mean '{match[0]}' for '{key}'?" for key, match in near if match)
        raise DataError(f"{text}.{advice}")

    def count_rows(self, found: Mapping[str, Header], where: str, *, is_feed: bool) -> int | None:
        """Rows in stored arrays, or None if they are one sample as they are. Raises DataError if headers do not fit."""
        shapes = {spec.name: self._batch_shape(spec, found[spec.name]) for spec in self.specs}
        is_whole = self._is_whole(shapes, where, is_feed=is_feed)
        for spec in self.specs:
            if not self._takes_pixels(spec, found[spec.name]):
                stored = Header(found[spec.name].dtype, shapes[spec.name])
                self._check(spec, stored, found[spec.name], where, is_whole=is_whole)
        return None if is_whole else next(iter(shapes.values()))[0]

    def add_batch_axis(self, spec: InputSpec, array: np.ndarray) -> np.ndarray:
        """A view of stored rows with the axes they were stored without: batch, and the channel of pixels."""
        return array.reshape(self._batch_shape(spec, Header(array.dtype, array.shape)))

    def convert(self, stored: Feed, where: str, *, is_whole: bool) -> Feed:
        """Stored rows -> what the model takes: pixels preprocessed, shapes and integers checked, types widened."""
        feed: Feed = {}
        for spec in self.specs:
            array = stored[spec.name]
            found = Header(array.dtype, array.shape)
            if self.preprocess is not None and self._takes_pixels(spec, found):
                array = _apply(self.preprocess, array, spec, where)
            self._check(spec, Header(array.dtype, array.shape), found, where, is_whole=is_whole)
            feed[spec.name] = _widen(array, spec, where)
        return feed

    def _takes_pixels(self, spec: InputSpec, found: Header) -> bool:
        if self.preprocess is None or found.dtype != np.uint8 or len(found.shape) not in (2, 3, 4):
            return False
        return (spec.dtype.kind == "f" or spec.dtype == np.uint8) and (spec.shape is None or len(spec.shape) == 4)

    def _batch_shape(self, spec: InputSpec, found: Header) -> Shape:
        if self._takes_pixels(spec, found):
            return _picture_shape(found.shape)
        lacks = spec.shape is not None and len(found.shape) == len(spec.shape) - 1
        return (1, *found.shape) if lacks and self.batch == 1 else found.shape

    def _is_whole(self, shapes: Mapping[str, Shape], where: str, *, is_feed: bool) -> bool:
        symbols: dict[str, tuple[str, int]] = {}
        for spec in self.specs:
            symbol, shape = spec.shape[0] if spec.shape else None, shapes[spec.name]
            if not isinstance(symbol, str) or not shape:
                continue
            other, length = symbols.setdefault(symbol, (spec.name, shape[0]))
            if length != shape[0]:
                raise DataError(
                    f"{where}: inputs '{other}' and '{spec.name}' share the axis '{symbol}', but hold {length} and "
                    f"{shape[0]} rows. Make them equal."
                )
        if is_feed and (self.batch != 1 or any(spec.shape is None for spec in self.specs)):
            return True
        return self.batch is None or () in shapes.values() or len({shape[0] for shape in shapes.values()}) > 1

    def _check(self, spec: InputSpec, ready: Header, found: Header, where: str, *, is_whole: bool) -> None:
        """Raise DataError unless `ready` can be fed; `found` is what is stored, and what the error shows."""
        reason = _misfit(spec, ready, is_whole=is_whole)
        if reason is None:
            return
        text = f"{where}: input '{spec.name}' expects {spec}, found {found}: {reason}."
        if found.dtype != np.uint8 or spec.shape is None or len(spec.shape) != 4 or len(found.shape) not in (3, 4):
            raise DataError(text)
        height, width = _picture_shape(found.shape)[1:3]
        wanted = suggest(self.preprocess, spec.shape, (height, width))
        if wanted is None:
            raise DataError(f"{text} No --preprocess makes this image fit; resize it beforehand.")
        if self.preprocess is not None:
            raise DataError(f'{text} Use --preprocess "{wanted}".')
        raise DataError(f'{text} Use --preprocess "{wanted} mean=... std=..." with the numbers of its training.')


def _misfit(spec: InputSpec, ready: Header, *, is_whole: bool) -> str | None:
    """Why the array cannot be fed, or None. The leading axis of rows is shared out later, so it is not compared."""
    dtype, shape = ready.dtype, ready.shape
    is_safe = (dtype.kind == spec.dtype.kind == "f") or {dtype, spec.dtype} <= {np.dtype(np.int32), np.dtype(np.int64)}
    if dtype != spec.dtype and not is_safe:
        return f"{dtype} is not safely {spec.dtype}"
    if spec.shape is None:
        return None
    if len(shape) != len(spec.shape):
        return f"rank {len(shape)} is not {len(spec.shape)}"
    for axis, (size, wanted) in enumerate(zip(shape, spec.shape, strict=True)):
        if isinstance(wanted, int) and size != wanted and (axis > 0 or is_whole):
            return f"axis {axis} is {size}, not {wanted}"
    return None


def _picture_shape(shape: Shape) -> Shape:
    """[N, H, W, C] of pixels stored as that, as [N, H, W], [H, W] or [H, W, 3], for no picture is 3 pixels wide."""
    if len(shape) == 2 or (len(shape) == 3 and shape[2] == 3):
        return (1, *shape, 1)[:4]
    return (*shape, 1)[:4]


def _apply(preprocess: Preprocess, pictures: np.ndarray, spec: InputSpec, where: str) -> np.ndarray:
    if spec.dtype == np.uint8 and not preprocess.keeps_pixels:
        raise DataError(f"{where}: input '{spec.name}' takes uint8 pixels. Preprocess with scale=1, no mean, no std.")
    x = np.stack([preprocess.apply(picture, where) for picture in pictures])
    return x.astype(np.uint8) if spec.dtype == np.uint8 else x


def _widen(array: np.ndarray, spec: InputSpec, where: str) -> np.ndarray:
    """A copy in the model's type, in C order; a float too large becomes Inf and is reported as such."""
    if array.dtype.kind == "i" and array.size > 0 and array.dtype != spec.dtype:
        worst = max(int(array.max()), int(array.min()), key=abs)
        if not np.iinfo(spec.dtype).min <= worst <= np.iinfo(spec.dtype).max:
            raise DataError(f"{where}, input '{spec.name}': expected values that fit {spec.dtype}, found {worst}.")
    with np.errstate(over="ignore"):
        return np.array(array, dtype=spec.dtype, order="C")
