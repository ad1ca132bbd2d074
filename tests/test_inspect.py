from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx.parser
import pytest
from onnx import ModelProto, numpy_helper

from onnxcomp.errors import ModelError
from onnxcomp.inspect import inspect
from onnxcomp.report.json import to_stored
from onnxcomp.report.model import Count, FoundSite, Report, Verification

REPORT = Report(
    version="0.1.0",
    model_name="net.onnx",
    model_sha256="ab",
    model_bytes=1000,
    output_bytes=0,
    data_sha256=None,
    samples=0,
    target="ort-x86",
    recipe='name = "auto"\n',
    requirements=(),
    sites=(),
    kernels_by="onnxruntime 1.31.1",
    skipped=(),
    decisions=(),
    verification=Verification("full", "onnxruntime 1.31.1", 1, 200.0, 30.0, None),
    notes=(),
)


def save(folder: Path, text: str, metadata: dict[str, str] | None = None, **weights: np.ndarray) -> Path:
    model: ModelProto = onnx.parser.parse_model(text)
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    model.producer_name, model.producer_version = "maker", "3"
    for key, value in (metadata or {}).items():
        model.metadata_props.add(key=key, value=value)
    path = folder / "net.onnx"
    onnx.save(model, path)
    return path


FLOAT = """<ir_version: 8, opset_import: ["" : 13]> net (float[N,3,8,8] x) => (float[N,8,5] y) {
    [stem] c = Conv(x, w)
    r = Relu(c)
    f = Reshape(c, flat)
    g = Reshape(r, flat)
    t = Transpose<perm = [0, 2, 1]>(f)
    [scores] s = MatMul(g, t)
    [head] y = MatMul(s, v)
}"""
QUANTIZED = """<ir_version: 8, opset_import: ["" : 13, "com.microsoft" : 1]> net (float[N,4] x) => (float[N,4] y) {
    q = QuantizeLinear(x, s, z)
    y = DequantizeLinear(q, s, z)
}"""


@pytest.fixture
def float_path(tmp_path: Path, rng: np.random.Generator) -> Path:
    w, v = rng.normal(size=(8, 3, 1, 1)), rng.normal(size=(8, 5))
    return save(tmp_path, FLOAT, w=w.astype(np.float32), v=v.astype(np.float32), flat=np.array([0, 8, 64]))


def test_sites_of_a_float_model_are_found_with_their_weights(float_path: Path) -> None:
    found = inspect(float_path)

    assert found.sites == (
        FoundSite("stem", "Conv", "layer", (8, 3, 1, 1)),
        FoundSite("scores", "MatMul", "product", None),
        FoundSite("head", "MatMul", "layer", (8, 5)),
    )
    assert found.report is None
    assert found.quantization == ()


def test_what_the_file_is_made_of(float_path: Path) -> None:
    found = inspect(float_path)

    assert (found.opset, found.domains, found.producer) == (13, (), "maker 3")
    assert found.inputs == ("x float32[N, 3, 8, 8]",)
    assert found.outputs == ("y float32[N, 8, 5]",)
    assert found.parameters == 8 * 3 + 8 * 5 + 3
    assert found.file_bytes == float_path.stat().st_size
    assert found.operators[:2] == (Count("MatMul", 2), Count("Reshape", 2))
    assert found.notes == ()


def test_quantization_already_present_is_named(tmp_path: Path) -> None:
    path = save(tmp_path, QUANTIZED, s=np.float32(0.1), z=np.uint8(3))

    found = inspect(path)

    assert found.quantization == (Count("DequantizeLinear", 1), Count("QuantizeLinear", 1))
    assert found.sites == ()
    assert found.domains == ("com.microsoft 1",)


def test_our_own_report_is_read_back_with_the_size_of_the_file(tmp_path: Path) -> None:
    path = save(tmp_path, QUANTIZED, {"onnxcomp.report": to_stored(REPORT)}, s=np.float32(0.1), z=np.uint8(3))

    found = inspect(path)

    assert found.report == dataclasses.replace(REPORT, output_bytes=path.stat().st_size)


def test_a_damaged_report_is_a_note(tmp_path: Path) -> None:
    path = save(tmp_path, QUANTIZED, {"onnxcomp.report": "{"}, s=np.float32(0.1), z=np.uint8(3))

    found = inspect(path)

    assert found.report is None
    assert found.notes == ("The stored report cannot be read. Another version of onnxcomp wrote it, or it was changed.",)


def test_a_model_that_cannot_be_prepared_is_shown_as_it_is(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 13, "my.ops" : 1]> net (float[N,4] x) => (float[N,2] y) {
        h = my.ops.Magic(x)
        [fc] y = MatMul(h, w)
    }"""
    path = save(tmp_path, text, w=np.ones((4, 2), np.float32))

    found = inspect(path)

    assert found.sites == (FoundSite("fc", "MatMul", "layer", (4, 2)),)
    assert len(found.notes) == 1
    assert found.notes[0].startswith("This model cannot be quantized as it is. ")


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "no.onnx"
    path.write_bytes(b"hello")

    with pytest.raises(ModelError) as error:
        inspect(path)

    assert str(error.value) == f"{path}: not an ONNX model, or one that is cut short."
