from __future__ import annotations

import pytest

from onnxcomp import manual
from onnxcomp.errors import RecipeError
from onnxcomp.methods import base, bias


def test_every_method_has_a_page_with_a_summary() -> None:
    pages = manual.pages()

    assert tuple(page.name for page in pages) == base.names()
    assert all(page.summary and page.text.startswith(page.summary) for page in pages)


def test_a_page_is_the_modules_docstring() -> None:
    assert bias.__doc__ is not None

    assert manual.page("bias").text == bias.__doc__.strip()


def test_options_carry_their_defaults_and_the_text_below_them() -> None:
    """Of the base class too."""
    options = {option.name: option for option in manual.page("bias").options}

    assert options["keep"].default == "'if-better'"
    assert options["keep"].help.startswith("`if-better`: adopted where held-out samples improve;")
    assert options["significance"].default == "2.0"
    assert all(option.help for option in options.values())


def test_unknown_method_has_no_page() -> None:
    with pytest.raises(RecipeError) as error:
        manual.page("biaz")

    assert str(error.value).startswith("Unknown method 'biaz'.")
