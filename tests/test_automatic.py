from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from click.testing import CliRunner, Result

from onnxcomp import account, automatic, pipeline, recipe, targets
from onnxcomp.analysis import analyze
from onnxcomp.cli import main
from onnxcomp.errors import BoundError, DataError, RecipeError
from onnxcomp.recipe import Bits, Recipe, SiteRule

ENCODING = targets.find("ort-x86").encoding


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments], prog_name="onnxcomp")


def test_the_ladder_climbs_from_the_least_damage_to_the_smallest_file(net: Path, data: Path) -> None:
    found = analyze(net, data, Recipe(bits=Bits(4, 4)))

    rungs = automatic.ladder(found, Recipe(), ENCODING)

    widths = [
        [next((r.bits.weights for r in rung.site if r.where == s and r.bits), 8) for s in ("fc1", "fc2")] for rung in rungs
    ]
    numbers = np.array([next(row.weights for row in found.sites if row.name == name) for name in ("fc1", "fc2")])
    sizes = [
        float(np.where([name in rung.exclude for name in ("fc1", "fc2")], 32, w) @ numbers)
        for rung, w in zip(rungs, widths, strict=True)
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert 2 < len(rungs) <= automatic.RUNGS
    assert len({rung.site + rung.exclude for rung in rungs}) == len(rungs)
    assert widths[-1] == [4, 4]  # of so few numbers the tables of packed codes take more than two bits save


def test_the_rules_of_the_recipe_win_over_what_is_chosen(net: Path, data: Path) -> None:
    own = Recipe(site=(SiteRule("fc1", Bits(6, 8)),))

    rungs = automatic.ladder(analyze(net, data, Recipe(bits=Bits(4, 4))), own, ENCODING)

    assert all(rung.site[-1:] == own.site for rung in rungs)


def test_no_width_is_chosen_that_the_target_would_store_wider(net: Path, data: Path) -> None:
    found = analyze(net, data, Recipe(bits=Bits(4, 4)))

    rungs = automatic.ladder(found, Recipe(), targets.find("nnapi").encoding)

    assert {rule.bits for rung in rungs for rule in rung.site} == set()


def test_the_smallest_file_within_the_drop_lies_beside_a_recipe_that_gives_it_again(
    net: Path, data: Path, tmp_path: Path
) -> None:
    output, again = tmp_path / "out.onnx", tmp_path / "again.onnx"

    found = run("quantize", net, "--data", data, "--bits", "auto", "--max-drop", 40, "-o", output)

    assert found.exit_code == 0, found.stderr
    chosen = recipe.find(tmp_path / "out.recipe.toml")
    assert (chosen.samples, chosen.sensitive) == (9, "asked")  # every width is chosen, those of sensitive layers as well
    assert "Bounds        --max-drop 40: loses " in found.stdout
    assert " points of top-1 agreement on 3 held-out samples\n" in found.stdout
    assert f"Recipe        {tmp_path / 'out.recipe.toml'}\n" in found.stdout
    assert run("quantize", net, "--data", data, "--recipe", tmp_path / "out.recipe.toml", "-o", again).exit_code == 0
    assert again.read_bytes() == output.read_bytes()


def test_a_size_is_kept_with_the_least_damage(net: Path, data: Path) -> None:
    widest = pipeline.quantize(net, data).report.output_bytes

    result, said = automatic.quantize(net, data, Recipe(), max_size=widest - 1)

    assert result.report.output_bytes < widest
    assert said == (f"--max-size {widest - 1:g}: takes {result.report.output_bytes} bytes",)
    assert {site.bits for site in result.report.sites} != {"w2a8"}


def test_a_latency_is_kept(net: Path, data: Path) -> None:
    result, said = automatic.quantize(net, data, Recipe(), max_latency=1e6)

    assert {site.activations for site in result.report.sites} <= {"static", "token"}
    assert said[0].startswith("--max-latency 1e+06: takes ")
    assert said[0].endswith(" of the float model's time")


@pytest.mark.parametrize(
    ("bound", "pattern"),
    [
        (
            {"max_drop": -1.0},
            r"the closest loses 0\.00 points of top-1 agreement on 3 held-out samples, more than --max-drop -1",
        ),
        ({"max_size": 100}, r"the closest takes \d+ bytes, more than --max-size 100"),
        ({"max_size": 0.001}, r"the closest takes [\d.]+ of the float file, more than --max-size 0\.001"),
        ({"max_latency": 0.0}, r"the closest takes [\d.]+ of the float model's time, more than --max-latency 0"),
    ],
)
def test_a_bound_that_nothing_keeps_says_what_came_closest(bound: dict[str, Any], pattern: str, net: Path, data: Path) -> None:
    with pytest.raises(BoundError, match=rf"^No choice of bits keeps the bounds: {pattern}\. Nothing was written\.$"):
        automatic.quantize(net, data, Recipe(), **bound)


def test_a_bound_that_nothing_keeps_ends_with_6_and_no_file(net: Path, data: Path) -> None:
    found = run("quantize", net, "--data", data, "--bits", "auto", "--max-size", 10)

    assert (found.exit_code, found.stdout) == (6, "")
    assert sorted(path.name for path in net.parent.iterdir()) == ["calib.npz", "mlp.onnx"]


def test_a_size_has_a_unit_or_is_a_share(net: Path, data: Path) -> None:
    def most(size: str) -> str:
        return run("quantize", net, "--data", data, "--bits", "auto", "--max-size", size).stderr

    assert "more than --max-size 100. Nothing was written." in most("0.1kB")
    assert "of the float file, more than --max-size 0.001. Nothing was written." in most("0.001")
    assert most("small") == "UsageError: Size 'small' is not understood. Write it like 512MB or 2GB.\n"


def test_one_sample_cannot_be_held_out(net: Path) -> None:
    with pytest.raises(DataError, match=r"^One sample cannot be calibrated on and held out\. Give at least two\.$"):
        automatic.quantize(net, tiny.mlp().samples[:1], Recipe(), max_drop=1)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ("--bits", "auto", "--data", "{data}"),
            "UsageError: --bits auto needs --data and a bound, --max-drop, --max-size or --max-latency, and takes no --split.",
        ),
        (("--max-size", "1000"), "UsageError: --max-size and --max-latency choose bits. Pass --bits auto."),
        (("--max-latency", "0.5"), "UsageError: --max-size and --max-latency choose bits. Pass --bits auto."),
    ],
)
def test_bounds_and_bits_that_do_not_go_together_are_one_line(
    arguments: tuple[str, ...], line: str, net: Path, data: Path
) -> None:
    found = run("quantize", net, *(argument.format(data=data) for argument in arguments))

    assert (found.exit_code, found.stdout, found.stderr) == (2, "", f"{line}\n")


@pytest.mark.parametrize("name", ["transformer", "residual"])
def test_a_finished_file_shows_the_recipe_that_gives_the_same_graph_again(name: str, tmp_path: Path) -> None:
    model, output = tiny.models()[name], tmp_path / "out.onnx"
    first = pipeline.quantize(model.model, model.samples, Recipe(bits=Bits(4, 4)), output=output)

    frozen = recipe.loads(run("recipe", "show", output).stdout)

    second = pipeline.quantize(model.model, model.samples, frozen)
    assert second.model.graph.SerializeToString(deterministic=True) == first.model.graph.SerializeToString(deterministic=True)
    rules = {rule.where: rule for rule in frozen.site}
    assert {r.activations for r in rules.values()} == {site.activations for site in first.report.sites if site.kind != "join"}
    assert {r.rounding for r in rules.values()} == {"gptq"}
    kept = {d.site for d in first.report.decisions if d.method == "bias" and d.adopted}
    assert {where for where, rule in rules.items() if rule.methods == ("bias",)} == kept
    assert dataclasses.replace(frozen, site=()) == Recipe(bits=Bits(4, 4), target=targets.here())


def test_a_frozen_recipe_stays_as_it_is(net: Path, data: Path, tmp_path: Path) -> None:
    first, second, frozen = (tmp_path / name for name in ("a.onnx", "b.onnx", "frozen.toml"))
    run("quantize", net, "--data", data, "--bits", "w4a4", "-o", first)
    frozen.write_text(run("recipe", "show", first).stdout)

    run("quantize", net, "--data", data, "--recipe", frozen, "-o", second)

    assert run("recipe", "show", second).stdout == frozen.read_text()


@pytest.mark.parametrize(("name", "products"), [("linear_3d", {"fc"}), ("embedding", {"up", "head"})])
def test_for_qnn_a_product_without_a_bias_gets_none_and_the_frozen_recipe_asks_for_none(name: str, products: set[str]) -> None:
    model = tiny.models()[name]
    first = pipeline.quantize(model.model, model.samples, Recipe(bits=Bits(8, 16), target="qnn"))

    again = pipeline.quantize(model.model, model.samples, account.frozen(first.report))

    said = [{d.site for d in r.report.decisions if d.reason.startswith("it has no bias")} for r in (first, again)]
    assert said == [products, set()]


def test_a_method_that_a_rule_keeps_must_exist() -> None:
    with pytest.raises(RecipeError, match=r"^mine: \[\[site\]\] #1: Unknown method 'bais'\. The methods are: bias, "):
        recipe.loads('[[site]]\nwhere = "*"\nmethods = ["bais"]\n', where="mine")


def test_no_method_is_fitted_that_a_rule_does_not_keep(net: Path, data: Path) -> None:
    result = pipeline.quantize(net, data, Recipe(bits=Bits(4, 4), site=(SiteRule("fc1", methods=()),)))

    assert {decision.site for decision in result.report.decisions if decision.method == "bias"} == {"fc2"}


def test_a_float_file_holds_no_recipe(net: Path) -> None:
    found = run("recipe", "show", net)

    assert found.exit_code == 2
    assert found.stderr == (
        f"UsageError: {net} was not quantized by onnxcomp, so it holds no recipe. Give a file that `quantize` wrote.\n"
    )
