"""Which samples a bias is fitted to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from onnxcomp.calibrate.samples import Cut, LiveBatch
from onnxcomp.graph.sites import Site
from onnxcomp.methods.bias import BiasCompensation

LAYER = Site("fc", "MatMul", "layer", ("x",), "h", "y", -1)
TOKENS = Site("fc", "MatMul", "layer", ("x",), "h", "y", -1, fixed_tokens=True)


def left_out(batch: int, count: int = 256, method: BiasCompensation | None = None, site: Site = LAYER) -> set[int]:
    """The samples, `batch` of them at a time, that nothing is read of."""
    seen: set[int] = set()

    class Seen(LiveBatch):
        def read(self, name: str) -> list[np.ndarray]:
            seen.update(self.indices)
            return super().read(name)

    parts = [tuple(range(start, min(start + batch, count))) for start in range(0, count, batch)]
    live = [{"f_xh": np.ones((len(part), 4, 3), np.float32), "g_xh": np.zeros((len(part), 4, 3), np.float32)} for part in parts]
    batches = [Seen(part, arrays) for part, arrays in zip(parts, live, strict=True)]
    (method or BiasCompensation()).fit(site, Cut(batches, {name: name for name in live[0]}))
    return set(range(count)) - seen


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_of_many_samples_every_other_eight_tell_a_bias_per_channel(batch: int):
    assert left_out(batch) == {number for number in range(256) if number // 8 % 2}


@pytest.mark.parametrize(
    "options", [{"count": 255}, {"site": TOKENS}, {"method": BiasCompensation(keep="always")}], ids=["few", "tokens", "always"]
)
def test_all_samples_count_where_they_are_few_or_are_asked_for(options: dict[str, Any]):
    assert left_out(1, **options) == set()
