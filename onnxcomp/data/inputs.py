"""What a model takes, and how stored arrays become that.

Types are changed where nothing is lost that the model would keep: any float to the model's float, int32 to int64 and
back if the values fit. uint8 pixels become floats only through a Preprocess, since nothing else says what they mean.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

import numpy as np

from onnxcomp.data.sources import Feed
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

    def count_rows(self, found: Feed, where: str, *, is_feed: bool) -> int | None:
        """Rows in stored arrays, or None if they are one sample as they are. Raises DataError if they do not fit."""
        ready = self.add_batch_axes(found)
        first: dict[str, str] = {}
        for spec in self.specs:
            symbol, shape = spec.shape[0] if spec.shape else None, ready[spec.name].shape
            if not isinstance(symbol, str) or not shape:
                continue
            other = first.setdefault(symbol, spec.name)
            if len(ready[other]) != shape[0]:
                raise DataError(
                    f"{where}: inputs '{other}' and '{spec.name}' share the axis '{symbol}', but hold {len(ready[other])} "
                    f"and {shape[0]} rows. Make them equal."
                )
        lengths = {array.shape[:1] for array in ready.values()}
        is_whole = self.batch is None or () in lengths or len(lengths) > 1
        if is_feed and (self.batch != 1 or any(spec.shape is None for spec in self.specs)):
            is_whole = True
        for spec in self.specs:
            if not self._takes_pixels(spec, found[spec.name]):
                self._check(spec, ready[spec.name], found[spec.name], where, is_whole=is_whole)
        return None if is_whole else lengths.pop()[0]

    def add_batch_axes(self, stored: Feed) -> Feed:
        """Views of stored arrays with the axes they were stored without: batch, and the channel of pixels."""
        feed: Feed = {}
        for spec in self.specs:
            array = stored[spec.name]
            is_row = spec.shape is not None and array.ndim == len(spec.shape) - 1 and self.batch == 1
            feed[spec.name] = _as_pictures(array) if self._takes_pixels(spec, array) else array[None] if is_row else array
        return feed

    def convert(self, stored: Feed, where: str, *, is_whole: bool) -> Feed:
        """Stored rows -> what the model takes: pixels preprocessed, shapes and integers checked, types widened."""
        feed: Feed = {}
        for spec in self.specs:
            found = ready = stored[spec.name]
            if self.preprocess is not None and self._takes_pixels(spec, found):
                if spec.dtype == np.uint8 and not self.preprocess.keeps_pixels:
                    text = f"{where}: input '{spec.name}' takes uint8 pixels. Preprocess with scale=1, no mean, no std."
                    raise DataError(text)
                ready = np.stack([self.preprocess.apply(picture, where) for picture in found])
                ready = ready.astype(spec.dtype)
            self._check(spec, ready, found, where, is_whole=is_whole)
            feed[spec.name] = _widen(ready, spec, where)
        return feed

    def _takes_pixels(self, spec: InputSpec, found: np.ndarray) -> bool:
        if self.preprocess is None or found.dtype != np.uint8 or found.ndim not in (2, 3, 4):
            return False
        return (spec.dtype.kind == "f" or spec.dtype == np.uint8) and (spec.shape is None or len(spec.shape) == 4)

    def _check(self, spec: InputSpec, ready: np.ndarray, found: np.ndarray, where: str, *, is_whole: bool) -> None:
        """Raise DataError unless `ready` can be fed; `found` is what is stored, and what the error shows."""
        reason = _misfit(spec, ready, is_whole=is_whole)
        if reason is not None:
            text = f"{where}: input '{spec.name}' expects {spec}, found {found.dtype}{list(found.shape)}: {reason}."
            raise DataError(text + self._advise(spec, found))

    def _advise(self, spec: InputSpec, found: np.ndarray) -> str:
        """How pictures could be made to fit."""
        if found.dtype != np.uint8 or found.ndim not in (3, 4) or spec.shape is None or len(spec.shape) != 4:
            return ""
        height, width = _as_pictures(found).shape[1:3]
        wanted = suggest(self.preprocess, spec.shape, (height, width))
        if wanted is None:
            return " No --preprocess makes this image fit; resize it beforehand."
        if self.preprocess is not None:
            return f' Use --preprocess "{wanted}".'
        return f' Use --preprocess "{wanted} mean=... std=..." with the numbers of its training.'


def _misfit(spec: InputSpec, ready: np.ndarray, *, is_whole: bool) -> str | None:
    """Why the array cannot be fed, or None. The leading axis of rows is shared out later, so it is not compared."""
    types = {ready.dtype, spec.dtype}
    if not (len(types) == 1 or all(t.kind == "f" for t in types) or types == {np.dtype(np.int32), np.dtype(np.int64)}):
        return f"{ready.dtype} is not safely {spec.dtype}"
    if spec.shape is None:
        return None
    if ready.ndim != len(spec.shape):
        return f"rank {ready.ndim} is not {len(spec.shape)}"
    for axis, (size, wanted) in enumerate(zip(ready.shape, spec.shape, strict=True)):
        if isinstance(wanted, int) and size != wanted and (axis > 0 or is_whole):
            return f"axis {axis} is {size}, not {wanted}"
    return None


def _as_pictures(pixels: np.ndarray) -> np.ndarray:
    """[N, H, W, C] of pixels stored as that, as [N, H, W], [H, W] or [H, W, 3], for no picture is 3 pixels wide."""
    if pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3):
        pixels = pixels[None]
    return pixels if pixels.ndim == 4 else pixels[..., None]


def _widen(array: np.ndarray, spec: InputSpec, where: str) -> np.ndarray:
    """A copy in the model's type, in C order; a float too large becomes Inf and is reported as such."""
    with np.errstate(over="ignore"):
        x = np.array(array, dtype=spec.dtype, order="C")
    lost = array[x != array] if array.dtype.kind == "i" else np.empty(0)
    if lost.size > 0:
        raise DataError(f"{where}, input '{spec.name}': expected values that fit {spec.dtype}, found {lost[0]}.")
    return x
