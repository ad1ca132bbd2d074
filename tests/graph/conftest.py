"""A model of two weights, in memory and with its weights beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from equality import parse
from onnx import ModelProto

from onnxcomp.graph import files


@pytest.fixture
def model() -> ModelProto:
    weights = {"w": np.arange(1536, dtype=np.float32).reshape(3, 512), "b": np.ones(512, np.float32)}
    return parse("g (float[N,3] x) => (float[N,512] y) { h = MatMul(x, w) y = Add(h, b) }", weights)


@pytest.fixture
def external(model: ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose weights lie beside it."""
    monkeypatch.setattr(files, "INLINE_LIMIT", 1000)
    path = tmp_path / "model" / "m.onnx"
    path.parent.mkdir()
    files.save(model, path)
    return path
