"""Every error that data can raise, on its text: what was expected, what was found, and where."""

from __future__ import annotations

from collections.abc import Iterator
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


def error(source: object, *inputs: InputSpec, **options) -> str:
    """The text of the DataError that opening and reading the source raises."""
    with pytest.raises(DataError) as raised:
        list(open_data(source, inputs or [ROW], **options).samples)
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

    assert error(tmp_path / "a.txt") == (
        f"{tmp_path}/a.txt: unknown file type '.txt'. Give a .npz, a .npy, or a folder of these or of images."
    )


def test_a_folder_without_data(tmp_path: Path):
    (tmp_path / "a.txt").touch()

    types = ".npz, .npy, .jpg, .jpeg, .png, .bmp, .webp"
    assert error(tmp_path) == f"{tmp_path}: expected a folder of arrays or of images ({types}), found none."


def test_a_folder_of_arrays_and_images(tmp_path: Path):
    np.save(tmp_path / "a.npy", ROWS)
    write_image(tmp_path / "b.png")

    assert error(tmp_path) == (
        f"{tmp_path}: expected arrays or images, found both, a.npy and b.png. Put them in separate folders."
    )


def test_a_npz_that_is_no_archive_or_cut_off(tmp_path: Path):
    np.savez(tmp_path / "whole.npz", x=ROWS)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:-40])
    (tmp_path / "empty.npz").touch()

    for name in ("cut", "empty"):
        path = tmp_path / f"{name}.npz"
        assert error(path) == f"{path}: cannot be read as a .npz file: File is not a zip file."


def test_a_npz_with_damaged_content(tmp_path: Path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, x=np.random.default_rng(0).normal(size=(1000, 3)).astype(np.float32))
    content = bytearray(path.read_bytes())
    content[6000:6100] = bytes(100)
    path.write_bytes(content)

    assert error(path).startswith(f"{path}: cannot be read as a .npz file: ")


@pytest.mark.parametrize("kept", [0, 60, 140])
def test_a_npy_cut_off(tmp_path: Path, kept: int):
    path = tmp_path / "a.npy"
    np.save(path, ROWS)
    path.write_bytes(path.read_bytes()[:kept])

    assert error(path).startswith(f"{path}: cannot be read as a .npy file: ")


@pytest.mark.parametrize("save", [np.save, np.savez])
def test_pickled_objects_are_refused(tmp_path: Path, save):
    path = tmp_path / ("a.npy" if save is np.save else "a.npz")
    save(path, np.array([{}, None], object))

    assert error(path) == (
        f"{path}: cannot be read as a {path.suffix} file: it holds pickled Python objects, which are never loaded."
    )


def test_missing_and_unknown_inputs(tmp_path: Path):
    np.savez(tmp_path / "a.npz", input_ids=IDS, attn_mask=IDS, extra=IDS)

    assert error(tmp_path / "a.npz", *PAIR) == (
        f"{tmp_path}/a.npz: expected the inputs input_ids, attention_mask, found input_ids, attn_mask, extra; "
        "missing attention_mask; unknown attn_mask, extra. Did you mean 'attention_mask' for 'attn_mask'?"
    )
    assert error({"input_ids": IDS}, *PAIR) == (
        "data: expected the inputs input_ids, attention_mask, found input_ids; missing attention_mask."
    )
    assert error({"x": ROWS, "z": ROWS}) == "data: expected the inputs x, found x, z; unknown z."
    assert error({"y": ROWS}) == "data: expected the inputs x, found none; missing x."


def test_a_feed_is_matched_by_exact_name():
    assert error([{"z": ROWS}]) == "feed 0: expected the inputs x, found z; missing x; unknown z."


def test_one_array_for_two_inputs(tmp_path: Path):
    np.save(tmp_path / "ids.npy", IDS)

    assert error(IDS, *PAIR) == "data: expected a dict of the inputs input_ids, attention_mask, found one array."
    assert error(tmp_path / "ids.npy", *PAIR) == (
        f"{tmp_path}/ids.npy: expected the inputs input_ids, attention_mask, found ids; "
        "missing input_ids, attention_mask; unknown ids."
    )


@pytest.mark.parametrize(
    ("array", "found"),
    [
        (np.ones((2, 3, 4), np.float32), "float32[2, 3, 4]: rank 3 is not 2."),
        (np.ones((), np.float32), "float32[]: rank 0 is not 2."),
        (np.ones((2, 4), np.float32), "float32[2, 4]: axis 1 is 4, not 3."),
        (np.ones(4, np.float32), "float32[4]: axis 1 is 4, not 3."),
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


def test_a_feed_of_another_batch_than_the_fixed_one():
    assert error([ROWS], spec(4, 3)) == ("feed 0: input 'x' expects float32[4, 3], found float32[10, 3]: axis 0 is 10, not 4.")


def test_an_unknown_rank_still_has_a_type():
    anything = InputSpec("x", np.dtype(np.float32), None)

    assert error(IDS, anything) == (
        "data: input 'x' expects float32 of unknown rank, found int64[4, 2]: int64 is not safely float32."
    )


def test_integers_that_do_not_fit():
    ids = np.array([[1, 2], [3, -(2**31) - 1]])

    assert error(ids, spec("N", 2, dtype=np.int32)) == (
        "data: sample 1, input 'x': expected values that fit int32, found -2147483649."
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_are_found_when_the_sample_is_read(tmp_path: Path, bad: float):
    rows = ROWS.copy()
    rows[7, 1:] = bad
    np.savez(tmp_path / "a.npz", x=rows)

    assert error(tmp_path / "a.npz") == (
        f"{tmp_path}/a.npz: sample 7, input 'x': expected finite numbers, found 2 NaN or Inf among 3. "
        "Repair or remove the sample."
    )
    assert len(open_data(tmp_path / "a.npz", [ROW])) == 10


def test_a_float_too_large_for_the_model_is_inf():
    assert error(np.array([[1.0, 2.0, 1e39]])) == (
        "data: sample 0, input 'x': expected finite numbers, found 1 NaN or Inf among 3. Repair or remove the sample."
    )


def test_a_sample_is_counted_over_the_whole_source_also_under_a_limit():
    rows = np.full((10, 3), np.nan, np.float32)
    first = np.sort(np.random.default_rng(0).permutation(10)[:4])[0]

    assert error(rows, limit=4).startswith(f"data: sample {first}, input 'x'")


def test_no_samples():
    assert error(ROWS[:0]) == "data: expected at least one sample, found none."
    assert error([]) == "data: expected at least one sample, found none."
    assert error(lambda: iter(())) == "data: expected at least one sample, found none."


def test_too_few_rows_for_a_fixed_batch():
    assert error(ROWS, spec(16, 3)) == (
        "data: expected at least one sample, found 10 rows for a model whose batch is fixed at 16."
    )


def test_rows_of_one_batch_that_differ_in_shape(tmp_path: Path):
    for number in range(2):
        np.save(tmp_path / f"{number}.npy", np.zeros((1, 3 + number), np.float32))

    assert error(tmp_path, spec(2, "T")) == (
        f"{tmp_path}/0.npy: sample 0, input 'x': expected rows of one shape in a batch, found [3], [4]."
    )


def test_inputs_that_share_an_axis_but_not_its_length():
    assert error({"input_ids": IDS, "attention_mask": IDS[:3]}, *PAIR) == (
        "data: inputs 'input_ids' and 'attention_mask' share the axis 'N', but hold 4 and 3 rows. Make them equal."
    )


def test_files_of_which_only_some_share_their_rows(tmp_path: Path):
    np.savez(tmp_path / "a.npz", x=ROWS[:4], t=ROWS[:4])
    np.savez(tmp_path / "b.npz", x=ROWS[:4], t=ROWS)

    assert error(tmp_path, spec(4, 3), spec("M", 3, name="t")) == (
        f"{tmp_path}/b.npz: expected inputs that share their rows, as elsewhere, found different lengths."
    )


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (3, "data: expected a path, arrays, or an iterable of feeds, found int."),
        ([(ROWS, 1)], "feed 0: expected a dict of arrays by input name, or one array, found tuple."),
        ([{"x": [1.0]}], "feed 0, 'x': expected an array, found list."),
        ([ROWS, None], "feed 1: expected a dict of arrays by input name, or one array, found NoneType."),
        (lambda: 3, "data: expected the callable to return an iterator of feeds, found int."),
    ],
)
def test_python_objects_that_are_no_data(source: object, text: str):
    assert error(source) == text


def test_a_callable_that_gives_other_feeds_or_fewer():
    generator = np.random.default_rng(0)
    rows = list(ROWS)

    def shrinking() -> Iterator[np.ndarray]:
        yield from list(rows)
        rows.pop()

    advice = "Seed it, or give its iterator, which is read once and kept."
    assert error(lambda: iter(generator.normal(size=(2, 3)))) == (
        f"feed 0: expected the callable to give the same feeds on every pass, found other values. {advice}"
    )
    assert error(shrinking) == (
        f"feed 9: expected the callable to give the same feeds on every pass, found fewer feeds. {advice}"
    )


def test_images_need_a_preprocess_that_fits(tmp_path: Path):
    write_image(tmp_path / "a.png", 9, 12)
    start = f"{tmp_path}/a.png: sample 0: input 'pixels' expects float32[N, 3, 8, 8], found uint8[1, 9, 12, 3]:"

    assert error(tmp_path, PHOTO) == (
        f"{start} uint8 is not safely float32. "
        'Use --preprocess "crop=8 layout=nchw mean=... std=..." with the numbers of its training.'
    )
    assert error(tmp_path, PHOTO, preprocess=Preprocess(mean=0.5)) == (
        f'{start} axis 2 is 9, not 8. Use --preprocess "crop=8 mean=0.5 layout=nchw".'
    )
    assert error(tmp_path, PHOTO, preprocess=Preprocess(crop=8, layout="nhwc")) == (
        f'{start} axis 1 is 8, not 3. Use --preprocess "crop=8 layout=nchw".'
    )


def test_images_that_no_preprocess_fits(tmp_path: Path):
    write_image(tmp_path / "a.png")

    assert error(tmp_path, spec("N", 3, 8, 6), preprocess=Preprocess()) == (
        f"{tmp_path}/a.png: sample 0: input 'x' expects float32[N, 3, 8, 6], found uint8[1, 8, 8, 3]: "
        "axis 3 is 8, not 6. No --preprocess makes this image fit; resize it beforehand."
    )


def test_stored_pixels_need_a_preprocess_too():
    assert error(np.zeros((5, 8, 8, 3), np.uint8), PHOTO) == (
        "data: input 'pixels' expects float32[N, 3, 8, 8], found uint8[5, 8, 8, 3]: uint8 is not safely float32. "
        'Use --preprocess "layout=nchw mean=... std=..." with the numbers of its training.'
    )


def test_normalizing_pixels_of_a_uint8_input():
    assert error(np.zeros((1, 8, 8, 3), np.uint8), spec("N", 8, 8, 3, dtype=np.uint8), preprocess=Preprocess()) == (
        "data: sample 0: input 'x' takes uint8 pixels. Preprocess with scale=1, no mean, no std."
    )


def test_an_image_that_cannot_be_decoded_is_named(tmp_path: Path):
    write_image(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")

    assert error(tmp_path, PHOTO, preprocess=Preprocess()) == (
        f"{tmp_path}/b.png: sample 1: cannot be decoded as an image: unknown format."
    )


def test_images_for_two_inputs(tmp_path: Path):
    write_image(tmp_path / "a.png")

    assert error(tmp_path, *PAIR) == (
        f"{tmp_path}: images cannot feed the 2 inputs input_ids, attention_mask. Give .npz files."
    )


def test_labels_of_the_source_that_do_not_fit(tmp_path: Path):
    assert error({"x": ROWS, "y": np.arange(9)}) == "data: expected 10 labels, one a row, found 9 in 'y'."
    assert error({"x": ROWS, "y": np.arange(10), "label": np.arange(10)}) == (
        "data: expected one array of labels, found y, label. Keep one."
    )
    assert error([{"x": ROWS[0], "y": 1}, {"x": ROWS[1]}]) == ("feed 1: expected labels, as 1 of 2 have, found none.")
    assert error([{"x": ROWS[0], "y": 1}, {"x": ROWS[1:2], "y": np.ones((1, 2))}]) == (
        "feed 1: expected each label of shape [], found [2]."
    )
    assert error({"x": ROWS, "y": np.array(["a"] * 10)}) == "labels: expected numbers as labels, found <U1[10]."


def test_given_labels_that_do_not_fit(tmp_path: Path):
    np.save(tmp_path / "a.npy", np.arange(9))
    np.savez(tmp_path / "b.npz", p=ROWS, q=ROWS)
    (tmp_path / "c.txt").touch()
    (tmp_path / "d.csv").write_text("a,1\n")

    assert error(ROWS, labels=np.arange(9)) == "labels: expected 10 labels, one a row, found int64[9]."
    assert error(ROWS, labels=tmp_path / "a.npy") == f"{tmp_path}/a.npy: expected 10 labels, one a row, found int64[9]."
    assert error(ROWS, labels=tmp_path / "b.npz") == (
        f"{tmp_path}/b.npz: expected one array, or one of the arrays called y, label, labels, found p, q."
    )
    assert error(ROWS, labels=tmp_path / "c.txt") == (
        f"{tmp_path}/c.txt: unknown label file type '.txt'. Give a .npy, a .npz, or a .csv of file,label."
    )
    assert error(ROWS, labels=tmp_path / "d.csv") == (
        f"{tmp_path}/d.csv: names files, but the samples are not one file each. Give the labels as .npy."
    )
    assert error(ROWS, labels=tmp_path / "e.csv") == f"{tmp_path}/e.csv: no such label file."


def test_a_label_table_that_misses_a_file_or_holds_no_number(tmp_path: Path):
    for name in ("a", "b", "c"):
        write_image(tmp_path / f"{name}.png")
    table = tmp_path / "labels.csv"
    options = {"preprocess": Preprocess()}

    table.write_text("a.png,1\n")
    assert error(tmp_path, PHOTO, **options) == f"{table}: expected a label for each of 3 files, found 1, none for b.png."
    table.write_text("file,label\na.png,cat\n")
    assert error(tmp_path, PHOTO, **options) == f"{table}: line 2: expected file,label with a number, found 'a.png,cat'."
    table.write_text("a.png\n")
    assert error(tmp_path, PHOTO, **options) == f"{table}: line 1: expected file,label with a number, found 'a.png'."
    table.write_bytes(b"\xff\xfe,1\n")
    assert error(tmp_path, PHOTO, **options).startswith(f"{table}: cannot be read as a .csv file: 'utf-8' codec")
