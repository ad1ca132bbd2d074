"""Fixtures that every test may use, and what happens to `real` tests where the data are absent."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("ONNXCOMP_DATA") or ROOT.parent / "shared" / "data")
NO_DATA = "needs the real models and data: set ONNXCOMP_DATA to their folder, or put it at ../shared/data beside the checkout"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the `real` tests, with the reason, where there are no data."""
    if DATA.is_dir():
        return
    for item in items:
        if item.get_closest_marker("real") is not None:
            item.add_marker(pytest.mark.skip(reason=NO_DATA))


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
