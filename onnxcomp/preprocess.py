"""From pixels to the tensor a model takes: resize, centre crop, colour, normalize, layout.

    x = (pixels * scale - mean) / std          pixels 0..255; one mean and std for all channels, or three

The order is fixed: colour, resize (shorter side to N, bilinear with antialiasing on 8-bit pixels), centre crop
(an odd margin leaves its larger half at the bottom and right), arithmetic, layout. `mean` and `std` are in the order of
the channels the model sees, so blue first with color=bgr.

Limits  8-bit images; square crops; the EXIF orientation tag is ignored, as the usual training pipelines do.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import ModuleType
from typing import Any

import numpy as np

from onnxcomp.errors import DataError, UsageError, did_you_mean

Numbers = float | tuple[float, ...]
LAYOUTS = ("nchw", "nhwc")
COLORS = ("rgb", "bgr", "gray")


@dataclass(frozen=True)
class Preprocess:
    """What happens to 8-bit pixels on their way into the model; the fields are the keys of `[preprocess]`."""

    resize: int | None = None
    crop: int | None = None
    mean: Numbers = 0.0
    std: Numbers = 1.0
    scale: float = 1 / 255
    layout: str = "nchw"
    color: str = "rgb"

    def __post_init__(self) -> None:
        rules = (
            ("resize", _is_size(self.resize), "a positive whole number of pixels"),
            ("crop", _is_size(self.crop), "a positive whole number of pixels"),
            ("mean", _are_numbers(self.mean), "one number or three"),
            ("std", _are_numbers(self.std), "one number or three"),
            ("scale", _is_number(self.scale) and self.scale > 0, "a positive number"),
            ("layout", self.layout in LAYOUTS, f"one of {', '.join(LAYOUTS)}"),
            ("color", self.color in COLORS, f"one of {', '.join(COLORS)}"),
        )
        for key, holds, rule in rules:
            if not holds:
                raise UsageError(f"preprocess: {key} must be {rule}, found '{_format(getattr(self, key))}'.")
        if not np.all(self.std):
            raise UsageError("preprocess: std must not be 0.")

    @classmethod
    def parse(cls, text: str) -> Preprocess:
        """Read `"crop=224 mean=0.5 std=0.5 layout=nchw"`. A fraction such as scale=1/255 is understood.

        Raises UsageError for an unknown or repeated key, or a value of the wrong kind.
        """
        table: dict[str, object] = {}
        for word in text.split():
            key, equals, value = word.partition("=")
            if not equals:
                raise UsageError(f"preprocess: '{word}' is not key=value. Write it like \"crop=224 mean=0.5 std=0.5\".")
            if key in table:
                raise UsageError(f"preprocess: key '{key}' is given twice.")
            table[key] = _parse_value(value)
        return cls.from_table(table)

    @classmethod
    def from_table(cls, table: Mapping[str, object]) -> Preprocess:
        """Read a `[preprocess]` table of a recipe. Raises UsageError as `parse` does."""
        known = [field.name for field in fields(cls)]
        for key in table:
            if key not in known:
                raise UsageError(f"preprocess: unknown key '{key}'.{did_you_mean(key, known, 'Known keys')}")
        values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}
        return cls(**values)

    def to_table(self) -> dict[str, int | float | str | list[float]]:
        """The fields that differ from their defaults, as TOML values; `from_table` reads them back."""
        changed = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return {key: list(v) if isinstance(v, tuple) else v for key, v in changed.items()}

    def __str__(self) -> str:
        """The text that `parse` reads back."""
        return " ".join(f"{key}={_format(value)}" for key, value in self.to_table().items())

    @property
    def keeps_pixels(self) -> bool:
        """True if the arithmetic is the identity, so that an integer input can be fed."""
        return self.scale == 1 and not np.any(self.mean) and bool(np.all(np.equal(self.std, 1)))

    def apply(self, pixels: np.ndarray, where: str) -> np.ndarray:
        """uint8 [H, W, 3] (red first) or [H, W, 1] -> float32 [C, H', W'] or [H', W', C] by layout.

        A picture with one channel keeps one. Raises DataError, naming `where`, if the picture cannot be used.
        """
        if pixels.shape[2] not in (1, 3):
            raise DataError(
                f"{where}: expected pixels [height, width, 1 or 3 channels], found {list(pixels.shape)}. "
                "Store images channels last; layout=nchw turns them around for the model."
            )
        if self.color == "gray" and pixels.shape[2] == 3:
            pixels = np.asarray(_pillow(where).fromarray(pixels).convert("L"))[:, :, None]
        if self.resize is not None:
            pixels = _resize(pixels, self.resize, where)
        if self.crop is not None:
            pixels = _crop_centre(pixels, self.crop, where)
        if self.color == "bgr":
            pixels = pixels[:, :, ::-1]
        channels = pixels.shape[2]
        for key in ("mean", "std"):
            if np.size(getattr(self, key)) not in (1, channels):
                raise DataError(f"{where}: {key} has 3 values, but the image has 1 channel. Give {key} one value.")
        # One entry per pixel value and channel, worked out in float64, so each result is rounded once.
        table = np.broadcast_to((np.arange(256.0)[:, None] * self.scale - self.mean) / self.std, (256, channels))
        x = table.astype(np.float32)[pixels, np.arange(channels)]
        return np.ascontiguousarray(x.transpose(2, 0, 1) if self.layout == "nchw" else x)


def decode_image(encoded: bytes, color: str, where: str) -> np.ndarray:
    """The bytes of an image file -> uint8 [H, W, 3], red first, or [H, W, 1] for color "gray"; alpha is dropped.

    Raises DataError if the bytes are no image, are damaged, or hold more than 8 bits a channel.
    """
    pillow = _pillow(where)
    broken = (OSError, SyntaxError, ValueError, EOFError, struct.error, pillow.DecompressionBombError)
    try:
        with pillow.open(io.BytesIO(encoded)) as image:
            if image.mode.startswith(("I", "F")):
                raise DataError(f"{where}: expected 8 bits a channel, found mode {image.mode}. Convert it to 8 bits.")
            # Pillow warns when a palette with transparency is made RGB in one step.
            flat = image.convert("RGBA") if "transparency" in image.info else image
            pixels = np.asarray(flat.convert("L" if color == "gray" else "RGB"))
    except broken as error:
        # Pillow's text for bytes it does not know names an object in memory.
        reason = "unknown format" if "identify" in str(error) else " ".join(str(error).split())
        raise DataError(f"{where}: cannot be decoded as an image: {reason}.") from error
    return pixels.reshape(*pixels.shape[:2], -1)


def suggest(current: Preprocess | None, shape: tuple[int | str | None, ...], size: tuple[int, int]) -> str | None:
    """The `--preprocess` text that brings an image of `size` (height, width) to `shape` of rank 4; None if none can."""
    layout = "nhwc" if shape[3] in (1, 3) and shape[1] not in (1, 3) else "nchw"
    channels, height, width = (shape[3], *shape[1:3]) if layout == "nhwc" else shape[1:]
    base = current or Preprocess()
    color = "rgb" if base.color == "gray" else base.color
    wanted = replace(base, layout=layout, color="gray" if channels == 1 else color)
    if isinstance(height, int) and height == width and (height, width) != size:
        shorter = base.resize or min(size)
        wanted = replace(wanted, crop=height, resize=height if shorter < height else base.resize)
    if wanted == current:
        return None
    return str(wanted) if "layout=" in str(wanted) else f"{wanted} layout={layout}".strip()


def _resize(pixels: np.ndarray, shorter: int, where: str) -> np.ndarray:
    *sides, channels = pixels.shape
    if min(sides) == shorter:
        return pixels
    height, width = (int(shorter * side / min(sides)) for side in sides)
    pillow = _pillow(where)
    picture = pillow.fromarray(pixels if channels == 3 else pixels[:, :, 0])
    return np.asarray(picture.resize((width, height), pillow.Resampling.BILINEAR)).reshape(height, width, channels)


def _crop_centre(pixels: np.ndarray, side: int, where: str) -> np.ndarray:
    height, width = pixels.shape[:2]
    if min(height, width) < side:
        text = f"the image is {height}x{width} (height x width), smaller than crop={side}."
        raise DataError(f"{where}: {text} Add resize={side} to --preprocess.")
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[top : top + side, left : left + side]


def _pillow(where: str) -> ModuleType:
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(f"{where}: images need Pillow, which is not installed. Run: pip install pillow.") from error
    return Image


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _are_numbers(value: object) -> bool:
    return all(map(_is_number, value)) if isinstance(value, tuple) and len(value) == 3 else _is_number(value)


def _is_size(value: int | None) -> bool:
    return value is None or (_is_number(value) and isinstance(value, int) and value > 0)


def _parse_value(text: str) -> object:
    """An int, a float, a tuple of three from a comma list; anything else stays text for the check of its key."""
    if "," in text:
        return tuple(_parse_value(part) for part in text.split(","))
    if text.isdecimal():
        return int(text)
    top, slash, bottom = text.partition("/")
    try:
        return float(top) / float(bottom) if slash else float(text)
    except (ValueError, ZeroDivisionError):
        return text


def _format(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
