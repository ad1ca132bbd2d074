"""Files as other versions of ONNX Runtime run them. `-m versions` asks for it, since it needs pip and the package index."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from scripts import load_tool

from onnxcomp.pipeline import quantize
from onnxcomp.recipe import Bits, find

ROOT = Path(__file__).resolve().parents[1]
versions = load_tool("versions")

SETTINGS = (("w8a8", "auto"), ("w4a8", "auto"), ("w4a4", "auto"), ("w4a4", "best"))
SAMPLES = 32


def release(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")[:2]))


@pytest.mark.versions
@pytest.mark.parametrize("name", ["vit_digits", "cnn_digits"])
def test_a_file_runs_on_integer_kernels_in_every_version_that_its_report_names_and_in_no_older_one(name: str, tmp_path: Path):
    model, least = ROOT / "models" / f"{name}.onnx", {}
    for bits, recipe_name in SETTINGS:
        path = tmp_path / f"{bits}.{recipe_name}.onnx"
        recipe = dataclasses.replace(find(recipe_name), bits=Bits.parse(bits), samples=SAMPLES)
        needs = quantize(model, ROOT / "models" / "digits_calib.npz", recipe, output=path).report.requirements
        least[path] = release(re.findall(r"ONNX Runtime (\S+) or newer", " ".join(needs))[0])
    feed = versions.feed_of(model, ROOT / "models" / "digits_test.npz")

    found = list(versions.compare(list(least), model, feed, versions.VERSIONS))

    assert len(found) == len(SETTINGS) * len(versions.VERSIONS)
    for one in found:
        runs = release(one.version) >= least[one.file]
        assert (not one.error) == one.agrees == runs, one
        assert one.kernels == one.installed, one


def test_a_version_that_computes_otherwise_or_on_float_kernels_says_so():
    """What it prints is the only place where the reader learns of it."""
    other = versions.Found("1.2.3", Path("a.onnx"), sqnr=12.34, kernels=3, installed=5)
    refused = versions.Found("1.2.3", Path("a.onnx"), error="No such operator.")

    assert re.sub(r" +", " ", str(other)) == "1.2.3 a.onnx DIFFERS, 12.3 dB, 3 integer kernels, of 5 of the installed version"
    assert re.sub(r" +", " ", str(refused)) == "1.2.3 a.onnx fails: No such operator."


def test_a_feed_is_the_first_rows_of_what_is_named_like_the_input():
    model, samples = ROOT / "models" / "cnn_digits.onnx", ROOT / "models" / "digits_test.npz"

    feed = versions.feed_of(model, samples)

    with np.load(samples) as archive:
        np.testing.assert_array_equal(feed["x"], archive["x"][: versions.ROWS].astype(np.float32))
