"""The small models and their data: what the files hold, and that the scripts are where they come from."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, helper, numpy_helper

from onnxcomp.export import export
from onnxcomp.runtime import Session

FOLDER = Path(__file__).resolve().parents[1] / "models"
NAMES = ("vit_digits", "cnn_digits")


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def load(name: str) -> ModelProto:
    return onnx.load(FOLDER / f"{name}.onnx")


def constants(model: ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def attribute(node: NodeProto, name: str) -> object:
    return next(helper.get_attribute_value(a) for a in node.attribute if a.name == name)


def test_all_files_are_there_and_small():
    wanted = {
        "README.md",
        "data.py",
        "digits_calib.npz",
        "digits_test.npz",
        "train_cnn.py",
        "train_vit.py",
        "training.py",
    }
    wanted |= {f"{name}{ending}" for name in NAMES for ending in (".onnx", ".md")}
    files = [path for path in FOLDER.iterdir() if path.is_file()]

    assert {path.name for path in files} >= wanted
    assert sum(path.stat().st_size for path in files) < 2 * 2**20


@pytest.mark.parametrize(("file", "count"), [("digits_calib.npz", 256), ("digits_test.npz", 1000)])
def test_the_data_fit_both_models_as_they_are(file: str, count: int):
    with np.load(FOLDER / file) as data:
        x, y = data["x"], data["y"]

    assert (x.shape, x.dtype) == ((count, 1, 16, 16), np.float16)
    assert (y.shape, y.dtype) == ((count,), np.int64)
    assert (x.min(), x.max()) == (0, 1)
    assert np.array_equal(x * 32, np.round(x * 32))
    assert set(y.tolist()) == set(range(10))


def test_the_accuracy_is_what_the_card_says(name: str):
    with np.load(FOLDER / "digits_test.npz") as data:
        x, y = data["x"].astype(np.float32), data["y"]
    logits = Session(FOLDER / f"{name}.onnx", threads=1).run({"x": x})["output"]
    card = re.search(r"fp32 accuracy [^|]*\| ([\d.]+)% \((\d+) of 1000\)", (FOLDER / f"{name}.md").read_text())

    assert card is not None
    assert int((logits.argmax(axis=1) == y).sum()) == int(card[2]) == round(10 * float(card[1]))
    # Rounding on another processor moves a logit by a few 1e-6 of the largest: the count cannot depend on it.
    second, first = np.sort(logits, axis=1)[:, -2:].T
    assert (first - second).min() > 1e-4 * np.abs(logits).max()


def test_the_card_gives_the_size_of_the_file(name: str):
    card = (FOLDER / f"{name}.md").read_text()

    assert f"| {(FOLDER / f'{name}.onnx').stat().st_size:,} bytes, opset 20 |" in card


def test_models_are_valid_and_take_any_batch(name: str):
    model = load(name)

    onnx.checker.check_model(model, full_check=True)
    (batch, *sizes) = model.graph.input[0].type.tensor_type.shape.dim
    assert (batch.dim_param, [size.dim_value for size in sizes]) == ("batch", [1, 16, 16])
    for count in (1, 3):
        feed = {"x": np.zeros((count, 1, 16, 16), np.float32)}
        assert Session(FOLDER / f"{name}.onnx").run(feed)["output"].shape == (count, 10)


def test_the_cnn_has_what_a_quantizer_must_handle():
    model = load("cnn_digits")
    weights, nodes = constants(model), model.graph.node
    ops = Counter(node.op_type for node in nodes)
    convs = [node for node in nodes if node.op_type == "Conv"]
    clips = [node for node in nodes if node.op_type == "Clip"]

    assert ops["BatchNormalization"] == ops["Conv"] == 13
    assert sum(attribute(node, "group") == weights[node.input[1]].shape[0] for node in convs) == 3
    assert sum(attribute(node, "strides") == [2, 2] for node in convs) == 2
    assert len(clips) == 10
    assert all((weights[node.input[1]], weights[node.input[2]]) == (0, 6) for node in clips)
    adds = [node for node in nodes if node.op_type == "Add"]
    assert len(adds) == 3
    assert not any(name in weights for node in adds for name in node.input)
    assert (ops["AveragePool"], ops["Gemm"]) == (1, 1)


def test_the_vit_has_what_a_quantizer_must_handle():
    model = load("vit_digits")
    weights, nodes = constants(model), model.graph.node
    ops = Counter(node.op_type for node in nodes)
    linear = [node for node in nodes if node.op_type == "MatMul" and node.input[1] in weights]
    products = [node for node in nodes if node.op_type == "MatMul" and node.input[1] not in weights]

    assert ops["LayerNormalization"] == 9
    assert ops["Gelu"] == ops["Softmax"] == 4
    assert (len(linear), len(products)) == (16, 8)
    assert (weights["cls_token"].shape, weights["pos_embed"].shape) == ((1, 1, 64), (1, 17, 64))
    assert any("pos_embed" in node.input and node.op_type == "Add" for node in nodes)


def test_activations_have_outlier_channels():
    """They are what the models are for: the loudest channel is many times louder than the middle one."""
    model = load("vit_digits")
    norms = [node for node in model.graph.node if node.op_type == "LayerNormalization"]
    gains = [np.abs(constants(model)[node.input[1]]) for node in norms]

    assert all(gain.max() > 4 * np.median(gain) for gain in gains)


@pytest.fixture(scope="module")
def drawing() -> ModuleType:
    """models/data.py."""
    if find_spec("sklearn") is None:
        pytest.skip("needs scikit-learn: pip install 'onnxcomp[test]'")
    spec = importlib.util.spec_from_file_location("digits_data", FOLDER / "data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "digits_data", module)
        spec.loader.exec_module(module)
    return module


def test_no_digit_serves_two_purposes(drawing: ModuleType):
    parts = [{picture.tobytes() for picture in part.pictures} for part in drawing.split()]

    assert [len(part) for part in parts] == [1169, 128, 500]
    assert not parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]


def test_the_script_draws_the_files_again(drawing: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(drawing, "CALIBRATION_FILE", tmp_path / "digits_calib.npz")
    monkeypatch.setattr(drawing, "TEST_FILE", tmp_path / "digits_test.npz")
    drawing.main()

    for file in ("digits_calib.npz", "digits_test.npz"):
        with np.load(tmp_path / file) as new, np.load(FOLDER / file) as old:
            assert np.array_equal(new["y"], old["y"])
            # Another processor may round the last bit the other way, which moves a pixel by one grey level.
            assert np.abs(new["x"] - old["x"]).max() <= 1 / 32


@pytest.mark.skipif(
    any(find_spec(package) is None for package in ("torch", "onnxscript", "sklearn")),
    reason="needs torch, onnxscript and scikit-learn: pip install 'onnxcomp[torch,test]'",
)
@pytest.mark.parametrize(
    ("name", "factory"),
    [("vit_digits", "models.train_vit:VisionTransformer"), ("cnn_digits", "models.train_cnn:ConvolutionalNetwork")],
)
def test_the_scripts_build_the_graphs_of_the_files(name: str, factory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(FOLDER.parent)
    export(factory, ["x=1x1x16x16"], dynamic=["batch"], output=tmp_path / "m.onnx")

    def outline(model: ModelProto) -> list[tuple[str, str, list[str]]]:
        return [(node.name, node.op_type, list(node.output)) for node in model.graph.node]

    assert outline(onnx.load(tmp_path / "m.onnx")) == outline(load(name))
