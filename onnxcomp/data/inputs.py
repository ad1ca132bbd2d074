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
from onnxcomp.numerics.arrays import describe
from onnxcomp.preprocess import Preprocess, suggest


@dataclass(frozen=True)
class InputSpec:
    """One input of the model. A dimension that is not fixed is its symbol or None; shape None means unknown rank."""

    name: str
    dtype: np.dtype
    shape: tuple[int | str | None, ...] | None

    def __str__(self) -> str:
        return describe(self.dtype, self.shape)

    def misfit(self, array: np.ndarray, *, is_whole: bool = True) -> str | None:
        """Why the array cannot be fed, or None. Unless it is whole its rows are shared out later, so they are not compared."""
        types = {array.dtype, self.dtype}
        if len(types) > 1 and {t.kind for t in types} != {"f"} and types != {np.dtype(np.int32), np.dtype(np.int64)}:
            return f"{array.dtype} is not safely {self.dtype}"
        if self.shape is None:
            return None
        if array.ndim != len(self.shape):
            return f"rank {array.ndim} is not {len(self.shape)}"
        for axis, (size, wanted) in enumerate(zip(array.shape, self.shape, strict=True)):
            if isinstance(wanted, int) and size != wanted and (axis > 0 or is_whole):
                return f"axis {axis} is {size}, not {wanted}"
        return None


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
            return dict(zip(names, names, strict=True))
        text = f"{where}: expected the inputs {', '.join(names)}, found {', '.join(found) or 'none'}"
        text += f"; missing {', '.join(missing)}" if missing else ""
        text += f"; unknown {', '.join(extra)}" if extra else ""
        near = [(key, name) for key in extra for name in difflib.get_close_matches(key, missing, n=1)]
        raise DataError(f"{text}." + "".join(f" Did you mean '{name}' for '{key}'?" for key, name in near))

    def count_rows(self, found: Feed, where: str, *, is_feed: bool) -> int | None:
        """Rows in stored arrays, or None if they are one sample as they are. Raises DataError if they do not fit."""
        ready = self.add_batch_axes(found)
        first: dict[str, str] = {}
        for spec in self.specs:
            symbol, rows = spec.shape[0] if spec.shape else None, ready[spec.name].shape[:1]
            if isinstance(symbol, str) and rows:
                other = first.setdefault(symbol, spec.name)
                if len(ready[other]) != rows[0]:
                    raise DataError(
                        f"{where}: inputs '{other}' and '{spec.name}' share the axis '{symbol}', but hold "
                        f"{len(ready[other])} and {rows[0]} rows. Make them equal."
                    )
        lengths = {array.shape[:1] for array in ready.values()}
        is_whole = self.batch is None or () in lengths or len(lengths) > 1
        if is_feed and (self.batch != 1 or any(spec.shape is None for spec in self.specs)):
            is_whole = True
        for spec in self.specs:
            if self._steps(spec, found[spec.name]) is None:
                self._check(spec, ready[spec.name], found[spec.name], where, is_whole=is_whole)
        return None if is_whole else lengths.pop()[0]

    def add_batch_axes(self, stored: Feed) -> Feed:
        """Views of stored arrays with the axes they were stored without: batch, and the channel of pixels."""
        feed: Feed = {}
        for spec in self.specs:
            array = stored[spec.name]
            if self._steps(spec, array) is not None:
                array = _as_pictures(array)
            elif spec.shape is not None and array.ndim == len(spec.shape) - 1 and self.batch == 1:
                array = array[None]
            feed[spec.name] = array
        return feed

    def convert(self, stored: Feed, where: str, *, is_whole: bool) -> Feed:
        """Stored rows -> what the model takes, in C order: pixels preprocessed, shapes and integers checked."""
        feed: Feed = {}
        for spec in self.specs:
            found = ready = stored[spec.name]
            steps = self._steps(spec, found)
            if steps is not None:
                if spec.dtype == np.uint8 and not steps.keeps_pixels:
                    text = f"{where}: input '{spec.name}' takes uint8 pixels. Preprocess with scale=1, no mean, no std."
                    raise DataError(text)
                ready = np.stack([steps.apply(picture, where) for picture in found]).astype(spec.dtype)
            self._check(spec, ready, found, where, is_whole=is_whole)
            with np.errstate(over="ignore"):  # a float too large becomes Inf and is reported as such
                feed[spec.name] = x = np.array(ready, dtype=spec.dtype, order="C")
            if ready.dtype.kind == "i" and np.any(x != ready):
                lost = ready[x != ready][0]
                raise DataError(f"{where}, input '{spec.name}': expected values that fit {spec.dtype}, found {lost}.")
        return feed

    def _steps(self, spec: InputSpec, found: np.ndarray) -> Preprocess | None:
        """The preprocess, if `found` are pixels and the input takes pictures."""
        is_pixels = found.dtype == np.uint8 and found.ndim in (2, 3, 4)
        takes_pictures = (spec.dtype.kind == "f" or spec.dtype == np.uint8) and (spec.shape is None or len(spec.shape) == 4)
        return self.preprocess if is_pixels and takes_pictures else None

    def _check(self, spec: InputSpec, ready: np.ndarray, found: np.ndarray, where: str, *, is_whole: bool) -> None:
        """Raise DataError unless `ready` can be fed; `found` is what is stored, and what the error shows."""
        reason = spec.misfit(ready, is_whole=is_whole)
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


def _as_pictures(pixels: np.ndarray) -> np.ndarray:
    """[N, H, W, C] of pixels stored as that, as [N, H, W], [H, W] or [H, W, 3], for no picture is 3 pixels wide."""
    if pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3):
        pixels = pixels[None]
    return pixels if pixels.ndim == 4 else pixels[..., None]
