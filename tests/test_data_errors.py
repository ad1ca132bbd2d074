"""Every error that data can raise, on its text: what was expected, what was found, and where."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from onnxcomp.data import InputSpec, Preprocess, open_data
from onnxcomp.errors import DataError


def spec(*shape: int | str | None, name: str = "x", dtype: type = np.float32) -> InputSpec:
    return InputSpec(name, np.dtype(dtype), shape)


ROWS = np.arange(30, dtype=np.float32).reshape(10, 3)
ROW = spec("N", 3)
PAIR = (spec("N", "T", name="input_ids", dtype=np.int64), spec("N", "T", name="attention_mask", dtype=np.int64))
IDS = np.ones((4, 2), np.int64)
PHOTO = spec("N", 3, 8, 8, name="pixels")
TYPES = ".npz, .npy, .jpg, .jpeg, .png, .bmp, .webp"
PICTURES = 'Pictures need --preprocess, such as "crop=224 mean=0.5 std=0.5 layout=nchw".'
REPAIR = "Repair or remove the sample."


def error(source: object, *inputs: InputSpec, **options) -> str:
    """The text of the DataError that opening and reading the source raises."""
    with pytest.raises(DataError) as raised:
        list(open_data(source, inputs or [ROW], **options))
    text = str(raised.value)
    assert "\n" not in text
    assert raised.value.exit_code == 4
    return text


def write_image(path: Path, height: int = 8, width: int = 8) -> None:
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(path)


def test_a_path_that_is_not_there(tmp_path: Path):
    assert error(tmp_path / "no.npz") == f"{tmp_path}/no.npz: no such file or folder."


def test_a_file_of_unknown_type(tmp_path: Path):
    (tmp_path / "a.txt").touch()

    assert error(tmp_path / "a.txt") == f"{tmp_path}/a.txt: unknown file type '.txt'. Give one of {TYPES}."


def test_a_folder_without_data(tmp_path: Path):
    (tmp_path / "a.txt").touch()

    assert error(tmp_path) == f"{tmp_path}: expected a folder of arrays or one of images ({TYPES}), found none."


def test_a_folder_of_arrays_and_images(tmp_path: Path):
    np.save(tmp_path / "a.npy", ROWS)
    write_image(tmp_path / "b.png")

    assert error(tmp_path) == (f"{tmp_path}: expected a folder of arrays or one of images ({TYPES}), found a.npy and b.png.")


def test_a_npz_that_is_no_archive_or_cut_off(tmp_path: Path):
    np.savez(tmp_path / "whole.npz", x=ROWS)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:-40])
    (tmp_path / "empty.npz").touch()

    for name in ("cut", "empty"):
        path = tmp_path / f"{name}.npz"
        assert error(path) == f"{path}: cannot be read as a .npz file (File is not a zip file)."


def test_a_npz_with_damaged_content(tmp_path: Path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, x=np.random.default_rng(0).normal(size=(1000, 3)).astype(np.float32))
    content = bytearray(path.read_bytes())
    content[6000:6100] = bytes(100)
    path.write_bytes(content)

    assert error(path).startswith(f"{path}: cannot be read as a .npz file (")


@pytest.mark.parametrize("kept", [0, 60, 140])
def test_a_npy_cut_off(tmp_path: Path, kept: int):
    path = tmp_path / "a.npy"
    np.save(path, ROWS)
    path.write_bytes(path.read_bytes()[:kept])

    assert error(path).startswith(f"{path}: cannot be read as a .npy file (")


def test_a_npy_with_a_damaged_header(tmp_path: Path):
    path = tmp_path / "a.npy"
    np.save(path, ROWS)
    path.write_bytes(path.read_bytes().replace(b"}", b" ", 1))

    assert error(path).startswith(f"{path}: cannot be read as a .npy file (")


@pytest.mark.parametrize("save", [np.save, np.savez])
def test_pickled_objects_are_refused(tmp_path: Path, save):
    path = tmp_path / ("a.npy" if save is np.save else "a.npz")
    save(path, np.array([{}, None], object))

    text = error(path)  # the reason is numpy's
    assert text.startswith(f"{path}: cannot be read as a {path.suffix} file (")
    assert "object" in text.lower()


def test_missing_and_unknown_inputs(tmp_path: Path):
    np.savez(tmp_path / "a.npz", input_ids=IDS, attn_mask=IDS, extra=IDS)

    expected = "expected arrays called input_ids, attention_mask, found"
    assert error(tmp_path / "a.npz", *PAIR) == f"{tmp_path}/a.npz: {expected} input_ids, attn_mask, extra."
    assert error({"input_ids": IDS}, *PAIR) == f"data: {expected} input_ids."
    assert error([{"x": ROWS, "z": ROWS}]) == "feed 0: expected arrays called x, found x, z."
    assert error({"y": ROWS}) == "data: expected arrays called x, found none."
    assert error({"x": ROWS, "y": np.arange(10), "label": np.arange(10)}) == "data: expected arrays called x, found x, label."


def test_one_array_for_two_inputs(tmp_path: Path):
    np.save(tmp_path / "ids.npy", IDS)

    expected = "expected arrays called input_ids, attention_mask, found array."
    assert error(IDS, *PAIR) == f"data: {expected}"
    assert error(tmp_path / "ids.npy", *PAIR) == f"{tmp_path}/ids.npy: {expected}"


@pytest.mark.parametrize(
    ("array", "found"),
    [
        (np.ones((2, 3, 4), np.float32), "float32[2, 3, 4]: rank 3 is not 2."),
        (np.ones((2, 1, 4), np.float32), "float32[2, 1, 4]: rank 3 is not 2."),
        (np.ones((), np.float32), "float32[]: rank 0 is not 2."),
        (np.ones((2, 4), np.float32), "float32[2, 4]: axis 1 is 4, not 3."),
        (np.ones(4, np.float32), "float32[1, 4]: axis 1 is 4, not 3."),
        (np.ones((2, 3), np.int64), "int64[2, 3]: int64 is not safely float32."),
        (np.ones((2, 3), np.uint8), "uint8[2, 3]: uint8 is not safely float32."),
        (np.ones((2, 3), bool), "bool[2, 3]: bool is not safely float32."),
        (np.full((2, 3), "a"), "<U1[2, 3]: <U1 is not safely float32."),
    ],
)
def test_wrong_rank_dimension_and_type(array: np.ndarray, found: str):
    text = f"input 'x' expects float32[N, 3], found {found}"

    assert error(array) == f"data: {text}"
    assert error([ROWS, array]) == f"feed 1: {text}"


def test_integers_are_not_made_floats_nor_floats_integers():
    whole = spec(None, 3, dtype=np.int64)

    assert error(ROWS, whole) == "data: input 'x' expects int64[?, 3], found float32[10, 3]: float32 is not safely int64."
    assert error(np.ones((2, 3), np.uint8), whole) == (
        "data: input 'x' expects int64[?, 3], found uint8[2, 3]: uint8 is not safely int64."
    )


def test_a_wrong_file_in_a_folder_is_named(tmp_path: Path):
    np.save(tmp_path / "a.npy", ROWS)
    np.save(tmp_path / "b.npy", ROWS[:, :2])

    assert error(tmp_path) == f"{tmp_path}/b.npy: input 'x' expects float32[N, 3], found float32[10, 2]: axis 1 is 2, not 3."


def test_inputs_of_different_fixed_batches_are_taken_as_they_are():
    assert error({"x": ROWS, "t": ROWS[:2]}, spec(4, 3), spec(2, 3, name="t")) == (
        "data: sample 0: input 'x' expects float32[4, 3], found float32[10, 3]: axis 0 is 10, not 4."
    )


def test_an_unknown_rank_still_has_a_type():
    anything = InputSpec("x", np.dtype(np.float32), None)

    assert error(IDS, anything) == (
        "data: input 'x' expects float32 of unknown rank, found int64[4, 2]: int64 is not safely float32."
    )


def test_integers_that_do_not_fit():
    ids = np.array([[1, 2], [3, -(2**31) - 1]])

    assert error(ids, spec("N", 2, dtype=np.int32)) == (
        "data: sample 1: input 'x' expects int32[N, 2], found int64[1, 2]: "
        f"1 of 2 values are NaN, Inf or out of range, the first -2147483649. {REPAIR}"
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_are_found_when_the_sample_is_read(tmp_path: Path, bad: float):
    rows = ROWS.copy()
    rows[7, 1:] = bad
    np.savez(tmp_path / "a.npz", x=rows)

    assert error(tmp_path / "a.npz") == (
        f"{tmp_path}/a.npz: sample 7: input 'x' expects float32[N, 3], found float32[1, 3]: "
        f"2 of 3 values are NaN, Inf or out of range, the first {bad}. {REPAIR}"
    )
    assert len(open_data(tmp_path / "a.npz", [ROW])) == 10


def test_a_float_too_large_for_the_model_is_inf():
    assert error(np.array([[1.0, 2.0, 1e39]])) == (
        "data: sample 0: input 'x' expects float32[N, 3], found float64[1, 3]: "
        f"1 of 3 values are NaN, Inf or out of range, the first 1e+39. {REPAIR}"
    )


def test_a_sample_is_counted_over_the_whole_source_also_under_a_limit():
    rows = np.full((10, 3), np.nan, np.float32)
    first = np.sort(np.random.default_rng(0).permutation(10)[:4])[0]

    assert error(rows, limit=4).startswith(f"data: sample {first}: input 'x'")


def test_no_samples():
    for source in (ROWS[:0], [], lambda: iter(())):
        assert error(source) == "data: expected at least one sample of batch 1, found 0 rows."


def test_too_few_rows_for_a_fixed_batch(tmp_path: Path):
    np.save(tmp_path / "a.npy", ROWS)

    assert error(tmp_path, spec(16, 3)) == f"{tmp_path}: expected at least one sample of batch 16, found 10 rows."


def test_rows_of_one_batch_that_differ_in_shape(tmp_path: Path):
    for number in range(2):
        np.save(tmp_path / f"{number}.npy", np.zeros((1, 3 + number), np.float32))

    assert error(tmp_path, spec(2, "T")) == (
        f"{tmp_path}/0.npy: sample 0: input 'x' expects float32[2, T], found float32[1, 4]: other rows of its batch are [3]."
    )


def test_inputs_that_share_an_axis_but_not_its_length():
    assert error({"input_ids": IDS, "attention_mask": IDS[:3]}, *PAIR) == (
        "data: input 'attention_mask' expects int64[N, T], found int64[3, 2]: another input has 4 of 'N'. Make them equal."
    )


def test_files_of_which_only_some_share_their_rows(tmp_path: Path):
    np.savez(tmp_path / "a.npz", x=ROWS[:4], t=ROWS[:4])
    np.savez(tmp_path / "b.npz", x=ROWS[:4], t=ROWS)

    assert error(tmp_path, spec(4, 3), spec("M", 3, name="t")) == (
        f"{tmp_path}/a.npz: sample 0: input 'x' expects float32[4, 3], found float32[1, 3]: axis 0 is 1, not 4."
    )


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (3, "data: expected a path, arrays, or an iterable of feeds, found int."),
        ([(ROWS, 1)], "feed 0: expected an array or a dict of arrays by input name, found tuple."),
        ([{"x": [1.0]}], "feed 0: expected an array or a dict of arrays by input name, found list."),
        ([ROWS, None], "feed 1: expected an array or a dict of arrays by input name, found NoneType."),
        (lambda: 3, "data: expected a path, arrays, or an iterable of feeds, found int."),
    ],
)
def test_python_objects_that_are_no_data(source: object, text: str):
    assert error(source) == text


def test_images_need_a_preprocess_that_fits(tmp_path: Path):
    write_image(tmp_path / "a.png", 9, 12)
    start = f"{tmp_path}/a.png: sample 0: input 'pixels' expects float32[N, 3, 8, 8], found"

    assert error(tmp_path, PHOTO) == f"{start} uint8[1, 9, 12, 3]: uint8 is not safely float32. {PICTURES}"
    assert error(tmp_path, PHOTO, preprocess=Preprocess()) == (f"{start} float32[1, 3, 9, 12]: axis 2 is 9, not 8. {PICTURES}")
    assert error(tmp_path, PHOTO, preprocess=Preprocess(crop=8, layout="nhwc")) == (
        f"{start} float32[1, 8, 8, 3]: axis 1 is 8, not 3. {PICTURES}"
    )
    assert len(open_data(tmp_path, [PHOTO], preprocess=Preprocess.parse("crop=8 layout=nchw"))) == 1


def test_stored_pixels_need_a_preprocess_too():
    assert error(np.zeros((5, 8, 8, 3), np.uint8), PHOTO) == (
        f"data: input 'pixels' expects float32[N, 3, 8, 8], found uint8[5, 8, 8, 3]: uint8 is not safely float32. {PICTURES}"
    )


def test_normalizing_pixels_of_a_uint8_input():
    assert error(np.zeros((1, 8, 8, 3), np.uint8), spec("N", 8, 8, 3, dtype=np.uint8), preprocess=Preprocess()) == (
        "data: sample 0: the input takes uint8 pixels. Preprocess with scale=1, no mean, no std."
    )


def test_an_image_that_cannot_be_decoded_is_named(tmp_path: Path):
    write_image(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")

    assert error(tmp_path, PHOTO, preprocess=Preprocess()) == (
        f"{tmp_path}/b.png: sample 1: cannot be decoded as an image. Replace or remove it."
    )


def test_images_for_two_inputs(tmp_path: Path):
    write_image(tmp_path / "a.png")

    assert error(tmp_path, *PAIR) == (f"{tmp_path}/a.png: expected arrays called input_ids, attention_mask, found image.")


def test_labels_of_the_source_that_do_not_fit():
    def expected(shape: list[int]) -> str:
        return f"expected numbers of shape {shape} as labels, one a row, found"

    assert error({"x": ROWS, "y": np.arange(9)}) == f"data: {expected([10])} int64[9]."
    assert error({"x": ROWS, "y": np.array(["a"] * 10)}) == f"data: {expected([10])} <U1[10]."
    assert error([{"x": ROWS[0], "y": 1}, {"x": ROWS[1]}]) == f"feed 1: {expected([1])} none."
    assert error([{"x": ROWS[0]}, {"x": ROWS[1], "y": 1}]) == f"feed 0: {expected([1])} none."
    assert error([{"x": ROWS[0], "y": 1}, {"x": ROWS[1:2], "y": np.ones((1, 2))}]) == f"feed 1: {expected([1])} float64[1, 2]."


def test_given_labels_that_do_not_fit(tmp_path: Path):
    np.save(tmp_path / "a.npy", np.arange(9))
    np.savez(tmp_path / "b.npz", p=ROWS, q=ROWS)
    (tmp_path / "c.txt").touch()
    (tmp_path / "d.csv").write_text("a,1\n")

    expected = "expected numbers of shape [10] as labels, one a row, found int64[9]."
    assert error(ROWS, labels=np.arange(9)) == f"labels: {expected}"
    assert error(ROWS, labels=tmp_path / "a.npy") == f"{tmp_path}/a.npy: {expected}"
    assert error(ROWS, labels=tmp_path / "b.npz") == (
        f"{tmp_path}/b.npz: expected one array, or one of y, label, labels, found p, q."
    )
    assert error(ROWS, labels=tmp_path / "c.txt") == f"{tmp_path}/c.txt: unknown file type '.txt'. Give one of {TYPES}."
    assert error(ROWS, labels=tmp_path / "d.csv") == (
        f"{tmp_path}/d.csv: expected a label for each of 1 files, found 0, none for data."
    )
    assert error(ROWS, labels=tmp_path / "e.npy").startswith(f"{tmp_path}/e.npy: cannot be read as a .npy file ([Errno 2] No ")
    assert error(ROWS, labels=tmp_path / "e.csv").startswith(f"{tmp_path}/e.csv: expected rows of file,label with a number: ")


def test_a_label_a_file_is_too_few_where_a_file_has_several_rows(tmp_path: Path):
    np.save(tmp_path / "a.npy", ROWS)
    (tmp_path / "labels.csv").write_text("a.npy,1\n")

    expected = "expected numbers of shape [10] as labels, one a row, found int64[1]."
    assert error(tmp_path) == f"{tmp_path}/labels.csv: {expected}"


def test_a_label_table_that_misses_a_file_or_holds_no_number(tmp_path: Path):
    for name in ("a", "b", "c"):
        write_image(tmp_path / f"{name}.png")
    table = tmp_path / "labels.csv"
    options = {"preprocess": Preprocess()}

    table.write_text("a.png,1\n")
    assert error(tmp_path, PHOTO, **options) == f"{table}: expected a label for each of 3 files, found 1, none for b.png."
    start = f"{table}: expected rows of file,label with a number: "
    table.write_text("file,label\na.png,cat\n")
    assert error(tmp_path, PHOTO, **options) == f"{start}could not convert string to float: 'cat'."
    table.write_text("a.png\n")
    assert error(tmp_path, PHOTO, **options) == f"{start}not enough values to unpack (expected 2, got 1)."
    table.write_bytes(b"\xff\xfe,1\n")
    assert error(tmp_path, PHOTO, **options).startswith(f"{start}'utf-8' codec can't decode byte 0xff")
    table.write_text("")
    assert error(tmp_path, PHOTO, **options) == f"{table}: expected a label for each of 3 files, found 0, none for a.png."
