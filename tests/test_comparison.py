from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx.parser
import pytest
from onnx import ModelProto, numpy_helper

from onnxcomp.comparison import compare
from onnxcomp.errors import DataError, ModelError
from onnxcomp.report.model import Comparison

Array = np.ndarray
HEADER = '<ir_version: 10, opset_import: ["" : 21]>'


def model(body: str, **weights: Array) -> ModelProto:
    parsed = onnx.parser.parse_model(HEADER + body)
    parsed.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    return parsed


def linear(w: Array, *, batch: str = "N") -> ModelProto:
    """y = x w"""
    rows, columns = w.shape
    return model(f"net (float[{batch},{rows}] x) => (float[{batch},{columns}] y) {{ y = MatMul(x, w) }}", w=w)


def shifted(shift: Array) -> ModelProto:
    """y = x + shift, on samples of four numbers."""
    return model("net (float[N,4] x) => (float[N,4] y) { y = Add(x, shift) }", shift=shift)


NOTHING = np.zeros(4, np.float32)
EYE = np.eye(4, dtype=np.float32)


def only(found: Comparison) -> tuple[float | None, float | None, float | None]:
    output, *_ = found.outputs
    return output.sqnr_db, output.cosine, output.agreement


def test_equal_models_are_equal(rng: np.random.Generator) -> None:
    x = rng.normal(size=(7, 4)).astype(np.float32)

    found = compare(shifted(NOTHING), shifted(NOTHING), x)

    assert only(found) == (200.0, pytest.approx(1.0, abs=1e-15), 1.0)
    assert found.samples == 7
    assert found.accuracy is None


def test_sqnr_and_cosine_follow_their_formulas(rng: np.random.Generator) -> None:
    shift = np.array([0.5, 0, -0.25, 0], np.float32)
    x = np.round(rng.normal(size=(9, 4)) * 4).astype(np.float32) + 1
    r, o = x.astype(np.float64), x.astype(np.float64) + shift

    sqnr, cosine, _ = only(compare(shifted(NOTHING), shifted(shift), x))

    # Quarters of small whole numbers: every sum is exact, in any order.
    assert sqnr == 10 * math.log10(np.square(r).sum() / np.square(r - o).sum())
    cosines = (r * o).sum(1) / np.sqrt(np.square(r).sum(1) * np.square(o).sum(1))
    assert cosine == pytest.approx(cosines.mean(), abs=1e-15)


def test_agreement_is_the_share_of_equal_answers() -> None:
    """Swapping the first two classes changes the answers of exactly those samples that had one of them."""
    x = np.eye(4, dtype=np.float32)[[0, 1, 2, 3, 2]]

    found = compare(linear(EYE), linear(EYE[[1, 0, 2, 3]]), x)

    assert found.outputs[0].agreement == 3 / 5
    assert found.outputs[0].answers == 5


def test_every_position_of_a_rank_3_output_is_an_answer() -> None:
    body = "net (float[N,T,4] x) => (float[N,T,4] y) { y = MatMul(x, w) }"
    x = np.eye(4, dtype=np.float32)[[[0, 2, 3], [1, 1, 3]]]

    found = compare(model(body, w=EYE), model(body, w=EYE[[1, 0, 2, 3]]), x)

    assert (found.outputs[0].agreement, found.outputs[0].answers) == (3 / 6, 6)


def test_accuracy_counts_lost_and_gained_answers() -> None:
    x = np.eye(4, dtype=np.float32)[[0, 0, 0, 1, 2, 3]]
    labels = np.array([0, 0, 1, 1, 2, 0])

    found = compare(linear(EYE), linear(EYE[[1, 0, 2, 3]]), x, labels=labels).accuracy

    assert found is not None
    assert (found.output, found.answers, found.lost, found.gained) == ("y", 6, 3, 1)
    assert (found.reference, found.other) == (4 / 6, 2 / 6)
    assert found.drop_points == 100 * 2 / 6
    # Per sample the loss is 1, -1 or 0; its variance over the samples is (3 + 1)/6 - (2/6)^2, that of the mean a sixth.
    assert found.standard_error == pytest.approx(100 * math.sqrt((4 / 6 - (2 / 6) ** 2) / 6), rel=1e-12)


def test_labels_in_the_data_are_used(tmp_path: Path) -> None:
    np.savez(tmp_path / "test.npz", x=EYE, y=np.array([0, 1, 2, 2]))

    found = compare(shifted(NOTHING), shifted(NOTHING), tmp_path / "test.npz")

    assert found.accuracy is not None
    assert found.accuracy.reference == 3 / 4


def test_targets_in_the_data_that_name_no_classes_are_left_alone(tmp_path: Path) -> None:
    np.savez(tmp_path / "test.npz", x=EYE, y=np.array([0.5, 1, 2, 2]))

    assert compare(shifted(NOTHING), shifted(NOTHING), tmp_path / "test.npz").accuracy is None


def test_labels_per_token_fit_a_rank_3_output() -> None:
    body = "net (float[N,T,4] x) => (float[N,T,4] y) { y = Identity(x) }"
    x = np.eye(4, dtype=np.float32)[[[0, 2, 3], [1, 1, 3]]]

    found = compare(model(body), model(body), x, labels=np.array([[0, 2, 0], [1, 1, 3]])).accuracy

    assert found is not None
    assert (found.answers, found.reference) == (6, 5 / 6)


def test_an_integer_output_is_an_answer_itself() -> None:
    body = "net (float[N,4] x) => (int64[N] y) { h = MatMul(x, w)\n y = ArgMax<axis = -1, keepdims = 0>(h) }"

    found = compare(model(body, w=EYE), model(body, w=EYE[[1, 0, 2, 3]]), EYE, labels=np.arange(4))

    assert only(found) == (None, None, 0.5)
    assert found.accuracy is not None
    assert found.accuracy.other == 0.5


def test_an_output_of_one_number_has_no_answer(rng: np.random.Generator) -> None:
    w = rng.normal(size=(4, 1)).astype(np.float32)

    assert compare(linear(w), linear(w), EYE).outputs[0].agreement is None


def test_one_number_per_sample_is_no_answer() -> None:
    body = "net (float[N,4] x) => (float[N] y) { y = ReduceSum<keepdims = 0>(x, last) }"
    net = model(body, last=np.array([-1]))

    assert only(compare(net, net, EYE)) == (200.0, 1.0, None)


def test_nan_of_the_other_model_is_counted_and_ruins_the_sqnr() -> None:
    body = "net (float[N,4] x) => (float[N,4] y) { y = Log(x) }"
    x = np.array([[1, 2, 3, 4], [1, -2, 3, -4]], np.float32)

    found = compare(shifted(NOTHING), model(body), x).outputs[0]

    assert (found.not_finite, found.sqnr_db) == (2, -math.inf)


def test_what_is_infinite_in_the_reference_is_no_signal_and_no_error() -> None:
    """A mask: -inf in both, or a large negative number in the other model."""
    mask = np.array([0, 0, 0, -np.inf], np.float32)

    assert only(compare(shifted(mask), shifted(mask), EYE)) == (200.0, 1.0, 1.0)
    assert only(compare(shifted(mask), shifted(np.float32([0, 0, 0, -1e4])), EYE)) == (200.0, 1.0, 1.0)


def test_all_zero_outputs_are_equal() -> None:
    zero = np.zeros((4, 2), np.float32)

    assert only(compare(linear(zero), linear(zero), EYE)) == (200.0, 1.0, 1.0)


def test_noise_where_the_reference_is_zero_has_the_worst_sqnr() -> None:
    assert only(compare(linear(0 * EYE), linear(EYE), EYE))[:2] == (-math.inf, 0.0)


def test_batches_change_nothing(rng: np.random.Generator) -> None:
    """Whether the model's batch is fixed at 1 or free. The sums here are exact."""
    w = np.round(rng.normal(size=(4, 4)) * 4).astype(np.float32)
    other = w + np.round(rng.normal(size=(4, 4)))
    x = np.round(rng.normal(size=(50, 4)) * 4).astype(np.float32)

    stacked = compare(linear(w), linear(other.astype(np.float32)), x)
    single = compare(linear(w, batch="1"), linear(other.astype(np.float32), batch="1"), x)

    assert stacked.outputs == single.outputs


def test_ranges_measured_at_run_time_are_measured_per_sample(rng: np.random.Generator) -> None:
    """Samples of very different size: run together, the small ones would be quantized with the large ones' range."""

    def dynamic(batch: str) -> ModelProto:
        body = f"""net (float[{batch},4] x) => (float[{batch},4] y) {{
            q, s, z = DynamicQuantizeLinear(x)
            y = DequantizeLinear(q, s, z)
        }}"""
        return model(body)

    x = (rng.normal(size=(8, 4)) * np.array([1, 1, 1, 100, 1, 1, 1, 1])[:, None]).astype(np.float32)

    free = compare(shifted(NOTHING), dynamic("N"), x)
    single = compare(shifted(NOTHING), dynamic("1"), x)

    assert free.outputs == single.outputs


def test_samples_of_different_lengths_are_compared() -> None:
    body = "net (float[N,T,2] x) => (float[N,T,2] y) { y = Identity(x) }"
    feeds = [{"x": np.ones((1, length, 2), np.float32)} for length in (3, 3, 5, 4)]

    found = compare(model(body), model(body), feeds)

    assert (found.samples, found.outputs[0].answers) == (4, 15)


def test_limit_keeps_that_many_samples_with_their_labels() -> None:
    x, labels = np.repeat(EYE, 5, axis=0), np.repeat(np.arange(4), 5)

    found = compare(shifted(NOTHING), shifted(NOTHING), x, labels=labels, limit=6)

    assert found.samples == 6
    assert found.accuracy is not None
    assert (found.accuracy.answers, found.accuracy.reference) == (6, 1.0)


def test_progress_ends_with_all_samples() -> None:
    calls: list[tuple[str, int, int]] = []

    compare(shifted(NOTHING), shifted(NOTHING), EYE, progress=lambda *call: calls.append(call))

    assert calls[-1] == ("comparing", 4, 4)


def test_models_are_named_by_their_paths_and_measured_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(shifted(NOTHING), path)

    found = compare(path, shifted(NOTHING), EYE)

    assert (found.reference, found.other) == (str(path), "model")
    assert found.reference_bytes == path.stat().st_size


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            model("net (float[N,4] z) => (float[N,4] y) { y = Identity(z) }"),
            "The models have different inputs: x against z.",
        ),
        (
            model("net (float[N,4] x) => (float[N,4] z) { z = Identity(x) }"),
            "The models have different outputs: y against z.",
        ),
        (
            model("net (double[N,4] x) => (double[N,4] y) { y = Identity(x) }"),
            "Input 'x' is float32 in the one model and float64 in the other. Only models that take the same tensors "
            "can be compared.",
        ),
        (
            model("net (float[N,4] x) => (float[N,1,4] y) { y = Unsqueeze(x, one) }", one=np.array([1])),
            "Output 'y' has shapes [1, 4] and [1, 1, 4] in the two models, so they cannot be compared.",
        ),
    ],
)
def test_models_that_do_not_match_are_refused(other: ModelProto, message: str) -> None:
    with pytest.raises(ModelError) as error:
        compare(shifted(NOTHING), other, EYE)

    assert str(error.value) == message


def test_an_input_that_is_no_tensor_is_refused() -> None:
    sequence = model("net (seq(float[4]) x) => (float[M] y) { y = ConcatFromSequence<axis = 0>(x) }")

    with pytest.raises(ModelError) as error:
        compare(sequence, sequence, EYE)

    assert str(error.value) == "Input 'x' is not a tensor, so it cannot be fed."


@pytest.mark.parametrize(
    ("columns", "labels", "message"),
    [
        (4, np.array([0.5, 1, 2, 3]), "labels: 1; answers: 1 in 'y'."),
        (4, np.zeros((4, 2), np.int64), "labels: 2; answers: 1 in 'y'."),
        (1, np.arange(4), "labels: 1; answers: none."),
    ],
)
def test_labels_that_do_not_fit_are_refused(columns: int, labels: Array, message: str) -> None:
    net = linear(EYE[:, :columns])

    with pytest.raises(DataError) as error:
        compare(net, net, EYE, labels=labels)

    assert str(error.value) == f"The labels do not fit: one whole number per answer is needed. The first sample has {message}"
