"""The task of the small models: name the digit in the middle of a cluttered 16x16 picture.

Every picture shows one scikit-learn digit (8x8, 17 grey levels), enlarged, turned and shifted, with pieces of two other
digits at the border, uneven contrast and noise. Pixels are multiples of 1/32 in [0, 1], so float16 holds them exactly.
The 1797 source digits are dealt to training, calibration and test before a picture is drawn: no source serves two of
them. `python -m models.data` rewrites digits_calib.npz and digits_test.npz.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

SIZE = 16
LEVELS = 32
SEED = 1797
FOLDER = Path(__file__).parent
CALIBRATION_FILE = FOLDER / "digits_calib.npz"
TEST_FILE = FOLDER / "digits_test.npz"


@dataclass(frozen=True)
class Digits:
    """Source digits: `pictures` float32 [N, 8, 8] in [0, 1] and `labels` int64 [N]."""

    pictures: np.ndarray
    labels: np.ndarray


def split() -> tuple[Digits, Digits, Digits]:
    """The source digits of training (1169), calibration (128) and test (500), disjoint and shuffled by SEED."""
    pixels, labels = load_digits(return_X_y=True)
    pictures = (pixels.reshape(-1, 8, 8) / 16).astype(np.float32)
    order = np.random.default_rng(SEED).permutation(len(labels))
    parts = np.split(order, [1169, 1169 + 128])
    train, calibration, test = (Digits(pictures[part], labels[part].astype(np.int64)) for part in parts)
    return train, calibration, test


def draw(digits: Digits, rounds: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """`rounds` new pictures of every digit, shuffled: x float32 [N, 1, 16, 16], y int64 [N]."""
    index = rng.permutation(np.tile(np.arange(len(digits.labels)), rounds))
    count = len(index)
    middle = _place(digits.pictures[index], rng.uniform(-2.0, 2.0, (count, 2)), rng)
    canvas = middle * rng.uniform(0.6, 1.0, (count, 1, 1))
    for _ in range(2):
        angle = rng.uniform(0, 2 * np.pi, count)
        border = 11.0 * np.stack([np.sin(angle), np.cos(angle)], axis=1)
        piece = _place(digits.pictures[rng.integers(0, len(digits.labels), count)], border, rng)
        canvas = np.maximum(canvas, piece * rng.uniform(0.4, 0.9, (count, 1, 1)))
    canvas = canvas + rng.normal(0.0, 0.08, canvas.shape)
    x = np.round(np.clip(canvas, 0, 1) * LEVELS) / LEVELS
    return x[:, None].astype(np.float32), digits.labels[index]


def _place(pictures: np.ndarray, shift: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each picture turned by up to 15 degrees, enlarged 1.25 to 1.6 times and moved by `shift` pixels on its canvas."""
    count = len(pictures)
    shift = shift.astype(np.float32)
    angle = rng.uniform(-np.pi / 12, np.pi / 12, count)
    scale = rng.uniform(1.25, 1.6, (count, 2)).astype(np.float32)
    rows, columns = np.meshgrid(np.arange(SIZE), np.arange(SIZE), indexing="ij")
    centred = np.stack([rows, columns], axis=-1).astype(np.float32) - np.float32((SIZE - 1) / 2)
    moved = centred[None] - shift[:, None, None, :]
    # In float64, where processors that round the last bit differently still agree after the cast.
    cosine, sine = (f(angle).astype(np.float32)[:, None, None] for f in (np.cos, np.sin))
    row = (cosine * moved[..., 0] + sine * moved[..., 1]) / scale[:, 0, None, None] + 3.5
    column = (cosine * moved[..., 1] - sine * moved[..., 0]) / scale[:, 1, None, None] + 3.5
    return _interpolate(pictures, row, column)


def _interpolate(pictures: np.ndarray, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Bilinear samples of each picture at fractional positions [N, 16, 16]; zero outside."""
    padded = np.pad(pictures, ((0, 0), (1, 2), (1, 2)))
    row, column = np.clip(row + 1, 0, 9), np.clip(column + 1, 0, 9)
    top, left = np.floor(row).astype(np.int64), np.floor(column).astype(np.int64)
    down, right = row - top, column - left
    n = np.arange(len(pictures))[:, None, None]
    upper = padded[n, top, left] * (1 - right) + padded[n, top, left + 1] * right
    lower = padded[n, top + 1, left] * (1 - right) + padded[n, top + 1, left + 1] * right
    return upper * (1 - down) + lower * down


def write(path: Path, x: np.ndarray, y: np.ndarray) -> None:
    """An .npz of `x` float16 and `y` int64 whose bytes depend on nothing but the arrays."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, array in (("x", x.astype(np.float16)), ("y", y)):
            member = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            member.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(member, "w") as file:
                np.lib.format.write_array(file, array, allow_pickle=False)


def main() -> None:
    _, calibration, test = split()
    write(CALIBRATION_FILE, *draw(calibration, 2, np.random.default_rng(SEED + 1)))
    write(TEST_FILE, *draw(test, 2, np.random.default_rng(SEED + 2)))


if __name__ == "__main__":
    main()
