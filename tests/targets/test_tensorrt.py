"""TensorRT is asked where it can build an engine, and not where it is only lying about; and what it alone wants stored."""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import onnx
import pytest
from equality import parse

from onnxcomp import Recipe, quantize
from onnxcomp.lint import lint
from onnxcomp.numerics.arrays import energies, sqnr_db
from onnxcomp.runtime import Session
from onnxcomp.targets import tensorrt


def package(name: str, *, has_gpu: bool) -> ModuleType:
    """As much of the package as is asked, whose builder fails the way it does without a GPU."""
    module = ModuleType(name)

    def build(log: object) -> object:
        if not has_gpu:
            raise TypeError("pybind11::init(): factory function returned nullptr")
        return log

    vars(module).update(Builder=build, Logger=type("Logger", (SimpleNamespace,), {"ERROR": 1, "__init__": lambda *_: None}))
    return module


@pytest.fixture(autouse=True)
def _asked_anew():
    tensorrt.installed.cache_clear()
    yield
    tensorrt.installed.cache_clear()


def test_one_whose_libraries_are_missing_is_as_good_as_none(tmp_path, monkeypatch):
    for name in tensorrt.NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / f"{name}.py").write_text("raise ImportError('libcublas.so.12: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(tmp_path)

    assert tensorrt.installed() is None


def test_without_a_gpu_the_one_is_taken_that_needs_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", package("tensorrt", has_gpu=False))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", package("tensorrt_rtx", has_gpu=True))

    assert tensorrt.installed().__name__ == "tensorrt_rtx"


def test_with_a_gpu_tensorrt_itself_is_taken(monkeypatch):
    for name in tensorrt.NAMES:
        monkeypatch.setitem(sys.modules, name, package(name, has_gpu=True))

    assert tensorrt.installed().__name__ == "tensorrt"


@pytest.mark.parametrize(("shape", "built_for"), [("2,5,16", (2, 5, 16)), ("N,5,16", (1, 5, 16))])
def test_the_engine_is_built_for_one_sample_whose_first_axis_may_be_fixed(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, shape: str, built_for: tuple[int, ...]
):
    seen = list[object]()
    monkeypatch.setattr(tensorrt, "installed", lambda: SimpleNamespace(__name__="tensorrt", __version__="10.0"))
    monkeypatch.setattr(tensorrt, "kernels", lambda path, lowered, shapes: seen.append(shapes) or {"m": ("gemm", True)})
    weights = {"w": rng.normal(size=(16, 8)).astype(np.float32)}
    model = parse(f"g (float[{shape}] x) => (float y) {{ [m] y = MatMul(x, w) }}", weights, opset=21)

    quantize(model, [{"x": rng.normal(size=built_for).astype(np.float32)} for _ in range(8)], Recipe(target="tensorrt"))

    assert seen == [{"x": built_for}]


def test_the_weight_of_a_product_that_is_cut_into_heads_is_stored_in_float(rng: np.random.Generator):
    """Its runtime cuts the weight instead, which it does once only where the weight is float."""
    body = """[cut] m = MatMul(x, w) r = Reshape(m, heads) q, k = Split<axis = 2, num_outputs = 2>(r) s = Mul(q, k)
              t = Reshape(s, flat) [whole] y = MatMul(t, v)"""
    constants = {"w": rng.normal(size=(16, 16)).astype(np.float32), "v": rng.normal(size=(8, 8)).astype(np.float32)}
    constants |= {"heads": np.array([0, 0, 2, 2, 4]), "flat": np.array([0, 0, 8])}
    model = parse(f"g (float[N,5,16] x) => (float y) {{ {body} }}", constants, opset=21)
    data = {"x": rng.normal(size=(32, 5, 16)).astype(np.float32)}

    files = {name: quantize(model, data, Recipe(target=name)).model for name in ("tensorrt", "portable")}

    stored = {t.name: t.data_type for t in files["tensorrt"].graph.initializer if t.name.startswith(("w/", "v/"))}
    assert stored["w/values"] == onnx.TensorProto.FLOAT
    assert stored["v/quantized.codes"] == onnx.TensorProto.INT8
    assert "w/quantized.codes" not in stored
    assert lint(files["tensorrt"], "tensorrt").violations == ()
    assert [v.node for v in lint(files["portable"], "tensorrt").violations if v.rule == "cut-weight"] == ["cut"]
    want, found = (Session(m.SerializeToString()).run({"x": data["x"][:4]})["y"] for m in (model, files["tensorrt"]))
    assert sqnr_db(*energies(want, found)) > 25
