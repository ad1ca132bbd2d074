"""Images: files and stored pixels through a preprocess, their labels, and the real data sets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from onnxcomp.data import Data, InputSpec, Preprocess, open_data


def spec(*shape: int | str | None, name: str = "x", dtype: type = np.float32) -> InputSpec:
    return InputSpec(name, np.dtype(dtype), shape)


def gather(data: Data, name: str = "x") -> np.ndarray:
    return np.concatenate([feed[name] for feed in data])


def write_images(folder: Path, count: int = 3, size: tuple[int, int] = (4, 4)) -> np.ndarray:
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (count, *size, 3), dtype=np.uint8)
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"{number}.png")
    return pixels


@pytest.mark.parametrize("inside", [".", "images"])
def test_images_and_stored_pixels_go_through_the_same_preprocess(tmp_path: Path, inside: str):
    pixels = write_images(tmp_path / inside)
    preprocess, four = Preprocess(crop=2, mean=0.5, std=0.25), spec("N", 3, 2, 2)
    expected = np.stack([preprocess.apply(picture, "x") for picture in pixels])

    for source in (tmp_path, pixels, list(pixels), (p[None] for p in pixels)):
        np.testing.assert_array_equal(gather(open_data(source, [four], preprocess=preprocess)), expected, strict=True)


def test_one_image_file_is_one_sample(tmp_path: Path):
    write_images(tmp_path, 1)

    assert len(open_data(tmp_path / "0.png", [spec("N", 3, 4, 4)], preprocess=Preprocess())) == 1


def test_a_gray_image_is_gray_or_three_channels_alike(tmp_path: Path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "0.png")

    gray = open_data(tmp_path, [spec("N", 1, 4, 4)], preprocess=Preprocess(scale=1, color="gray"))
    three = open_data(tmp_path, [spec("N", 3, 4, 4)], preprocess=Preprocess(scale=1))

    np.testing.assert_array_equal(gray[0]["x"], pixels[None, None].astype(np.float32))
    np.testing.assert_array_equal(three[0]["x"], np.broadcast_to(pixels, (1, 3, 4, 4)).astype(np.float32))


def test_images_fill_a_fixed_batch(tmp_path: Path):
    pixels = write_images(tmp_path, 5)

    data = open_data(tmp_path, [spec(2, 4, 4, 3)], preprocess=Preprocess(scale=1, layout="nhwc"))

    np.testing.assert_array_equal(gather(data), pixels[:4])


def test_uint8_inputs_take_pixels_as_they_are(tmp_path: Path):
    pixels = write_images(tmp_path)

    as_stored = open_data(tmp_path, [spec("N", 4, 4, 3, dtype=np.uint8)])
    turned = open_data(tmp_path, [spec("N", 3, 4, 4, dtype=np.uint8)], preprocess=Preprocess(scale=1))

    np.testing.assert_array_equal(gather(as_stored), pixels, strict=True)
    np.testing.assert_array_equal(gather(turned), pixels.transpose(0, 3, 1, 2), strict=True)


def test_pictures_without_channels_are_one_channel():
    pixels = np.arange(32, dtype=np.uint8).reshape(2, 4, 4)

    data = open_data(pixels, [spec(1, 1, 4, 4)], preprocess=Preprocess(scale=1))

    np.testing.assert_array_equal(gather(data), pixels[:, None].astype(np.float32), strict=True)
    assert len(open_data(pixels[0], [spec(1, 1, 4, 4)], preprocess=Preprocess())) == 1


def test_floats_pass_a_preprocess_by():
    x = np.ones((2, 3, 4, 4), np.float32)

    np.testing.assert_array_equal(gather(open_data(x, [spec("N", 3, 4, 4)], preprocess=Preprocess(mean=0.5))), x)


@pytest.mark.parametrize("header", ["", "file,label\n", "\ufefffile,label\n"])
def test_labels_csv_beside_images_is_matched_by_file_name(tmp_path: Path, header: str):
    write_images(tmp_path / "images")
    (tmp_path / "labels.csv").write_text(f"{header}2.png,22\nimages/0.png,20\n\n1.png,21\nother.png,9\n", "utf-8")

    data = open_data(tmp_path, [spec("N", 3, 4, 4)], preprocess=Preprocess(), limit=2, seed=1)

    chosen = np.sort(np.random.default_rng(1).permutation(3)[:2])
    assert data.labels is not None
    np.testing.assert_array_equal(data.labels, chosen + 20, strict=True)


@pytest.mark.real
def test_kwt_features_of_half_precision_become_float(data_dir: Path):
    path = data_dir / "kwt1_calib.npz"

    data = open_data(path, [spec("N", 98, 40, name="features")], limit=8)

    assert len(data) == 8
    first = np.sort(np.random.default_rng(0).permutation(256)[:8])[0]
    with np.load(path) as stored:
        np.testing.assert_array_equal(data[0]["features"][0], stored["features"][first].astype(np.float32))


@pytest.mark.real
def test_cifar_pixels_become_normalized_nchw(data_dir: Path):
    path, mean, std = data_dir / "cifar10_calib.npz", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    preprocess = Preprocess.parse("mean=0.485,0.456,0.406 std=0.229,0.224,0.225")

    data = open_data(path, [spec("N", 3, 32, 32, name="input")], preprocess=preprocess)

    with np.load(path) as stored:
        x, y = stored["x"], stored["y"]
    assert len(data) == 1000
    assert data.labels is not None
    np.testing.assert_array_equal(data.labels, y)
    expected = ((x[5] * (1 / 255) - mean) / std).astype(np.float32)  # float64 until the end, as the module says
    np.testing.assert_array_equal(data[5]["input"], expected.transpose(2, 0, 1)[None], strict=True)


@pytest.mark.real
def test_mnist_pixels_stay_raw(data_dir: Path):
    path = data_dir / "mnist_test.npz"

    data = open_data(path, [spec(1, 1, 28, 28, name="Input3")], preprocess=Preprocess.parse("scale=1"), limit=20)

    chosen = np.sort(np.random.default_rng(0).permutation(2000)[:20])
    with np.load(path) as stored:
        x = stored["x"][chosen]
    np.testing.assert_array_equal(gather(data, "Input3"), x[:, None].astype(np.float32), strict=True)


@pytest.mark.real
def test_imagenet_files_are_cropped_and_labelled(data_dir: Path):
    folder = data_dir / "imagenet" / "val"
    preprocess = Preprocess.parse("crop=224 mean=0.5 std=0.5")

    data = open_data(folder, [spec("N", 3, 224, 224, name="pixel_values")], preprocess=preprocess, limit=4)

    files = sorted((folder / "images").iterdir())
    labels = dict(line.split(",") for line in (folder / "labels.csv").read_text().split())
    chosen = np.sort(np.random.default_rng(0).permutation(650)[:4])
    assert data.labels is not None
    assert [str(label) for label in data.labels] == [labels[files[i].name] for i in chosen]
    with Image.open(files[chosen[0]]) as image:
        pixels = np.asarray(image.convert("RGB"))[1:225, 1:225]
    expected = ((pixels * (1 / 255) - 0.5) / 0.5).astype(np.float32)
    np.testing.assert_array_equal(data[0]["pixel_values"], expected.transpose(2, 0, 1)[None], strict=True)
