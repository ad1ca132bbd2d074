from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny
from click.testing import CliRunner, Result

from onnxcomp import recipe, targets
from onnxcomp.cli import main
from onnxcomp.graph import files
from onnxcomp.recipe import Bits
from onnxcomp.report.json import from_json


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments], prog_name="onnxcomp")


def stored_recipe(path: Path) -> recipe.Recipe:
    return recipe.loads(files.metadata(files.load(path))["onnxcomp.recipe"])


def test_the_result_lies_beside_the_model_and_the_report_ends_with_what_to_do_next(net: Path, data: Path) -> None:
    found = run("quantize", net, "--data", data)

    output = net.with_name("mlp.w8a8.onnx")
    assert (found.exit_code, found.stderr) == (0, "")
    lines = found.stdout.splitlines()
    assert lines[0] == f"mlp.onnx -> w8a8 for {targets.here()}, 12 samples"
    assert "Kernels       2 of 2 quantized sites run as integer kernels" in lines
    assert lines[-3:] == ["", str(output), f"Next: onnxcomp compare {net} {output} --data TEST_DATA"]
    assert output.is_file()


def test_json_is_the_report(net: Path, data: Path) -> None:
    found = run("quantize", net, "--data", data, "--json")

    report = from_json(found.stdout)
    assert found.exit_code == 0
    assert [site.name for site in report.sites] == ["fc1", "fc2"]
    assert report.output_bytes == net.with_name("mlp.w8a8.onnx").stat().st_size


def test_without_data_one_line_says_what_is_done_instead(net: Path) -> None:
    found = run("quantize", net)

    assert found.exit_code == 0
    assert found.stderr == (
        "No data were given, so activations are quantized at run time and nothing is calibrated or compensated. "
        "Pass --data for static ranges.\n"
    )
    assert found.stdout.splitlines()[0] == f"mlp.onnx -> w8a8 for {targets.here()}, no data"
    assert found.stdout.splitlines()[-1] == f"Next: onnxcomp bench {net} {net.with_name('mlp.w8a8.onnx')}"


def test_a_model_that_takes_strings_is_quantized_timed_and_compared(tmp_path: Path) -> None:
    model, data, rng = tmp_path / "words.onnx", tmp_path / "words.npz", np.random.default_rng(0)
    text = """<ir_version: 9, opset_import: ["" : 17, "ai.onnx.ml": 3]> g (string[N,4] s) => (float[N,8] y) {
        e = ai.onnx.ml.LabelEncoder<keys_strings = ["a", "b"], values_floats = [0.5, -1.0], default_float = 0.0>(s)
        [fc] y = MatMul(e, w) }"""
    parsed = onnx.parser.parse_model(text)
    parsed.graph.initializer.append(onnx.numpy_helper.from_array(rng.normal(size=(4, 8)).astype(np.float32), "w"))
    onnx.save(parsed, model)
    np.savez(data, s=rng.choice(["a", "b", "other"], (32, 4)))

    made = run("quantize", model, "--data", data, "-o", tmp_path / "out.onnx")
    compared = run("compare", model, tmp_path / "out.onnx", "--data", data, "--json")

    assert (made.exit_code, made.stderr) == (0, "")
    assert "Speed" in made.stdout
    assert json.loads(compared.stdout)["outputs"][0]["sqnr_db"] > 30


def test_a_second_run_leaves_the_same_bytes_and_needs_force(net: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.onnx"
    run("quantize", net, "--data", data, "-o", output)
    first = output.read_bytes()

    refused = run("quantize", net, "--data", data, "-o", output)
    forced = run("quantize", net, "--data", data, "-o", output, "--force")

    assert (refused.exit_code, refused.stderr) == (
        2,
        f"UsageError: {output} exists. Pass --force to overwrite it.\n",
    )
    assert forced.exit_code == 0
    assert output.read_bytes() == first


def test_the_input_is_never_overwritten(net: Path, data: Path) -> None:
    before = net.read_bytes()

    found = run("quantize", net, "--data", data, "-o", net, "--force")

    assert found.exit_code == 2
    assert found.stderr == f"UsageError: {net} is the input itself, which is never changed. Choose another output.\n"
    assert net.read_bytes() == before


def test_inspect_reads_back_what_quantize_did(net: Path, data: Path) -> None:
    written = from_json(run("quantize", net, "--data", data, "--json").stdout)
    output = net.with_name("mlp.w8a8.onnx")

    shown, plain = run("inspect", output), json.loads(run("inspect", output, "--json").stdout)

    assert from_json(json.dumps(plain["report"])) == written
    assert "Kernels       2 of 2 quantized sites run as integer kernels" in shown.stdout
    assert shown.stdout.endswith(f"\n{written.recipe}")
    assert f"From        mlp.onnx, {net.stat().st_size / 1000:.2f} kB, sha256 {files.sha256(net)}" in shown.stdout


def test_options_override_the_recipe_and_exclude_adds_to_it(net: Path, data: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('bits = "w6a6"\nranges = "minmax"\nexclude = ["fc1"]\nseed = 3\n')
    output = tmp_path / "out.onnx"
    options = (
        "--bits",
        "w4a8",
        "--samples",
        5,
        "--exclude",
        "op:Conv*",
        "--activations",
        "dynamic",
        "--target",
        "ort-x86",
    )

    found = run("quantize", net, "--data", data, "--recipe", path, "-o", output, *options[:4], *options[6:])

    assert found.exit_code == 0, found.stderr
    expected = dataclasses.replace(recipe.find(path), bits=Bits(4, 8), samples=5, activations="dynamic", target="ort-x86")
    assert stored_recipe(output) == expected
    assert run("quantize", net, "--data", data, "--recipe", path, "-o", output, "--exclude", "fc2").exit_code != 0


def test_weights_alone_are_asked_for_by_their_bits_and_may_be_in_blocks(net: Path) -> None:
    found = run("quantize", net, "--bits", "w4", "--block", "16", "-o", net.with_name("w4.onnx"), "--json")

    report = from_json(found.stdout)
    assert {(site.bits, site.activations) for site in report.sites} == {("w4b16", "float")}
    said = "No data were given, so weights are rounded to nearest and nothing is compensated. Pass --data for GPTQ."
    assert said in found.stderr


def test_excluded_sites_stay_float_and_the_output_is_named_by_its_bits(net: Path, data: Path) -> None:
    found = from_json(run("quantize", net, "--data", data, "--bits", "w4a8", "--exclude", "fc2", "--json").stdout)

    assert [site.name for site in found.sites] == ["fc1"]
    assert [one.name for one in found.skipped] == ["fc2"]
    assert net.with_name("mlp.w4a8.onnx").is_file()


def test_compensate_none_and_a_list(net: Path, data: Path, tmp_path: Path) -> None:
    none, listed = tmp_path / "none.onnx", tmp_path / "listed.onnx"

    run("quantize", net, "--data", data, "-o", none, "--compensate", "none", "--ranges", "minmax")
    run("quantize", net, "--data", data, "-o", listed, "--compensate", "bias")

    assert (stored_recipe(none).compensate, stored_recipe(none).ranges) == ((), "minmax")
    assert stored_recipe(listed).compensate == recipe.parse_compensate("bias")
    assert stored_recipe(listed).ranges == "mse"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--max-drop", "1"), "UsageError: --max-drop is measured on samples. Pass --data."),
        (
            ("--data", "{data}", "--labels", "{data}"),
            "UsageError: --labels is for --max-drop. Pass both, or compare the result with `onnxcomp compare`.",
        ),
        (
            ("--bits", "w9a8"),
            "RecipeError: bits = 'w9a8' is not understood. Write wXaY, X and Y from 2 to 8 (or Y 16), such as w4a8.",
        ),
        (
            ("--ranges", "max"),
            "RecipeError: ranges = 'max' is not understood. Input should be 'mse', 'percentile' or 'minmax'.",
        ),
        (("--samples", "-1"), "RecipeError: samples = -1 is not understood. Input should be greater than or equal to 0."),
        (
            ("--preprocess", "crop"),
            "UsageError: preprocess: 'crop' is not key=value. Write it like \"crop=224 mean=0.5 std=0.5\".",
        ),
        (("--exclude", "fc3"), "RecipeError: Pattern 'fc3' matches no site. Did you mean 'fc2'?"),
    ],
)
def test_options_that_make_no_sense_are_one_line(arguments: tuple[str, ...], line: str, net: Path, data: Path) -> None:
    found = run("quantize", net, *(argument.format(data=data) for argument in arguments))

    assert (found.exit_code, found.stdout, found.stderr) == (2, "", f"{line}\n")
    assert not net.with_name("mlp.w8a8.onnx").exists()


def test_a_bound_that_holds_lets_the_file_be_written(net: Path, data: Path) -> None:
    found = run("quantize", net, "--data", data, "--max-drop", 100)

    assert found.exit_code == 0, found.stderr
    assert net.with_name("mlp.w8a8.onnx").is_file()


def test_a_bound_that_does_not_hold_ends_with_6_and_no_file(net: Path, data: Path) -> None:
    found = run("quantize", net, "--data", data, "--max-drop", -1)

    assert (found.exit_code, found.stdout) == (6, "")
    assert found.stderr == (
        "BoundError: The quantized model loses 0.00 points of top-1 agreement on 12 samples, more than --max-drop -1. "
        "Nothing was written. Try more bits, or --exclude the worst sites.\n"
    )
    assert sorted(path.name for path in net.parent.iterdir()) == ["calib.npz", "mlp.onnx"]


def test_with_labels_the_bound_is_on_right_answers(net: Path, data: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "labels.npy", np.zeros(12, np.int64))

    found = run("quantize", net, "--data", data, "--max-drop", -100, "--labels", tmp_path / "labels.npy")

    assert found.exit_code == 6
    assert " points of accuracy on 12 samples, more than --max-drop -100. " in found.stderr


def test_a_bound_needs_classes(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "one.onnx"
    text = '<ir_version: 10, opset_import: ["" : 21]> n (float[N,16] x) => (float[N,1] y) { [fc] y = MatMul(x, w) }'
    onnx.save(tiny.build("one", text, {"w": np.ones((16, 1), np.float32)}, []).model, path)

    found = run("quantize", path, "--data", data, "--max-drop", 1)

    assert found.exit_code == 2
    assert found.stderr == "UsageError: --max-drop needs an output with classes, and the model has none.\n"


def test_products_of_two_activations_are_quantized_when_asked(tmp_path: Path) -> None:
    model, data = tmp_path / "block.onnx", tmp_path / "calib.npz"
    transformer = tiny.models()["transformer"]
    onnx.save(transformer.model, model)
    feeds = transformer.samples[:4]  # of one length
    np.savez(data, **{name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]})

    plain = run("quantize", model, "--data", data, "--json")
    asked = run("quantize", model, "--data", data, "--json", "--products", "--force")

    assert "product" not in {site.kind for site in from_json(plain.stdout).sites}
    assert "product" in {site.kind for site in from_json(asked.stdout).sites}
