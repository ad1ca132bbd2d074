from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx.parser
import pytest

from onnxcomp.bench import bench, made_up
from onnxcomp.errors import ModelError, UsageError
from onnxcomp.graph.types import TensorType

HEADER = '<ir_version: 10, opset_import: ["" : 21]>'


@pytest.fixture
def net(tmp_path: Path) -> Path:
    return save(tmp_path / "net.onnx", "net (float[N,4] x) => (float[N,4] y) { y = Tanh(x) }")


def save(path: Path, text: str) -> Path:
    onnx.save(onnx.parser.parse_model(HEADER + text), path)
    return path


def session(*inputs: tuple[str, type, tuple[int | str | None, ...] | None]) -> Any:
    """What takes such inputs and runs on anything."""
    ports = [(name, TensorType(np.dtype(kind), shape)) for name, kind, shape in inputs]
    return SimpleNamespace(inputs=ports, run=lambda feed: {})


def test_models_are_timed_against_the_first(net: Path) -> None:
    found = bench([net, net], rounds=2)

    assert [timing.model for timing in found.models] == [str(net), str(net)]
    assert found.models[0].ratio == 1.0
    assert all(0 < t.low_ms <= t.median_ms <= t.high_ms for t in found.models)
    assert all(t.file_bytes == net.stat().st_size and t.operators == () for t in found.models)


def test_operators_are_timed_when_asked_for(net: Path) -> None:
    (timing,) = bench([net], rounds=1, operators=True).models

    assert [operator.op for operator in timing.operators] == ["Tanh"]


def test_a_free_dimension_is_one_and_said_to_be(net: Path) -> None:
    found = bench([net], rounds=1)

    assert found.notes == ("Input 'x' is float32[N, 4]; timed with 1x4. Change it with --shape.",)


def test_given_shapes_and_data_need_no_note(net: Path) -> None:
    assert bench([net], shapes={"x": (8, 4)}, rounds=1).notes == ()
    assert bench([net], np.ones((3, 4), np.float32), rounds=1).notes == ()


def test_made_up_numbers_are_normal_for_floats_and_one_for_integers() -> None:
    notes: list[str] = []
    inputs = [("a", np.float32, (100, 100)), ("b", np.int64, (2, 3)), ("c", np.bool_, (2,)), ("d", np.float16, ())]

    feed = made_up(session(*inputs), {}, notes)

    assert notes == []
    # Of n standard normal numbers the mean has a standard error of 1/sqrt(n), the spread one of 1/sqrt(2n): 5 of them.
    assert abs(feed["a"].mean()) < 5 / 100
    assert abs(feed["a"].std() - 1) < 5 / 141
    assert (feed["b"] == 1).all()
    assert feed["c"].all()
    assert [array.dtype for array in feed.values()] == [np.dtype(kind) for _, kind, _ in inputs]
    assert feed["d"].shape == ()


@pytest.mark.parametrize(
    ("shapes", "shape", "message"),
    [
        ({"z": (1, 4)}, ("N", 4), "--shape z: the model has no such input. Its inputs are: x."),
        ({"x": (1, 5)}, ("N", 4), "--shape x=1x5 does not fit the model's float32[N, 4]."),
        ({"x": (4,)}, ("N", 4), "--shape x=4 does not fit the model's float32[N, 4]."),
        ({}, None, "Input 'x' has no known rank. Pass its shape as --shape x=1x3x224x224."),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    shapes: dict[str, tuple[int, ...]], shape: tuple[int | str | None, ...] | None, message: str
) -> None:
    with pytest.raises(UsageError) as error:
        made_up(session(("x", np.float32, shape)), shapes, [])

    assert str(error.value) == message


def test_models_with_other_inputs_are_refused(net: Path, tmp_path: Path) -> None:
    other = save(tmp_path / "other.onnx", "net (float[N,4] z) => (float[N,4] y) { y = Tanh(z) }")

    with pytest.raises(UsageError) as error:
        bench([net, other])

    assert str(error.value) == f"{other} takes z, but {net} takes x."


def test_an_input_that_takes_neither_numbers_nor_strings_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "many.onnx", "net (seq(float[N]) x) => (seq(float[N]) y) { y = Identity(x) }")

    with pytest.raises(ModelError) as error:
        bench([path])

    assert str(error.value) == "Input 'x' is no tensor of numbers or strings, so it cannot be fed."


def test_strings_are_made_up_too(tmp_path: Path) -> None:
    path = save(tmp_path / "text.onnx", "net (string[N] x) => (string[N] y) { y = Identity(x) }")

    assert [timing.model for timing in bench([path]).models] == [str(path)]
