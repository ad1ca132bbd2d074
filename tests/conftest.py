"""Fixtures that every test may use, and which tests are skipped: `real` without data, `versions` unless asked for."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("ONNXCOMP_DATA") or ROOT.parent / "shared" / "data")
NO_DATA = "needs the real models and data: set ONNXCOMP_DATA to their folder, or put it at ../shared/data beside the checkout"
NOT_ASKED = "installs other versions of ONNX Runtime: ask for it with -m versions"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip, with the reason, the `real` tests where there are no data, and the `versions` tests unless they are asked for."""
    reasons = {"real": None if DATA.is_dir() else NO_DATA}
    reasons["versions"] = None if "versions" in config.option.markexpr else NOT_ASKED
    for item in items:
        for marker, reason in reasons.items():
            if reason is not None and item.get_closest_marker(marker) is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real models and data; the test is skipped where it is absent."""
    if not DATA.is_dir():
        pytest.skip(NO_DATA)
    return DATA


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator that starts anew, with the same numbers, in every test."""
    return np.random.default_rng(0)


@pytest.fixture
def net(tmp_path: Path) -> Path:
    path = tmp_path / "mlp.onnx"
    onnx.save(tiny.mlp().model, path)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "calib.npz"
    np.savez(path, x=np.concatenate([feed["x"] for feed in tiny.mlp().samples]))
    return path
