"""TensorRT is asked where it can build an engine, and not where it is only lying about."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

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
