"""The contract: how methods are found by their modules' names."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path

import pytest

import onnxcomp.methods
from onnxcomp.errors import RecipeError
from onnxcomp.methods import base
from onnxcomp.methods.base import Compensation
from onnxcomp.methods.bias import BiasCompensation

BASE_FIELDS = {field.name for field in dataclasses.fields(Compensation)}


def test_a_method_is_a_module_that_defines_one():
    folder = Path(onnxcomp.methods.__file__ or "").parent
    defining = [p.stem for p in folder.glob("*.py") if hasattr(importlib.import_module(f"onnxcomp.methods.{p.stem}"), "METHOD")]

    assert list(base.names()) == sorted(set(defining) - {"__init__"})


def test_a_method_is_found_by_its_modules_name():
    assert base.find("bias") is BiasCompensation


def test_an_unknown_method_is_refused_with_those_there_are():
    with pytest.raises(RecipeError) as caught:
        base.find("biaz")

    assert str(caught.value) == f"Unknown method 'biaz'. The methods are: {', '.join(base.names())}."


@pytest.mark.parametrize("name", ["base", "activations", "weights"])
def test_what_methods_share_is_no_method(name: str):
    with pytest.raises(RecipeError, match=rf"^Unknown method '{name}'\. The methods are: "):
        base.find(name)


@pytest.mark.parametrize("name", base.names())
def test_a_method_is_frozen_and_has_defaults(name: str):
    kind = base.find(name)
    method = kind()

    assert {field.name for field in dataclasses.fields(kind)} >= BASE_FIELDS
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.keep = "always"  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("name", base.names())
def test_every_method_refuses_an_unknown_way_to_keep(name: str):
    with pytest.raises(RecipeError) as caught:
        base.find(name)(keep="maybe")

    assert str(caught.value) == "keep = 'maybe' is not understood. Input should be 'if-better' or 'always'."


def test_a_method_must_say_how_it_is_fitted_and_built():
    with pytest.raises(TypeError, match=r"abstract methods '?build'?, '?fit'?$"):
        Compensation()  # pyright: ignore[reportAbstractUsage]
