"""From pixels to the tensor a model takes: colour, resize, centre crop, normalize, layout.

    x = (pixels * scale - mean) / std          pixels 0..255; one mean and std for all channels, or three

The order is fixed: colour, resize (shorter side to N, bilinear with antialiasing on 8-bit pixels), centre crop
(an odd margin leaves its larger half at the bottom and right), arithmetic, layout. `mean` and `std` are in the order of
the channels the model sees, so blue first with color=bgr.

Limits  8-bit images; square crops; the EXIF orientation tag is ignored, as the usual training pipelines do.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Annotated, Any, Literal

import numpy as np
from PIL import Image
from pydantic import Field, FiniteFloat, PositiveInt

from onnxcomp.errors import DataError, UsageError, check_types, did_you_mean

Factor = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Preprocess:
    """What happens to 8-bit pixels on their way into the model; the fields are the keys of `[preprocess]`."""

    resize: PositiveInt | None = None
    crop: PositiveInt | None = None
    mean: FiniteFloat | Annotated[tuple[FiniteFloat, ...], Field(min_length=3, max_length=3)] = 0.0
    std: Factor | Annotated[tuple[Factor, ...], Field(min_length=3, max_length=3)] = 1.0
    scale: Factor = 1 / 255
    layout: Literal["nchw", "nhwc"] = "nchw"
    color: Literal["rgb", "bgr", "gray"] = "rgb"

    def __post_init__(self) -> None:
        check_types(self, "preprocess: ")

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
        changed = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default]
        return {key: list(value) if isinstance(value, tuple) else value for key, value in changed}

    def __str__(self) -> str:
        """The text that `parse` reads back."""
        return " ".join(f"{key}={_format(value)}" for key, value in self.to_table().items())

    def apply(self, pixels: np.ndarray, where: str, dtype: np.dtype | type = np.float32) -> np.ndarray:
        """uint8 [H, W, 3] (red first) or [H, W, 1] -> [C, H', W'] or [H', W', C] of the model's type by layout.

        A picture with one channel keeps one. Raises DataError, naming `where`, if the picture cannot be used, or if the
        model takes whole numbers and the arithmetic is not the identity.
        """
        channels = pixels.shape[2]
        if channels not in (1, 3):
            text = f"expected pixels [height, width, 1 or 3 channels], found {list(pixels.shape)}. Store channels last."
            raise DataError(f"{where}: {text}")
        picture = Image.fromarray(pixels if channels == 3 else pixels[:, :, 0])
        if self.color == "gray":
            picture = picture.convert("L")
        if self.resize is not None:
            width, height = (int(self.resize * side / min(picture.size)) for side in picture.size)
            picture = picture.resize((width, height), Image.Resampling.BILINEAR)
        if self.crop is not None:
            width, height = picture.size
            if min(width, height) < self.crop:
                text = f"{height}x{width}, too small for crop={self.crop}. Add resize={self.crop} to --preprocess."
                raise DataError(f"{where}: the image is {text}")
            left, top = (width - self.crop) // 2, (height - self.crop) // 2
            picture = picture.crop((left, top, left + self.crop, top + self.crop))
        x = np.atleast_3d(np.asarray(picture))[:, :, :: -1 if self.color == "bgr" else 1]
        if x.shape[2] == 1 and max(np.size(self.mean), np.size(self.std)) > 1:
            raise DataError(f"{where}: the image has 1 channel, so mean and std must be one number each.")
        if np.dtype(dtype).kind != "f" and not (self.scale == 1 and not np.any(self.mean) and np.all(np.equal(self.std, 1))):
            raise DataError(f"{where}: the input takes {np.dtype(dtype)} pixels. Preprocess with scale=1, no mean, no std.")
        x = ((x.astype(np.float64) * self.scale - self.mean) / self.std).astype(dtype)
        return np.ascontiguousarray(x.transpose(2, 0, 1) if self.layout == "nchw" else x)


def decode_image(encoded: bytes, where: str) -> np.ndarray:
    """The bytes of an image file -> uint8 [H, W, 3], red first; a gray image has three channels alike, alpha is dropped.

    Raises DataError if the bytes are no image, are damaged, or hold more than 8 bits a channel.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            if image.mode.startswith(("I", "F")):
                raise DataError(f"{where}: expected 8 bits a channel, found mode {image.mode}. Convert it to 8 bits.")
            # Pillow warns when a palette with transparency is made RGB in one step.
            flat = image.convert("RGBA") if "transparency" in image.info else image
            return np.asarray(flat.convert("RGB"))
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(f"{where}: cannot be decoded as an image. Replace or remove it.") from error


def suggest(shape: tuple[int | str | None, ...] | None) -> str:
    """How pictures could be made to fit an input of this shape; empty if it has no axis of colours."""
    if shape is None or len(shape) != 4 or not {shape[1], shape[3]} & {1, 3}:
        return ""
    layout = "nhwc" if shape[3] in (1, 3) else "nchw"
    return f' Pictures need --preprocess, such as "crop=224 mean=0.5 std=0.5 layout={layout}".'


def _parse_value(text: str) -> object:
    """An int, a float, a tuple of them from a comma list; anything else stays text for the check of its key."""
    if "," in text:
        return tuple(map(_parse_value, text.split(",")))
    try:
        value = float(Fraction(text))
    except (ValueError, ArithmeticError):
        return text
    return int(value) if value.is_integer() else value


def _format(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
