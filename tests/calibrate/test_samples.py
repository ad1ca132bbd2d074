"""Samples on their way: how they are batched, told apart, reduced and moved on."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort
import pytest
from equality import parse
from onnx import ModelProto

from onnxcomp import runtime
from onnxcomp.calibrate.samples import (
    BATCH_BYTES,
    LiveBatch,
    Run,
    Store,
    batch_size,
    can_stack,
    combine,
    confirm_tokens,
    split,
    stacking,
)
from onnxcomp.errors import DataError, ModelError
from onnxcomp.graph.prepare import prepare
from onnxcomp.graph.sites import find_sites
from onnxcomp.runtime import Session, infer_types

Array = np.ndarray


def feeds(*shapes: tuple[int, ...], start: int = 0) -> list[dict[str, Array]]:
    """One feed per shape, filled with its own number."""
    return [{"x": np.full(shape, start + i, np.float32)} for i, shape in enumerate(shapes)]


def session(text: str, **weights: object) -> Session:
    return Session(parse(text, {k: np.asarray(v) for k, v in weights.items()}, opset=21).SerializeToString(), threads=1)


def model(text: str) -> ModelProto:
    return parse(text, {}, opset=21)


def batches(store: Store) -> list[LiveBatch]:
    return store.first(lambda batch: batch, 100)


def shapes(store: Store) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [(batch.indices, batch.live["x"].shape) for batch in batches(store)]


@pytest.mark.skipif("AzureExecutionProvider" not in ort.get_available_providers(), reason="needs a second provider")
def test_calibration_runs_on_the_provider_that_is_asked_for():
    run = Run(model("g (float[N,M] x) => (float[N,M] y) { y = Neg(x) }"), {"x": "x"})
    store = Store(feeds((1, 3), (1, 4)), batchable=True)

    with runtime.provider("azure"):
        found = store.cut({"y": run}).reduce(lambda batch: [len(batch.read("y")), *run.session.native.get_providers()])

    assert found == 2 * [1, "AzureExecutionProvider", "CPUExecutionProvider"]


# --- batching --------------------------------------------------------------------------------------------------------


def test_neighbours_of_one_shape_travel_together():
    store = Store(feeds(*[(1, 3)] * 5), batchable=True, batch_size=2)

    assert shapes(store) == [((0, 1), (2, 3)), ((2, 3), (2, 3)), ((4,), (1, 3))]
    assert batches(store)[1].live["x"][:, 0].tolist() == [2, 3]


def test_a_sample_of_another_shape_begins_a_batch():
    store = Store(feeds((1, 3), (1, 3), (1, 4), (1, 3)), batchable=True)

    assert shapes(store) == [((0, 1), (2, 3)), ((2,), (1, 4)), ((3,), (1, 3))]


@pytest.mark.parametrize(("width", "size"), [(8, 8), (BATCH_BYTES // 12, 3), (BATCH_BYTES, 1)])
@pytest.mark.parametrize("axis", ["T", None])
def test_of_wide_samples_fewer_travel_together(width: int, size: int, axis: str | None):
    wide = prepare(model(f"g (float[N, {axis or width}] x) => (float[N, M] y) {{ h = Relu(x) y = Neg(h) }}"), infer_types)

    assert batch_size(wide.graph, feeds((1, width))[0]) == size


def test_samples_that_cannot_be_stacked_travel_alone():
    assert shapes(Store(feeds((1, 3), (1, 3)), batchable=False)) == [((0,), (1, 3)), ((1,), (1, 3))]


def test_feeds_may_come_from_a_generator():
    assert len(batches(Store((feed for feed in feeds((1, 2), (1, 2))), batchable=True))) == 1


def test_a_feed_is_not_changed_by_its_store():
    feed = feeds((1, 2))[0]

    store = Store([feed], batchable=True)
    store.advance(None, [])

    assert list(feed) == ["x"]


def test_a_batch_says_how_much_it_holds():
    (batch,) = batches(Store(feeds((1, 100), (1, 100)), batchable=True))

    assert batch.__sizeof__() == 800


def test_no_samples_are_refused():
    with pytest.raises(DataError) as caught:
        Store([], batchable=True)

    assert str(caught.value) == "The data hold no samples. Give at least one."


# --- telling samples apart -------------------------------------------------------------------------------------------


def test_the_samples_of_a_batch_may_be_looked_at_one_by_one():
    batch = LiveBatch((4, 7), {"x": np.arange(6).reshape(2, 3), "y": np.zeros((2, 1)), "z": np.zeros(3)})

    found = list(batch.alone(["x", "y"]))

    assert [(one.indices, one.live["x"].tolist(), set(one.live)) for one in found] == [
        ((4,), [[0, 1, 2]], {"x", "y"}),
        ((7,), [[3, 4, 5]], {"x", "y"}),
    ]
    (together,) = batch.alone(["x", "z"])
    assert (together.indices, together.live["x"].shape) == ((4, 7), (2, 3))


def test_a_batch_is_split_along_its_leading_axis():
    parts = split(np.arange(12).reshape(6, 2), 3)

    assert [part.tolist() for part in parts] == [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9], [10, 11]]]


@pytest.mark.parametrize(("array", "samples"), [(np.ones((5, 2)), 2), (np.array(1.0), 2), (np.ones((4, 2)), 1)])
def test_what_cannot_be_split_evenly_stays_whole(array: Array, samples: int):
    (part,) = split(array, samples)

    assert part is array


def test_parts_are_views():
    array = np.zeros((4, 2))

    split(array, 2)[1][:] = 1

    assert array[2:].all()


# --- whether samples may be stacked ----------------------------------------------------------------------------------

TWO = [{"x": np.array([[1, 2]], np.float32)}, {"x": np.array([[3, -4]], np.float32)}]


def test_a_model_that_treats_samples_alone_may_be_fed_many():
    assert can_stack(session("g (float[N,2] x) => (float[N,2] y) { y = Tanh(x) }"), TWO)


def test_nothing_is_run_for_a_model_of_fixed_batch():
    assert not can_stack(session("g (float[1,2] x) => (float[1,2] y) { y = Tanh(x) }"), TWO)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("h = Reshape(x, one) y = Tanh(h)", "a batch of one inside: two samples do not run"),
        ("m = ReduceMean<keepdims = 1>(x, axis) y = Sub(x, m)", "the mean over the batch is taken off"),
        ("s = ReduceSum<keepdims = 0>(x) y = Add(x, s)", "the sum over everything is added"),
        ("y = Softmax<axis = 0>(x)", "the samples compete"),
    ],
)
def test_a_model_with_a_fixed_batch_inside_or_mixing_its_samples_is_fed_one_at_a_time(body: str, why: str):
    weights = {k: v for k, v in {"one": np.array([1, 2]), "axis": np.array([0])}.items() if f" {k})" in body}

    assert not can_stack(session(f"g (float[N,2] x) => (float[N,2] y) {{ {body} }}", **weights), TWO), why


ADVICE = "If the first axis of the data is no batch, stack whole feeds, with one axis more."


@pytest.mark.parametrize(
    ("body", "is_cut", "said"),
    [
        ("y = CumSum(x, axis)", True, True),
        ("y = ReduceMax<keepdims = 1>(x, axes)", True, True),
        ("y = CumSum(x, axis)", False, False),
        ("y = Tanh(x)", True, False),
        ("h = Reshape(x, one) y = Tanh(h)", True, False),
    ],
)
def test_rows_that_look_like_steps_of_a_sequence_are_spoken_of(body: str, is_cut: bool, said: bool):
    numbers = {"one": np.array([1, 2]), "axis": np.array(0), "axes": np.array([0])}
    model = session(f"g (float[N,2] x) => (float y) {{ {body} }}", **{k: v for k, v in numbers.items() if f" {k})" in body})

    found, notes = stacking(model, TWO, is_cut=is_cut)

    text = f"A row of the data is a sample, and gives other results beside another than alone. {ADVICE}"
    assert (found, notes) == ("Tanh(x)" in body, [text] * said)


def test_a_row_that_cannot_be_run_alone_is_an_error_of_the_data():
    model = session("g (float[N,2] x) => (float[2,2] y) { y = Reshape(x, two) }", two=np.array([2, 2]))

    with pytest.raises(DataError, match=rf"It was given one row of the data\. {re.escape(ADVICE)}$"):
        stacking(model, TWO, is_cut=True)
    with pytest.raises(ModelError):
        stacking(model, TWO, is_cut=False)


def test_a_model_whose_output_has_no_batch_is_fed_one_at_a_time():
    assert not can_stack(session("g (float[N,2] x) => (float y) { y = ReduceSum<keepdims = 0>(x) }"), TWO)


def test_every_output_counts():
    text = "g (float[N,2] x) => (float[N,2] y, float[N,2] z) { y = Tanh(x) z = Softmax<axis = 0>(x) }"

    assert not can_stack(session(text), TWO)


def test_every_input_must_be_free():
    text = "g (float[N,2] x, float[1,2] b) => (float[N,2] y) { y = Add(x, b) }"

    assert not can_stack(session(text), [feed | {"b": np.ones((1, 2), np.float32)} for feed in TWO])


def test_one_sample_or_two_of_different_shape_are_not_stacked():
    free = session("g (float[N,T] x) => (float[N,T] y) { y = Tanh(x) }")

    assert not can_stack(free, TWO[:1])
    assert not can_stack(free, feeds((1, 2), (1, 3)))


def test_outputs_that_are_not_numbers_are_equal_to_themselves():
    assert can_stack(session("g (float[N,2] x) => (float[N,2] y) { h = Neg(x) y = Sqrt(h) }"), TWO)


def test_a_difference_of_a_rounding_does_not_count():
    """1e-3 of the largest value: far above the order of float32 sums, far below a mix-up."""
    text = "g (float[N,2] x) => (float[N,2] y) { s = ReduceSum<keepdims = 0>(x) t = Mul(s, tiny) y = Add(x, t) }"

    assert can_stack(session(text, tiny=np.float32(1e-5)), TWO)
    assert not can_stack(session(text, tiny=np.float32(1e-1)), TWO)


# --- whether there are tokens in a fixed number ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "fixed"),
    [
        ("t = Identity(x)", True),
        ("t = Transpose<perm = [1, 0, 2]>(x)", False),  # [7, N, 4]
        ("r = Reshape(x, open) t = Transpose<perm = [1, 0, 2]>(r)", False),  # [7, ?, 4]
        ("r = Transpose<perm = [1, 0, 2]>(x) t = Compress<axis = 0>(r, kept)", False),  # [?, N, 4]
    ],
)
def test_tokens_are_fixed_only_where_samples_lie_along_the_first_axis(body: str, fixed: bool):
    constants = {"open": np.array([-1, 7, 4]), "kept": np.arange(7) < 5, "w": np.ones((4, 6), np.float32)}
    used = {key: value for key, value in constants.items() if f", {key})" in body or key == "w"}
    model = parse(f"g (float[N,7,4] x) => (float y) {{ {body} [fc] h = MatMul(t, w) y = Neg(h) }}", used, opset=21)
    prepared = prepare(model, infer_types)
    sites, samples = find_sites(prepared.graph), feeds((1, 7, 4), (1, 7, 4))

    (found,) = confirm_tokens(prepared.graph, prepared.model, sites, samples, stackable=True)

    assert found.fixed_tokens is fixed
    assert not confirm_tokens(prepared.graph, prepared.model, sites, samples, stackable=False)[0].fixed_tokens


# --- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """The numbers and the values that were read, in order."""

    indices: tuple[int, ...]
    values: tuple[float, ...]

    def __add__(self, other: Seen) -> Seen:
        return Seen(self.indices + other.indices, self.values + other.values)


def seen(name: str, batch: LiveBatch) -> Seen:
    return Seen(batch.indices, tuple(float(part.sum()) for part in batch.read(name)))


def test_reads_are_added_up_in_the_order_of_samples():
    store = Store(feeds(*[(1, 2)] * 5), batchable=True, batch_size=2)
    cut = store.cut({"xh": "x"})

    found = cut.reduce(lambda batch: seen("xh", batch))

    assert found == Seen((0, 1, 2, 3, 4), (0, 2, 4, 6, 8))


def test_a_read_may_be_computed_by_a_session():
    store = Store(feeds((1, 2), (1, 2)), batchable=True)
    twice = model("g (float[N,2] a) => (float[N,2] b) { b = Add(a, a) }")
    cut = store.cut({"f_xh": Run(twice, {"a": "x"})})

    assert cut.reduce(lambda batch: seen("f_xh", batch)).values == (0, 4)


@pytest.mark.parametrize("count", range(1, 18))
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_results_are_added_up_in_a_tree_that_does_not_depend_on_who_adds_which_part(count: int, size: int):
    parts = [str(number) for number in range(count)]

    def add(a: str, b: str) -> str:
        return f"({a} {b})"

    groups = [combine(parts[start : start + size], add) for start in range(0, count, size)]

    assert combine(groups, add) == combine(parts, add)
    assert combine(parts, add).replace("(", "").replace(")", "").split() == parts


# --- moving on -------------------------------------------------------------------------------------------------------


def test_advancing_runs_the_stretch_and_drops_what_no_one_needs():
    store = Store(feeds((1, 2), (1, 2)), batchable=True)
    half = model("g (float[N,2] a) => (float[N,2] h, float[N,2] t) { h = Add(a, a) t = Neg(a) }")

    store.advance(Run(half, {"a": "x"}), ["h"])

    (batch,) = batches(store)
    assert {name: array.tolist() for name, array in batch.live.items()} == {"h": [[0, 0], [2, 2]]}


def test_a_stretch_that_computes_nothing_keeps_what_is_needed():
    store = Store([{"x": np.zeros(1, np.float32), "z": np.ones(1, np.float32)}], batchable=False)

    store.advance(None, ["z"])

    assert list(batches(store)[0].live) == ["z"]
