"""ONNX Runtime behind our own names: sessions, inferred types, optimized models and timing, on tiny models."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx.parser
import pytest
from onnx import ModelProto, numpy_helper

from onnxcomp import runtime
from onnxcomp.errors import ModelError
from onnxcomp.graph.types import TensorType
from onnxcomp.runtime import Session

F32 = np.dtype(np.float32)
MODELS = ("cifar10_resnet20", "kwt1", "mnist", "mobilenet_v2_1.0_224", "stories260k", "vit_tiny_patch16_224")


def parse(text: str, **weights: np.ndarray) -> ModelProto:
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> {text}')
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    return model


def linear(width: int = 4, depth: int = 1) -> bytes:
    """`depth` products of [N, width] with the identity."""
    names = [f"h{i}" for i in range(depth)]
    nodes = " ".join(f"{y} = MatMul({x}, w)" for x, y in zip(["x", *names], [*names[:-1], "y"], strict=False))
    text = f"linear (float[N,{width}] x) => (float[N,{width}] y) {{ {nodes} }}"
    return parse(text, w=np.eye(width, dtype=np.float32)).SerializeToString()


def feed(width: int = 4) -> dict[str, np.ndarray]:
    return {"x": np.arange(2 * width, dtype=np.float32).reshape(2, width)}


def test_a_session_knows_its_inputs_and_outputs_in_order():
    text = "g (float[N,2] b, int64[3] a) => (bool[N,2] y, float[N,2] z) { y = Greater(b, zero)  z = Abs(b) }"

    session = Session(parse(text, zero=np.zeros(1, np.float32)).SerializeToString())

    assert session.inputs == (("b", TensorType(F32, ("N", 2))), ("a", TensorType(np.dtype(np.int64), (3,))))
    assert session.outputs == (("y", TensorType(np.dtype(bool), ("N", 2))), ("z", TensorType(F32, ("N", 2))))


def test_a_run_gives_all_outputs_by_name():
    model = parse("g (float[N] x) => (float[N] y, float[N] z) { y = Neg(x)  z = Abs(x) }").SerializeToString()
    session = Session(model)

    found = session.run({"x": np.float32([1, -2])})

    assert {name: list(value) for name, value in found.items()} == {"y": [-1, 2], "z": [1, 2]}


@pytest.mark.parametrize("optimize", [True, False])
@pytest.mark.parametrize("as_path", [str, Path])
def test_a_session_opens_a_path(tmp_path: Path, optimize: bool, as_path: type):
    path = tmp_path / "model.onnx"
    path.write_bytes(linear())

    y = Session(as_path(path), optimize=optimize, threads=1).run(feed())["y"]

    np.testing.assert_array_equal(y, feed()["x"])


def test_what_cannot_be_loaded_is_a_model_error_with_one_sentence(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    absent = tmp_path / "absent.onnx"
    unknown = parse("g (float[N] x) => (float[N] y) { y = Unheard(x) }").SerializeToString()

    # On a CPU without VNNI the model is looked into first.
    text = r"^(ONNX Runtime cannot load the model: .* protobuf parsing failed|The bytes given: not an ONNX model, [^\n]*)\.$"
    with pytest.raises(ModelError, match=text):
        Session(b"no model")
    text = rf"^(ONNX Runtime cannot load {absent}: [^\n]*File doesn't exist|{absent} does not exist)\.$"
    with pytest.raises(ModelError, match=text):
        Session(absent)
    with pytest.raises(ModelError, match=r"^ONNX Runtime cannot load the model: [^\n]*No Op registered for Unheard "):
        Session(unknown)

    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ({}, r"Required inputs \(\['x'\]\) are missing from input feed \(\[\]\)\."),
        ({"x": np.zeros((2, 4), np.float32), "u": np.zeros(1)}, r"Invalid input name: u\."),
        ({"x": np.zeros((2, 4))}, r"Unexpected input data type\. Actual: \(tensor\(double\)\) , .*float\)\)\."),
        ({"x": np.zeros(4, np.float32)}, r"Invalid rank for input: x Got: 1 Expected: 2 Please fix .* the model\."),
        (
            {"x": np.zeros((2, 5), np.float32)},
            r"Got invalid dimensions for input: x for the following indices: index: 1 Got: 5 Expected: 4\.",
        ),
    ],
    ids=["missing", "unknown", "type", "rank", "shape"],
)
def test_what_cannot_be_run_is_a_model_error_with_one_sentence(
    bad: dict[str, np.ndarray], text: str, capfd: pytest.CaptureFixture[str]
):
    session = Session(linear())

    with pytest.raises(ModelError, match=rf"^ONNX Runtime cannot run the model: {text}$"):
        session.run(bad)

    assert capfd.readouterr() == ("", "")


def test_a_failure_inside_an_operator_names_it_without_source_positions():
    model = parse("g (float[N] x, float[M] z) => (float[N] y) { [sum] y = Add(x, z) }").SerializeToString()

    with pytest.raises(ModelError) as error:
        Session(model).run({"x": np.zeros(2, np.float32), "z": np.zeros(3, np.float32)})

    text = str(error.value)
    assert text.startswith("ONNX Runtime cannot run the model: Non-zero status code returned while running Add node.")
    assert "Name:'sum'" in text
    assert not any(trace in text for trace in ("\n", ".cc", ".h:", "[ONNXRuntimeError]"))


def test_types_of_all_tensors_are_inferred_with_their_symbols():
    text = """g (float[N,4] x) => (float[N,4] y) {
        h = MatMul(x, w)
        s = Shape(h)
        t = Reshape(h, open)
        y = Relu(h)
    }"""

    types = runtime.infer_types(parse(text, w=np.eye(4, dtype=np.float32), open=np.array([2, -1])))

    assert types == {
        "x": TensorType(F32, ("N", 4)),
        "h": TensorType(F32, ("N", 4)),
        "s": TensorType(np.dtype(np.int64), (2,)),
        "t": TensorType(F32, (2, None)),
        "y": TensorType(F32, ("N", 4)),
    }


def test_types_need_no_weights_but_come_out_the_same():
    """Large weights become inputs of the model that is inferred; they are no inputs of the model that was given."""
    text = "g (float[N,64] x) => (float[N,32] y) { c = Cast<to = 3>(codes)  w = DequantizeLinear(c, s)  y = MatMul(x, w) }"
    codes = np.zeros((64, 32), ml_dtypes.int4)

    types = runtime.infer_types(parse(text, codes=codes, s=np.float32(1)))

    assert set(types) == {"x", "c", "w", "y"}
    assert types["c"] == TensorType(np.dtype(np.int8), (64, 32))
    assert types["y"] == TensorType(F32, ("N", 32))


def test_types_of_absent_outputs_bodies_and_sequences():
    text = """g (float[4] x, bool flag) => (float[4] y) {
        top, unused = Dropout(x)
        parts = SplitToSequence(x)
        y = If (flag) <
            then_branch = one () => (float[4] inner) { inner = Neg(top) },
            else_branch = two () => (float[4] other) { other = Identity(top) }
        >
    }"""
    model = parse(text)
    model.graph.node[0].output[1] = ""

    types = runtime.infer_types(model)

    assert set(types) == {"x", "flag", "top", "parts", "y"}
    assert types["parts"].dtype is None
    assert types["y"] == TensorType(F32, (4,))


def test_types_of_a_file_with_its_weights_beside_it(tmp_path: Path):
    path = tmp_path / "model.onnx"
    onnx.save(onnx.load_from_string(linear(32)), path, save_as_external_data=True, location="weights")

    assert runtime.infer_types(path)["y"] == TensorType(F32, ("N", 32))


def test_an_optimized_model_shows_what_is_executed(capfd: pytest.CaptureFixture[str]):
    model = parse("g (float[2,4] x) => (float[2,4] y) { [mm] h = MatMul(x, w)  [bias] y = Add(h, b) }",
                  w=np.eye(4, dtype=np.float32), b=np.ones(4, np.float32))  # fmt: skip

    (node,) = runtime.optimized(model.SerializeToString())

    assert (node.op_type, node.domain, node.input, node.output) == ("Gemm", "", ["x", "w", "b"], ["y"])
    assert capfd.readouterr() == ("", "")


def test_an_optimized_model_is_read_from_a_file_with_its_weights_beside_it(tmp_path: Path):
    path = tmp_path / "model.onnx"
    onnx.save(onnx.load_from_string(linear(32)), path, save_as_external_data=True, location="weights")

    nodes = runtime.optimized(path)

    assert [node.op_type for node in nodes] == ["MatMul"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "weights"]


def test_latencies_are_ratios_to_the_first_model():
    first, same, deep = runtime.measure([linear(64), linear(64), linear(64, 60)], [feed(64)], rounds=5)

    assert (first.ratio, first.ratio_low, first.ratio_high) == (1, 1, 1)
    for latency in (first, same, deep):
        assert 0 < latency.low_ms <= latency.median_ms <= latency.high_ms
        assert latency.ratio_low <= latency.ratio <= latency.ratio_high
    # 60 products instead of one: the constant cost of a run leaves far more than a factor of two between them.
    assert deep.ratio > 2 * same.ratio


def test_measuring_goes_through_all_feeds():
    with pytest.raises(ModelError, match=r"^ONNX Runtime cannot run the model: Invalid rank for input: x"):
        runtime.measure([linear()], [feed(), {"x": np.zeros(4, np.float32)}], rounds=1)


def test_a_profile_lists_operator_types_by_cost():
    text = "g (float[200,200] x) => (float[200,200] y) { h = MatMul(x, x)  [tanh] t = Tanh(h)  y = MatMul(t, x) }"
    model = parse(text).SerializeToString()

    costs = runtime.profile(model, {"x": np.zeros((200, 200), np.float32)})

    assert {op for op, _ in costs} == {"MatMul", "Tanh"}
    assert [ms for _, ms in costs] == sorted((ms for _, ms in costs), reverse=True)
    assert all(ms > 0 for _, ms in costs)


def test_a_profile_of_a_bad_feed_is_a_model_error():
    with pytest.raises(ModelError, match=r"^ONNX Runtime cannot run the model: Required inputs \(\['x'\]\)"):
        runtime.profile(linear(), {})


@pytest.mark.real
@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_of_a_real_model_has_a_type(data_dir: Path, name: str):
    path = data_dir / f"{name}.onnx"

    types = runtime.infer_types(path)

    produced = {output for node in onnx.load(path).graph.node for output in node.output}
    assert produced <= set(types)
    assert [tensor for tensor, kind in types.items() if kind.dtype is None or kind.shape is None] == []
