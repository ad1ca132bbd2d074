from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from onnxcomp import recipe
from onnxcomp.errors import RecipeError
from onnxcomp.methods import base as methods
from onnxcomp.methods.bias import BiasCompensation
from onnxcomp.preprocess import Preprocess
from onnxcomp.recipe import Bits, Recipe, SiteRule

FULL = Recipe(
    name='a "quoted"\tname',
    description="two\nlines, a \\ and an é",
    bits=Bits(3, 5),
    ranges="percentile",
    percentile=99.5,
    activations="token",
    symmetric=True,
    rounding="gptq",
    rotation="folded",
    block=64,
    zero_points=True,
    embeddings=True,
    sensitive="asked",
    equalization="none",
    moments="none",
    products=True,
    reconstruct=True,
    include=("op:Conv", "/head/*"),
    exclude=("re:^/stem\\d",),
    samples=7,
    seed=11,
    target="ort-x86",
    half=True,
    preprocess=Preprocess(256, 224, mean=(0.485, 0.456, 0.406), std=0.25, scale=1.0, layout="nhwc", color="bgr"),
    site=(
        SiteRule("/head/*", bits=Bits(4, None), block=32, zero_points=True),
        SiteRule("*", ranges="minmax", activations="dynamic", symmetric=False),
    ),
    compensate=(BiasCompensation(where="op:Conv", keep="always", significance=1e-7), BiasCompensation()),
)
EMPTIED = dataclasses.replace(FULL, compensate=(), site=(), include=(), preprocess=Preprocess())


@pytest.mark.parametrize("value", [*recipe.NAMED.values(), FULL, EMPTIED], ids=lambda r: ascii(r.name))
def test_recipe_to_toml_and_back_is_the_identity(value: Recipe) -> None:
    assert recipe.loads(recipe.dumps(value)) == value


def test_full_recipe_differs_from_the_defaults_in_every_field() -> None:
    """Otherwise the round trip above would not see a forgotten field."""
    default = Recipe()

    assert all(getattr(FULL, f.name) != getattr(default, f.name) for f in dataclasses.fields(Recipe))


def test_named_recipes_carry_their_names_and_a_description() -> None:
    assert all(value.name == name and value.description for name, value in recipe.NAMED.items())


def test_base_compensates_nothing_and_bc_keeps_bias_everywhere() -> None:
    assert recipe.NAMED["base"].compensate == ()
    assert recipe.NAMED["base"].ranges == "mse"
    assert recipe.NAMED["bc"].compensate == (BiasCompensation(keep="always", trim=0.0),)


def test_find_returns_the_named_recipe() -> None:
    assert recipe.find("base") is recipe.NAMED["base"]


def test_recipe_file_without_a_name_is_called_by_its_stem(tmp_path: Path) -> None:
    path = tmp_path / "small.toml"
    path.write_text('bits = "w4a8"\n')

    assert recipe.find(path) == Recipe(name="small", bits=Bits(4, 8))


@pytest.mark.parametrize(
    ("text", "bits"),
    [("w4a8", Bits(4, 8)), ("W2A3", Bits(2, 3)), ("w8a16", Bits(8, 16)), ("w4", Bits(4, None)), (" w8a8 ", Bits(8, 8))],
)
def test_bits_are_read_and_written(text: str, bits: Bits) -> None:
    assert Bits.parse(text) == bits
    assert Bits.parse(str(bits)) == bits


@pytest.mark.parametrize("text", ["w9a8", "w1a8", "a8w8", "8", "", "w4a9"])
def test_other_bits_are_refused(text: str) -> None:
    with pytest.raises(RecipeError) as error:
        Bits.parse(text)

    assert str(error.value) == (f"bits = '{text}' is not understood. Write wXaY, X and Y from 2 to 8 (or Y 16), such as w4a8.")


def test_compensate_option_is_auto_none_or_a_list_in_order() -> None:
    assert recipe.parse_compensate("auto") is None
    assert recipe.parse_compensate("none") == ()
    assert recipe.parse_compensate("bias, bias") == (BiasCompensation(), BiasCompensation())


def test_compensate_option_refuses_an_unknown_method() -> None:
    with pytest.raises(RecipeError) as error:
        recipe.parse_compensate("biaz")

    assert str(error.value) == f"Unknown method 'biaz'. The methods are: {', '.join(methods.names())}."


KEYS = ", ".join(field.name for field in dataclasses.fields(Recipe))
METHODS = ", ".join(methods.names())
RANGES = "Input should be 'mse', 'percentile' or 'minmax'."


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bits = ", "r.toml: not valid TOML: Invalid value (at end of document)."),
        ('bitz = "w8a8"', "r.toml: unknown key 'bitz'. Did you mean 'bits'?"),
        ("qqqq = 1", f"r.toml: unknown key 'qqqq'. The keys are: {KEYS}."),
        ("bits = 8", "r.toml: bits = '8' is not understood. Write wXaY, X and Y from 2 to 8 (or Y 16), such as w4a8."),
        ('bits = "w9"', "r.toml: bits = 'w9' is not understood. Write wXaY, X and Y from 2 to 8 (or Y 16), such as w4a8."),
        ('include = "*"', "r.toml: include = '*' is not understood. Input should be a valid list."),
        ("exclude = [1]", "r.toml: exclude = [1] is not understood. Input should be a valid string."),
        ('samples = "8"', "r.toml: samples = '8' is not understood. Input should be a valid integer."),
        ("samples = true", "r.toml: samples = True is not understood. Input should be a valid integer."),
        ("percentile = true", "r.toml: percentile = True is not understood. Input should be a valid number."),
        ("symmetric = 1", "r.toml: symmetric = 1 is not understood. Input should be a valid boolean."),
        ("name = 1", "r.toml: name = 1 is not understood. Input should be a valid string."),
        ('ranges = "max"', f"r.toml: ranges = 'max' is not understood. {RANGES}"),
        (
            'activations = "x"',
            "r.toml: activations = 'x' is not understood. Input should be 'auto', 'static', 'dynamic', 'token' or 'float'.",
        ),
        ("percentile = 50", "r.toml: percentile = 50 is not understood. Input should be greater than 50."),
        ("percentile = 100.1", "r.toml: percentile = 100.1 is not understood. Input should be less than or equal to 100."),
        ("samples = -1", "r.toml: samples = -1 is not understood. Input should be greater than or equal to 0."),
        ("seed = -1", "r.toml: seed = -1 is not understood. Input should be greater than or equal to 0."),
        ("preprocess = 3", "r.toml: preprocess = 3 is not understood. Input should be an instance of Preprocess."),
        ("[preprocess]\ncorp = 3", "r.toml: preprocess: unknown key 'corp'. Did you mean 'crop'?"),
        ('compensate = ["bias"]', "r.toml: 'compensate' must be a list of tables, written [[compensate]]."),
        ("[compensate]", "r.toml: 'compensate' must be a list of tables, written [[compensate]]."),
        ("[site]", "r.toml: 'site' must be a list of tables, written [[site]]."),
        (
            '[[compensate]]\nmethod = "bias"\n[[compensate]]',
            f"r.toml: [[compensate]] #2: the key 'method' is missing. The methods are: {METHODS}.",
        ),
        (
            '[[compensate]]\nmethod = "biaz"',
            f"r.toml: [[compensate]] #1: Unknown method 'biaz'. The methods are: {METHODS}.",
        ),
        (
            '[[compensate]]\nmethod = "bias"\nwehre = "*"',
            "r.toml: [[compensate]] #1: unknown key 'wehre'. Did you mean 'where'?",
        ),
        (
            '[[compensate]]\nmethod = "bias"\nkeep = "never"',
            "r.toml: [[compensate]] #1: keep = 'never' is not understood. Input should be 'if-better' or 'always'.",
        ),
        ("[[site]]", "r.toml: [[site]] #1: the key 'where' is missing. It names the sites the rule is for."),
        ('[[site]]\nwhere = "*"\nbit = "w8a8"', "r.toml: [[site]] #1: unknown key 'bit'. Did you mean 'bits'?"),
        (
            '[[site]]\nwhere = "*"\n[[site]]\nwhere = "*"\nranges = "max"',
            f"r.toml: [[site]] #2: ranges = 'max' is not understood. {RANGES}",
        ),
        (
            '[[site]]\nwhere = "*"\nsymmetric = "no"',
            "r.toml: [[site]] #1: symmetric = 'no' is not understood. Input should be a valid boolean.",
        ),
    ],
)
def test_a_bad_recipe_is_refused_with_its_place(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        recipe.loads(text, "r.toml")

    assert str(error.value) == message


def test_unknown_recipe_name_suggests_the_nearest() -> None:
    with pytest.raises(RecipeError) as error:
        recipe.find("bace")

    assert str(error.value) == "Unknown recipe 'bace'. Did you mean 'base'? A file's name ends in .toml."


def test_unknown_recipe_name_without_a_near_one_lists_all() -> None:
    with pytest.raises(RecipeError) as error:
        recipe.find("zzz")

    names = ", ".join(recipe.NAMED)
    assert str(error.value) == f"Unknown recipe 'zzz'. The named ones are: {names}. A file's name ends in .toml."


def test_missing_recipe_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "gone.toml"

    with pytest.raises(RecipeError) as error:
        recipe.find(path)

    assert str(error.value) == f"{path}: cannot be read: No such file or directory."


def test_recipe_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "image.toml"
    path.write_bytes(b"\xff\xfe\x00")

    with pytest.raises(RecipeError) as error:
        recipe.find(path)

    reason = "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"
    assert str(error.value) == f"{path}: cannot be read: {reason}."
