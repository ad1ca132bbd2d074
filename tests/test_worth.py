"""What methods are worth: the figures are those of the file without them, and what cannot be told is left out."""

from __future__ import annotations

from pathlib import Path

import pytest

from onnxcomp.comparison import compare
from onnxcomp.errors import UsageError
from onnxcomp.methods.bias import BiasCompensation
from onnxcomp.methods.xint import XInt
from onnxcomp.pipeline import quantize
from onnxcomp.recipe import Bits, Recipe
from onnxcomp.report import text
from onnxcomp.strip import strip
from onnxcomp.worth import compare_methods

MODELS = Path(__file__).resolve().parents[1] / "models"
NET, CALIBRATION, TEST = MODELS / "cnn_digits.onnx", MODELS / "digits_calib.npz", MODELS / "digits_test.npz"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with one method whose terms are merged into weights, and one whose edits stand alone."""
    path = tmp_path_factory.mktemp("worth") / "out.onnx"
    series = XInt(where="/block*", granularity="tensor", keep="always")
    recipe = Recipe(bits=Bits(3, 3), samples=32, compensate=(series, BiasCompensation()), equalization="none")
    quantize(NET, CALIBRATION, recipe, output=path)
    return path


def test_a_method_is_worth_what_the_file_without_it_lacks(made: Path):
    found = compare_methods(NET, made, TEST, limit=200)

    (bias,) = (worth for worth in found.methods if worth.method == "bias")
    stripped = strip(made, ["bias"])
    without, gained = compare(NET, stripped.model, TEST, limit=200), compare(stripped.model, made, TEST, limit=200)
    assert bias.places == len(stripped.places) > 0
    assert bias.sqnr_db == without.outputs[0].sqnr_db
    assert bias.accuracy == gained.accuracy
    assert bias.added_bytes == gained.other_bytes - gained.reference_bytes
    assert found.accuracy == compare(NET, made, TEST, limit=200).accuracy


def test_what_cannot_be_taken_out_has_no_figures(made: Path):
    found = compare_methods(NET, made, TEST, limit=20)

    last = text.comparison(found).splitlines()[-1]
    assert last.split() == ["xint", str(found.methods[-1].places), "-", "-", "-", "cannot", "be", "taken", "out"]


def test_a_file_without_methods_is_an_error():
    with pytest.raises(UsageError, match=r"holds no compensation\. `onnxcomp inspect` lists what is in a file\.$"):
        compare_methods(NET, NET, TEST, limit=2)
