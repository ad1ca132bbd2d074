"""Pixels to tensors: the text and table forms, the arithmetic, geometry, colour, and every error."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from onnxcomp.errors import DataError, UsageError
from onnxcomp.preprocess import Preprocess, decode_image, suggest


def pixels(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encode(array: np.ndarray, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, kind)
    return stream.getvalue()


def test_text_and_table_name_the_same_fields():
    text = "resize=256 crop=224 mean=0.485,0.456,0.406 std=0.25 scale=1/255 layout=nhwc color=bgr"
    table = {
        "resize": 256, "crop": 224, "mean": [0.485, 0.456, 0.406], "std": 0.25, "scale": 1 / 255,
        "layout": "nhwc", "color": "bgr",
    }  # fmt: skip
    expected = Preprocess(256, 224, (0.485, 0.456, 0.406), 0.25, 1 / 255, "nhwc", "bgr")

    assert Preprocess.parse(text) == expected
    assert Preprocess.from_table(table) == expected


@pytest.mark.parametrize("text", ["", "crop=224 mean=0.5 std=0.5", "mean=0.1,0.2,0.3 scale=1 layout=nhwc color=gray"])
def test_text_and_table_round_trip(text: str):
    preprocess = Preprocess.parse(text)

    assert Preprocess.parse(str(preprocess)) == preprocess
    assert Preprocess.from_table(preprocess.to_table()) == preprocess
    assert str(preprocess) == text


NUMBER = "Input should be a valid number"
POSITIVE = "Input should be greater than 0"
THREE = "Tuple should have at least 3 items after validation, not 2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("corp=224", "preprocess: unknown key 'corp'. Did you mean 'crop'?"),
        ("zzz=1", "preprocess: unknown key 'zzz'. Known keys: resize, crop, mean, std, scale, layout, color."),
        ("crop", "preprocess: 'crop' is not key=value. Write it like \"crop=224 mean=0.5 std=0.5\"."),
        ("crop=2 crop=3", "preprocess: key 'crop' is given twice."),
        ("crop=0", "preprocess: crop = 0 is not understood. Input should be greater than 0."),
        ("resize=2.5", "preprocess: resize = 2.5 is not understood. Input should be a valid integer."),
        ("crop=big", "preprocess: crop = 'big' is not understood. Input should be a valid integer."),
        ("mean=1,2", f"preprocess: mean = (1, 2) is not understood. {NUMBER} or: {THREE}."),
        ("mean=nan", f"preprocess: mean = 'nan' is not understood. {NUMBER} or: Input should be a valid list."),
        ("std=1,x,1", f"preprocess: std = (1, 'x', 1) is not understood. {NUMBER} or: {THREE}."),
        ("std=1,0,1", f"preprocess: std = (1, 0, 1) is not understood. {NUMBER} or: {POSITIVE} or: {THREE}."),
        ("scale=0", f"preprocess: scale = 0 is not understood. {POSITIVE}."),
        ("scale=1/0", f"preprocess: scale = '1/0' is not understood. {NUMBER}."),
        ("layout=chw", "preprocess: layout = 'chw' is not understood. Input should be 'nchw' or 'nhwc'."),
        ("color=grey", "preprocess: color = 'grey' is not understood. Input should be 'rgb', 'bgr' or 'gray'."),
    ],
)
def test_bad_text_is_a_usage_error(text: str, message: str):
    with pytest.raises(UsageError) as raised:
        Preprocess.parse(text)

    assert str(raised.value) == message


def test_a_table_with_true_for_a_number_is_a_usage_error():
    with pytest.raises(UsageError, match=r"^preprocess: crop = True is not understood. Input should be a valid integer.$"):
        Preprocess.from_table({"crop": True})


def test_the_formula_is_worked_out_in_float64_and_rounded_once():
    x = pixels(5, 4)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    found = Preprocess(mean=mean, std=std, layout="nhwc").apply(x, "x")

    expected = (x.astype(np.float64) * (1 / 255) - mean) / std
    np.testing.assert_array_equal(found, expected.astype(np.float32), strict=True)


def test_layout_nchw_moves_channels_first():
    x = pixels(5, 4)

    found = Preprocess(scale=1).apply(x, "x")

    np.testing.assert_array_equal(found, x.transpose(2, 0, 1).astype(np.float32), strict=True)
    assert found.flags.c_contiguous


def test_bgr_turns_the_channels_and_takes_mean_in_that_order():
    x = pixels(2, 2)

    found = Preprocess(scale=1, mean=(1, 2, 3), color="bgr", layout="nhwc").apply(x, "x")

    np.testing.assert_array_equal(found, x[:, :, ::-1] - np.array([1, 2, 3], np.float32))


def test_gray_is_pillows_luma():
    x = pixels(3, 4)

    found = Preprocess(scale=1, color="gray", layout="nhwc").apply(x, "x")

    np.testing.assert_array_equal(found[:, :, 0], np.asarray(Image.fromarray(x).convert("L")))


@pytest.mark.parametrize(("size", "start"), [((227, 227), (1, 1)), ((256, 300), (16, 38)), ((224, 225), (0, 0))])
def test_crop_is_central_with_the_odd_pixel_at_the_end(size: tuple[int, int], start: tuple[int, int]):
    x = pixels(*size)
    top, left = start

    found = Preprocess(scale=1, crop=224, layout="nhwc").apply(x, "x")

    np.testing.assert_array_equal(found, x[top : top + 224, left : left + 224])


@pytest.mark.parametrize(("size", "resized"), [((20, 30), (10, 15)), ((31, 20), (15, 10)), ((7, 7), (10, 10))])
@pytest.mark.parametrize("channels", [1, 3])
def test_resize_brings_the_shorter_side_to_n(size: tuple[int, int], resized: tuple[int, int], channels: int):
    x = pixels(*size, channels)
    picture = Image.fromarray(x if channels == 3 else x[:, :, 0])

    found = Preprocess(scale=1, resize=10, layout="nhwc").apply(x, "x")

    assert found.shape == (*resized, channels)
    height, width = resized
    expected = picture.resize((width, height), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(found, np.asarray(expected).reshape(found.shape))


def test_resize_comes_before_crop():
    found = Preprocess(resize=12, crop=8).apply(pixels(24, 48), "x")

    assert found.shape == (3, 8, 8)


def test_too_small_an_image_is_told_to_resize():
    with pytest.raises(DataError) as raised:
        Preprocess(crop=8).apply(pixels(6, 9), "a.png: sample 0")

    assert str(raised.value) == ("a.png: sample 0: the image is 6x9, too small for crop=8. Add resize=8 to --preprocess.")


def test_channels_first_pixels_are_refused():
    with pytest.raises(DataError) as raised:
        Preprocess().apply(pixels(3, 6, 7), "x")

    assert str(raised.value) == ("x: expected pixels [height, width, 1 or 3 channels], found [3, 6, 7]. Store channels last.")


def test_three_means_for_one_channel_are_refused():
    with pytest.raises(DataError, match=r"^x: the image has 1 channel, so mean and std must be one number each.$"):
        Preprocess(mean=(1, 2, 3)).apply(pixels(2, 2, 1), "x")


@pytest.mark.parametrize("kind", ["PNG", "BMP"])
def test_a_lossless_image_decodes_to_its_pixels(kind: str):
    x = pixels(3, 4)

    np.testing.assert_array_equal(decode_image(encode(x, kind), "x"), x, strict=True)


def test_a_gray_image_is_made_three_channels_and_back():
    x = np.arange(256, dtype=np.uint8).reshape(8, 32, 1)

    found = decode_image(encode(x[:, :, 0]), "x")

    np.testing.assert_array_equal(found, np.repeat(x, 3, axis=2), strict=True)
    np.testing.assert_array_equal(Preprocess(scale=1, color="gray", layout="nhwc").apply(found, "x"), x)


def test_alpha_and_a_transparent_palette_are_dropped():
    x = pixels(3, 4)
    opaque = np.concatenate([x, np.full((3, 4, 1), 9, np.uint8)], axis=2)
    stream = io.BytesIO()
    Image.new("P", (4, 3)).save(stream, "PNG", transparency=bytes(2))

    np.testing.assert_array_equal(decode_image(encode(opaque), "x"), x)
    assert decode_image(stream.getvalue(), "x").shape == (3, 4, 3)


def test_sixteen_bits_a_channel_are_refused():
    encoded = encode(np.zeros((2, 2), np.uint16))

    with pytest.raises(DataError, match=r"^x: expected 8 bits a channel, found mode I;16. Convert it to 8 bits.$"):
        decode_image(encoded, "x")


def test_bytes_that_are_no_image_are_a_data_error():
    with pytest.raises(DataError, match=r"^x: cannot be decoded as an image. Replace or remove it.$"):
        decode_image(b"not an image", "x")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "WEBP"])
def test_a_cut_off_image_is_a_data_error(kind: str):
    encoded = encode(pixels(64, 64), kind)

    with pytest.raises(DataError, match=r"^x: cannot be decoded as an image. Replace or remove it.$"):
        decode_image(encoded[: len(encoded) // 2], "x")


@pytest.mark.parametrize(
    ("shape", "layout"),
    [(("N", 3, 224, 224), "nchw"), (("N", 224, 224, 3), "nhwc"), ((1, 1, 28, 28), "nchw"), (("N", "H", "H", 1), "nhwc")],
)
def test_the_suggestion_follows_the_input_shape(shape: tuple[int | str | None, ...], layout: str):
    text = f"crop=224 mean=0.5 std=0.5 layout={layout}"
    assert suggest(shape) == f' Pictures need --preprocess, such as "{text}".'
    Preprocess.parse(text)


@pytest.mark.parametrize("shape", [None, (), (1, 3), ("N", 4, "T", 8)])
def test_nothing_is_suggested_for_an_input_without_colours(shape: tuple[int | str | None, ...] | None):
    assert suggest(shape) == ""


def test_an_integer_input_takes_pixels_in_its_type_and_nothing_else():
    x = pixels(2, 3)

    np.testing.assert_array_equal(Preprocess(scale=1, layout="nhwc").apply(x, "x", np.uint8), x, strict=True)
    for changed in (Preprocess(), Preprocess(scale=1, mean=1), Preprocess(scale=1, std=(1, 1, 2))):
        with pytest.raises(DataError, match=r"^x: the input takes uint8 pixels. Preprocess with scale=1, no mean, no std.$"):
            changed.apply(x, "x", np.uint8)
