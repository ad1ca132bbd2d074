"""Sources of data and the samples made of them: files, folders, images, Python objects, labels, limits, digests."""

from __future__ import annotations

import pickle
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from onnxcomp.data import Data, InputSpec, Preprocess, open_data
from onnxcomp.errors import DataError, UsageError


def spec(*shape: int | str | None, name: str = "x", dtype: type = np.float32) -> InputSpec:
    return InputSpec(name, np.dtype(dtype), shape)


ROWS = np.arange(30, dtype=np.float32).reshape(10, 3)
ROW = spec("N", 3)
PAIR = (spec("N", "T", name="ids", dtype=np.int64), spec("N", "T", name="mask", dtype=np.int64))


def gather(data: Data, name: str = "x") -> np.ndarray:
    return np.concatenate([feed[name] for feed in data])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_rows_are_samples_of_batch_one_and_can_be_read_again(tmp_path: Path, save):
    save(tmp_path / "d.npz", x=ROWS, y=np.arange(10))

    data = open_data(tmp_path / "d.npz", [ROW])

    assert len(data) == 10
    for _ in range(2):
        for row, feed in zip(ROWS, data, strict=True):
            np.testing.assert_array_equal(feed["x"], row[None], strict=True)
    assert data.labels is not None
    np.testing.assert_array_equal(data.labels, np.arange(10))


def test_a_sample_is_a_plain_copy_in_c_order(tmp_path: Path):
    np.savez(tmp_path / "d.npz", x=np.asfortranarray(ROWS))

    found = open_data(tmp_path / "d.npz", [ROW])[3]["x"]

    assert type(found) is np.ndarray
    assert found.flags.c_contiguous
    assert found.flags.writeable
    np.testing.assert_array_equal(found, ROWS[3:4])


def test_strings_are_fed_however_they_are_stored(tmp_path: Path):
    words = np.array([["a", "bc"], ["", "d"], ["e", "f"]])
    np.savez(tmp_path / "d.npz", x=words)

    for source in (tmp_path / "d.npz", words, words.astype(object)):
        found = gather(open_data(source, [spec("N", 2, dtype=object)]))
        assert found.dtype == object
        assert found.tolist() == words.tolist()


def test_strings_of_another_shape_are_told_in_words():
    with pytest.raises(DataError, match=r"input 'x' expects string\[N, 3\], found <U1\[1, 2\]"):
        gather(open_data([{"x": np.array([["a", "b"]])}], [spec("N", 3, dtype=object)]))


def test_an_array_of_no_elements_is_fed():
    data = open_data([{"x": ROWS[:1], "past": np.zeros((1, 0, 4), np.float32)}], [ROW, spec("N", "P", 4, name="past")])

    assert data[0]["past"].shape == (1, 0, 4)


def test_a_npy_is_mapped_and_one_npz_is_held(tmp_path: Path):
    block = np.ones((64, 16384), np.float32)  # 4 MiB
    wide = [spec("N", 16384)]
    np.save(tmp_path / "plain.npy", block)
    (tmp_path / "folder").mkdir()
    for number in range(3):
        np.savez_compressed(tmp_path / "folder" / f"{number}.npz", x=block)

    # Beyond the arrays, reading a .npz takes its decompressor and the blocks it hands over: less than 1 MiB.
    assert peak_memory(lambda: sum(len(f) for f in open_data(tmp_path / "plain.npy", wide))) < 1 << 20
    assert peak_memory(lambda: sum(len(f) for f in open_data(tmp_path / "folder", wide))) < 5 << 20


def peak_memory(act: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        act()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_the_only_array_of_a_file_or_dict_feeds_the_only_input(tmp_path: Path):
    np.savez(tmp_path / "d.npz", pixels=ROWS, label=np.arange(10))

    np.testing.assert_array_equal(gather(open_data(tmp_path / "d.npz", [ROW])), ROWS)
    with np.load(tmp_path / "d.npz") as arrays:
        np.testing.assert_array_equal(gather(open_data(arrays, [ROW])), ROWS)


def test_an_input_called_y_is_an_input(tmp_path: Path):
    np.savez(tmp_path / "d.npz", x=ROWS, y=ROWS)

    data = open_data(tmp_path / "d.npz", [ROW, spec("N", 3, name="y")])

    assert data.labels is None
    assert set(data[0]) == {"x", "y"}


@pytest.mark.parametrize("first", ["N", None, 1])
def test_a_free_or_single_batch_takes_rows_one_by_one(first: str | int | None):
    data = open_data(ROWS, [spec(first, 3)])

    assert [feed["x"].shape for feed in data] == [(1, 3)] * 10


def test_a_fixed_batch_takes_whole_groups_of_rows_and_their_labels():
    data = open_data({"x": ROWS, "labels": np.arange(10)}, [spec(4, 3)])

    assert len(data) == 2
    np.testing.assert_array_equal(data[1]["x"], ROWS[4:8])
    assert data.labels is not None
    np.testing.assert_array_equal(data.labels, np.arange(8).reshape(2, 4))


def test_a_fixed_batch_is_filled_across_files(tmp_path: Path):
    for number in range(5):
        np.save(tmp_path / f"{number}.npy", ROWS[number : number + 1])

    data = open_data(tmp_path, [spec(2, 3)])

    np.testing.assert_array_equal(gather(data), ROWS[:4])


def test_an_array_without_batch_axis_is_one_sample():
    data = open_data(ROWS[0], [ROW])

    assert len(data) == 1
    np.testing.assert_array_equal(data[0]["x"], ROWS[:1])


def test_the_leading_axis_of_an_unknown_rank_are_its_rows():
    anything = InputSpec("x", np.dtype(np.float32), None)

    assert [feed["x"].shape for feed in open_data(ROWS, [anything])] == [(1, 3)] * 10
    assert [feed["x"].shape for feed in open_data([ROWS[:2], ROWS[:1, :2]], [anything])] == [(1, 3), (1, 3), (1, 2)]


def test_inputs_that_do_not_share_rows_are_one_sample():
    inputs = [spec("N", 3), spec(2, 5, name="table"), spec(name="alpha")]
    feed = {"x": ROWS, "table": np.ones((2, 5), np.float32), "alpha": np.float32(0.5), "y": np.arange(10)}

    data = open_data(feed, inputs)

    assert {name: array.shape for name, array in data[0].items()} == {
        "x": (10, 3),
        "table": (2, 5),
        "alpha": (),
    }
    assert data.labels is not None
    assert data.labels.shape == (1, 10)


def test_a_folder_of_arrays_is_read_in_order_of_name_and_may_be_ragged(tmp_path: Path):
    lengths = {"b": 5, "a": 2, "c": 7}
    for name, length in lengths.items():
        np.savez(tmp_path / f"{name}.npz", ids=np.arange(length)[None], mask=np.ones((1, length), np.int64), y=[length])
    (tmp_path / ".hidden.npz").write_bytes(b"")

    data = open_data(tmp_path, PAIR)

    assert [feed["ids"].shape for feed in data] == [(1, 2), (1, 5), (1, 7)]
    assert data.labels is not None
    assert data.labels.tolist() == [2, 5, 7]


def test_samples_are_made_when_asked_for_and_an_index_counts_from_both_ends():
    data = open_data({"x": np.concatenate([ROWS, [[np.nan] * 3]]), "y": np.arange(11)}, [ROW])

    assert data[-2]["x"][0, 0] == 27
    assert len(data) == 11  # the last of which cannot be fed
    with pytest.raises(IndexError):
        data[11]


@pytest.mark.parametrize("stored", [np.float16, np.float64, ">f4"])
def test_floats_become_the_models_float(stored):
    np.testing.assert_array_equal(gather(open_data(ROWS.astype(stored), [ROW])), ROWS, strict=True)


@pytest.mark.parametrize(("stored", "wanted"), [(np.int32, np.int64), (np.int64, np.int32)])
def test_int32_and_int64_become_each_other(stored: type, wanted: type):
    ids = np.array([[1, -(2**31)], [0, 2**31 - 1]], stored)

    np.testing.assert_array_equal(gather(open_data(ids, [spec("N", 2, dtype=wanted)])), ids.astype(wanted), strict=True)


def feeds() -> Iterator[dict[str, np.ndarray]]:
    buffer = np.empty((1, 3), np.float32)
    for row in ROWS:
        buffer[0] = row
        yield {"x": buffer}


@pytest.mark.parametrize(
    "source",
    [feeds(), feeds, list(ROWS), [{"x": ROWS[:4]}, {"x": ROWS[4:]}], (r for r in ROWS), {"x": ROWS}, lambda: [ROWS]],
    ids=[
        "generator of one buffer",
        "callable",
        "rows",
        "batched feeds",
        "generator of rows",
        "dict",
        "callable of list",
    ],
)
def test_python_objects_give_the_same_samples_on_every_pass(source: object):
    data = open_data(source, [ROW])

    for _ in range(2):
        np.testing.assert_array_equal(gather(data), ROWS, strict=True)
    assert len(data) == 10


def test_feeds_may_carry_labels():
    data = open_data(({"x": row[None], "y": number} for number, row in enumerate(ROWS)), [ROW])

    assert data.labels is not None
    assert data.labels.tolist() == list(range(10))


@pytest.mark.parametrize("source", [[ROWS[:2], ROWS[2:4]], [ROWS[:3], ROWS[3:5]], list(ROWS[:5])])
def test_feeds_for_a_fixed_batch_are_dealt_out_by_their_rows(source: list[np.ndarray]):
    data = open_data(source, [spec(2, 3)])

    np.testing.assert_array_equal([feed["x"] for feed in data], ROWS[:4].reshape(2, 2, 3))


def test_an_array_or_a_feed_of_one_array_may_be_called_anything():
    np.testing.assert_array_equal(gather(open_data([{"z": ROWS}], [ROW])), ROWS)
    np.testing.assert_array_equal(gather(open_data({"z": ROWS}, [ROW])), ROWS)


def test_limit_takes_the_first_of_a_seeded_permutation_in_original_order():
    source = {"x": ROWS, "y": np.arange(10)}
    expected = np.sort(np.random.default_rng(7).permutation(10)[:4])

    data = open_data(source, [ROW], limit=4, seed=7)

    assert len(data) == 4
    np.testing.assert_array_equal(gather(data), ROWS[expected])
    assert data.labels is not None
    np.testing.assert_array_equal(data.labels, expected)
    np.testing.assert_array_equal(gather(open_data(source, [ROW], limit=10, seed=7)), ROWS)


def test_a_limit_below_one_is_a_usage_error():
    with pytest.raises(UsageError, match=r"^the number of samples must be at least 1, found 0.$"):
        open_data(ROWS, [ROW], limit=0)


def test_the_digest_is_of_the_content_and_not_of_its_container(tmp_path: Path):
    np.savez(tmp_path / "a.npz", x=ROWS)
    np.savez_compressed(tmp_path / "b.npz", other=ROWS, y=np.arange(10))
    sources: Sequence[object] = [tmp_path / "a.npz", tmp_path / "b.npz", ROWS, {"x": ROWS}, feeds(), feeds]

    assert len({open_data(source, [ROW]).digest for source in sources}) == 1


def test_the_digest_tells_values_types_choice_and_preprocess_apart():
    picture, four = np.zeros((2, 4, 4, 3), np.uint8), spec("N", 3, 4, 4)
    digests = [
        open_data(ROWS, [ROW]).digest,
        open_data(ROWS + 1, [ROW]).digest,
        open_data(ROWS.astype(np.float64), [ROW]).digest,
        open_data(ROWS, [ROW], limit=3).digest,
        open_data(ROWS, [spec("N", 3, name="z")]).digest,
        open_data(picture, [four], preprocess=Preprocess()).digest,
        open_data(picture, [four], preprocess=Preprocess(mean=0.5)).digest,
    ]

    assert len(set(digests)) == len(digests)
    assert all(len(digest) == 64 for digest in digests)


def test_labels_may_be_given_as_array_npy_npz_or_csv_of_floats(tmp_path: Path):
    scores = np.array([0.5, 1.5])
    for number in range(2):
        np.save(tmp_path / f"{number}.npy", ROWS[number])
    (tmp_path / "other").mkdir()
    np.save(tmp_path / "other" / "a.npy", scores)
    np.savez(tmp_path / "other" / "a.npz", x=ROWS, labels=scores)
    np.savez(tmp_path / "other" / "b.npz", only=scores)
    (tmp_path / "other" / "a.csv").write_text("0.npy,0.5\n1.npy,1.5\n")

    for labels in (scores, *sorted((tmp_path / "other").iterdir())):
        found = open_data(tmp_path, [ROW], labels=labels).labels
        assert found is not None
        np.testing.assert_array_equal(found, scores, strict=True)


def test_a_labels_csv_in_a_folder_of_arrays_labels_its_files(tmp_path: Path):
    for number in range(2):
        np.savez(tmp_path / f"{number}.npz", x=ROWS[number], y=[9])
    (tmp_path / "labels.csv").write_text("file,label\n1.npz,1\n0.npz,0\n")

    found = open_data(tmp_path, [ROW]).labels

    assert found is not None
    np.testing.assert_array_equal(found, np.arange(2), strict=True)


def test_given_labels_replace_those_of_the_source():
    data = open_data({"x": ROWS, "y": np.arange(10)}, [ROW], labels=np.zeros(10))

    assert data.labels is not None
    assert not data.labels.any()


def test_data_of_files_can_be_pickled(tmp_path: Path):
    np.savez(tmp_path / "d.npz", x=ROWS)
    data = open_data(tmp_path / "d.npz", [ROW])

    assert pickle.loads(pickle.dumps(data)).digest == data.digest


def test_whole_feeds_may_be_stacked_where_every_array_has_one_axis_more():
    """Inputs that share no batch axis: there are no rows to take, but feeds."""
    specs = [spec(1, "samples", name="audio"), spec(name="rate")]
    audio, rate = np.arange(12, dtype=np.float32).reshape(3, 1, 4), np.float32([8, 16, 22])

    data = open_data({"audio": audio, "rate": rate, "y": np.arange(3)}, specs)

    assert [feed["audio"].shape for feed in data] == [(1, 4)] * 3
    assert [float(feed["rate"]) for feed in data] == [8, 16, 22]
    assert data.labels is not None
    assert data.labels.tolist() == [0, 1, 2]


def test_feeds_of_a_fixed_batch_may_be_stacked_too():
    x = np.arange(24, dtype=np.float32).reshape(3, 1, 2, 4)

    data = open_data(x, [spec(1, 2, 4)])

    assert len(data) == 3
    np.testing.assert_array_equal(data[2]["x"], x[2])
