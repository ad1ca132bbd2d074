"""Weights in files beside the model: read into it, or refused with a sentence that names them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper

from onnxcomp.errors import ModelError
from onnxcomp.graph import files
from onnxcomp.graph.mapped import embed
from onnxcomp.graph.weights import split_weights, tensor_bytes

TOO_SHORT = r"the weight 'w' needs 6144 bytes, but its file holds fewer\. The file is cut short or belongs to another model\.$"


@pytest.fixture(autouse=True, params=["read", "mapped"])
def how(request: pytest.FixtureRequest, external: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model so small that its weights are read, or so large that they are mapped."""
    assert external.exists()
    if request.param == "read":
        monkeypatch.setattr(files, "INLINE_LIMIT", 10**9)


def point_weight(path: Path, **entries: str) -> None:
    """Change where the weight `w` is said to lie."""
    model = onnx.load(path, load_external_data=False)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "w")
    for entry in weight.external_data:
        entry.value = entries.get(entry.key, entry.value)
    path.write_bytes(model.SerializeToString())


def test_a_missing_weight_file_is_named(external: Path):
    (external.parent / "m.onnx.data").unlink()

    text = r"m\.onnx: the weight '[wb]' cannot be read: .*m\.onnx\.data, but it .*[^.]\. Copy its file beside the model\.$"
    with pytest.raises(ModelError, match=text):
        files.load(external)
    with pytest.raises(ModelError, match=r"the weight file 'm\.onnx\.data' is missing\. Copy it beside the model\.$"):
        files.size(external)


def test_a_short_weight_file_is_refused(external: Path):
    data = external.parent / "m.onnx.data"
    data.write_bytes(data.read_bytes()[:5000])

    with pytest.raises(ModelError, match=TOO_SHORT):
        files.load(external)


def test_a_weight_that_claims_fewer_bytes_than_it_needs_is_refused(external: Path):
    point_weight(external, length="5")

    text = r"the weight 'w' needs 6144 bytes, but its file holds fewer\. The file is cut short or belongs to another model\.$"
    with pytest.raises(ModelError, match=text):
        files.load(external)


@pytest.mark.parametrize("offset", ["-1", "many", "100000"])
def test_a_weight_that_lies_nowhere_in_its_file_is_refused(external: Path, offset: str):
    point_weight(external, offset=offset)

    with pytest.raises(ModelError, match=rf"{TOO_SHORT}|the weight 'w' cannot be read: .*\. Copy its file beside the model\.$"):
        files.load(external)


def test_a_weight_without_a_length_is_read_as_far_as_it_goes(model: ModelProto, external: Path):
    loaded = onnx.load(external, load_external_data=False)
    for tensor in loaded.graph.initializer:
        kept = [entry for entry in tensor.external_data if entry.key != "length"]
        del tensor.external_data[:]
        tensor.external_data.extend(kept)
    external.write_bytes(loaded.SerializeToString())

    found = embed(files.load(external)).graph.initializer
    assert [t.raw_data for t in found] == [t.raw_data for t in model.graph.initializer]


@pytest.mark.parametrize("location", ["../outside.data", "", "a/../../outside.data"])
def test_a_weight_outside_the_models_folder_is_refused(external: Path, location: str):
    (external.parent.parent / "outside.data").write_bytes(b"\0" * 10000)
    point_weight(external, location=location)

    with pytest.raises(ModelError, match=r"the weight 'w' cannot be read: .*\. Copy its file beside the model\.$"):
        files.load(external)


def test_an_absolute_weight_path_is_refused_even_inside_the_folder(external: Path):
    point_weight(external, location=str(external.parent / "m.onnx.data"))

    with pytest.raises(ModelError, match="absolute path"):
        files.load(external)


def test_a_link_out_of_the_models_folder_is_refused(external: Path):
    outside = external.parent.parent / "outside.data"
    (external.parent / "m.onnx.data").rename(outside)
    (external.parent / "m.onnx.data").symlink_to(outside)

    with pytest.raises(ModelError, match="symbolic link"):
        files.load(external)


def test_splitting_takes_the_large_initializers_out_of_a_copy(model: ModelProto):
    before = model.SerializeToString(deterministic=True)
    model.metadata_props.add(key="author", value="me")
    model.functions.add(name="F", domain="local")

    skeleton, weights = split_weights(model, 2049)

    assert list(weights) == ["w"]
    assert [tensor.name for tensor in skeleton.graph.initializer] == ["b"]
    skeleton.graph.initializer.insert(0, weights["w"])
    assert skeleton == model
    skeleton.graph.node[0].name = "changed"
    del model.metadata_props[:], model.functions[:]
    assert model.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize(
    ("kind", "shape", "size"),
    [
        (TensorProto.FLOAT, [3, 5], 60),
        (TensorProto.FLOAT, [], 4),
        (TensorProto.INT64, [0, 7], 0),
        (TensorProto.BOOL, [9], 9),
        (TensorProto.BFLOAT16, [3], 6),
        (TensorProto.INT4, [3], 2),
        (TensorProto.UINT4, [4], 2),
        (TensorProto.STRING, [4], 0),
    ],
)
def test_the_size_of_a_tensor_is_that_of_its_packed_values(kind: int, shape: list[int], size: int):
    tensor = TensorProto(data_type=kind, dims=shape)

    assert tensor_bytes(tensor) == size
    if kind != TensorProto.STRING:
        made = helper.make_tensor("t", kind, shape, np.zeros(shape))
        assert len(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(made)).raw_data) == size
