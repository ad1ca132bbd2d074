from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import click
import numpy as np
import onnx.parser
import pytest
from click.testing import CliRunner, Result
from onnx import numpy_helper

from onnxcomp import cli, recipe
from onnxcomp.methods import base as methods

ROOT = Path(__file__).resolve().parents[1]
RECIPE = "RecipeError: Unknown recipe 'bace'. Did you mean 'base'? A file's name ends in .toml."
SHAPE = "UsageError: Shape '{}' is not understood. Write it like pixel_values=1x3x224x224."
SIZE = "UsageError: Size '{}' is not understood. Write it like 512MB or 2GB."
CODE = "from onnxcomp.cli import main; main(prog_name='onnxcomp')"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.main, [str(a) for a in arguments], prog_name="onnxcomp")


def commands(group: click.Group = cli.main, *path: str) -> Iterator[tuple[str, ...]]:
    for name, command in sorted(group.commands.items()):
        if isinstance(command, click.Group):
            yield from commands(command, *path, name)
        else:
            yield (*path, name)


@pytest.fixture
def net(tmp_path: Path) -> Path:
    """y = x w, with a class of its own for each of four inputs."""
    return save(tmp_path / "net.onnx", np.eye(4, dtype=np.float32))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "test.npz"
    np.savez(path, x=np.eye(4, dtype=np.float32), y=np.array([0, 1, 2, 2]))
    return path


def save(path: Path, w: np.ndarray) -> Path:
    text = '<ir_version: 10, opset_import: ["" : 21]> net (float[N,4] x) => (float[N,4] y) { [fc] y = MatMul(x, w) }'
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(numpy_helper.from_array(w, "w"))
    onnx.save(model, path)
    return path


# --- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*commands()], ids=" ".join)
def test_every_command_explains_itself_with_an_example_and_offers_json(path: tuple[str, ...]) -> None:
    found = run(*path, "--help")

    assert found.exit_code == 0
    lines = found.output.splitlines()
    assert lines[2].strip().endswith(".")
    assert "--json" in found.output
    examples = lines[lines.index("Example:") + 1 :]
    assert examples
    assert all(line.startswith(f"  onnxcomp {' '.join(path)}") for line in examples)


def test_the_list_of_commands_is_never_cut() -> None:
    found = run("--help")

    assert "..." not in found.output.partition("Commands:")[2]


@pytest.mark.parametrize("path", [(), *commands()], ids=lambda path: " ".join(path) or "onnxcomp")
def test_help_loads_nothing_heavy(path: tuple[str, ...]) -> None:
    code = f"""
import sys
from onnxcomp.cli import main
try:
    main([*{path!r}, "--help"])
except SystemExit:
    print(sorted({{"numpy", "onnx", "onnxruntime", "onnx_graphsurgeon", "torch"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)

    assert done.stdout.splitlines()[-1] == "[]"


def test_choices_shown_in_the_help_are_those_of_the_library() -> None:
    shown = {option.name: option.metavar for option in cli.main.commands["quantize"].params if isinstance(option, click.Option)}

    assert shown["activations"] == "|".join(get_args(recipe.Activations))
    assert shown["ranges"] == "|".join(get_args(recipe.Ranges))


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (("recipe", "show", "bace"), 2, RECIPE),
        (("inspect", "{tmp}/gone.onnx"), 3, "ModelError: {tmp}/gone.onnx does not exist."),
        (("bench", "{net}", "--shape", "x"), 2, SHAPE.format("x")),
        (("quantize", "{net}", "--memory", "2 gigs"), 2, SIZE.format("2 gigs")),
        (("quantize", "{net}", "--memory", "-1GB"), 2, SIZE.format("-1GB")),
        (("bench", "{net}", "--shape", "x=0x4"), 2, SHAPE.format("x=0x4")),
        (
            ("bench", "{net}", "--shape", "x=1x4", "--data", "{data}"),
            2,
            "UsageError: --data and --shape exclude each other: the samples have shapes of their own.",
        ),
        (("methods", "biaz"), 2, f"RecipeError: Unknown method 'biaz'. The methods are: {', '.join(methods.names())}."),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(
    arguments: tuple[str, ...], code: int, line: str, net: Path, data: Path, tmp_path: Path
) -> None:
    names = {"net": net, "data": data, "tmp": tmp_path}

    found = run(*(argument.format(**names) for argument in arguments))

    assert (found.exit_code, found.stdout, found.stderr) == (code, "", line.format(**names) + "\n")


def test_data_that_do_not_fit_end_with_4(net: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "bad.npy", np.ones((2, 5), np.float32))

    found = run("compare", net, net, "--data", tmp_path / "bad.npy")

    assert found.exit_code == 4
    assert found.stderr.startswith(f"DataError: {tmp_path / 'bad.npy'}: input 'x' expects float32[N, 4], found ")
    assert found.stderr.count("\n") == 1


def test_debug_shows_the_trace_before_the_line(tmp_path: Path) -> None:
    found = run("inspect", tmp_path / "gone.onnx", "--debug")

    assert found.exit_code == 3
    assert found.stderr.startswith("Traceback (most recent call last):\n")
    assert found.stderr.splitlines()[-1] == f"ModelError: {tmp_path}/gone.onnx does not exist."


def test_unknown_commands_and_options_are_usage_errors() -> None:
    command, option = run("quantise"), run("inspect", "m.onnx", "--jsn")

    assert (command.exit_code, option.exit_code) == (2, 2)
    assert "No such command 'quantise'" in command.stderr
    assert "No such option" in option.stderr
    assert "--json" in option.stderr


# --- commands --------------------------------------------------------------------------------------------------------


def test_compare_prints_a_table(net: Path, data: Path, tmp_path: Path) -> None:
    other = save(tmp_path / "other.onnx", np.eye(4, dtype=np.float32)[[1, 0, 2, 3]])

    found = run("compare", net, other, "--data", data)

    assert found.exit_code == 0
    assert (
        found.stdout
        == f"""\
{net} -> {other}, 4 samples

Output    SQNR   Cosine  Agreement
y       0.0 dB  0.50000  50.00% (2 of 4)

Accuracy  75.00% -> 25.00%, drop 50.00 +- 25.00 points (2 lost and 0 gained of 4)
Size      {net.stat().st_size} B -> {other.stat().st_size} B, ratio 1.000
"""
    )
    assert found.stderr == ""


def test_compare_takes_labels_and_samples(net: Path, data: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "labels.npy", np.arange(4))

    found = json.loads(run("compare", net, net, "--data", data, "--labels", tmp_path / "labels.npy", "--json").stdout)
    fewer = json.loads(run("compare", net, net, "--data", data, "--samples", 2, "--json").stdout)

    assert found["accuracy"]["reference"] == 1.0
    assert (found["samples"], fewer["samples"]) == (4, 2)


def test_compare_preprocesses(net: Path, tmp_path: Path) -> None:
    text = '<ir_version: 10, opset_import: ["" : 21]> n (float[N,1,4,4] x) => (float[N,1,4,4] y) { y = Identity(x) }'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "image.onnx")
    np.save(tmp_path / "x.npy", np.zeros((2, 4, 4), np.uint8))
    models = (tmp_path / "image.onnx", tmp_path / "image.onnx")

    found = run("compare", *models, "--data", tmp_path / "x.npy", "--preprocess", "color=gray scale=1")

    assert found.exit_code == 0
    assert "2 samples" in found.stdout


def test_bench_prints_a_table_and_says_what_it_assumed(net: Path) -> None:
    found = run("bench", net, net, "--rounds", 1, "--profile")

    lines = found.stdout.splitlines()
    assert lines[0].split() == ["Model", "Size", "ms", "10-90", "%", "Ratio", "10-90", "%"]
    assert [line.split()[0] for line in lines[1:3]] == [str(net), str(net)]
    assert lines[3:6] == ["", str(net), lines[5]]
    assert lines[5].split() == ["Operator", "ms", "Share"]
    assert lines[6].startswith("MatMul ")
    assert found.stderr == "Input 'x' is float32[N, 4]; timed with 1x4. Change it with --shape.\n"


def test_bench_takes_shapes_or_data(net: Path, data: Path) -> None:
    shaped = run("bench", net, "--rounds", 1, "--shape", "x=3x4", "--json")
    fed = run("bench", net, "--rounds", 1, "--data", data, "--threads", 2, "--json")

    assert (shaped.stderr, fed.stderr) == ("", "")
    assert json.loads(shaped.stdout)["models"][0]["model"] == str(net)
    assert json.loads(fed.stdout)["threads"] == 2


def test_inspect_shows_the_sites(net: Path) -> None:
    found = run("inspect", net)

    assert (
        found.stdout
        == f"""\
{net}: {net.stat().st_size} B, opset 21

Parameters  16
Inputs      x float32[N, 4]
Outputs     y float32[N, 4]
Operators   1 MatMul
Quantized   no

Site  Operator  Weight
fc    MatMul    4 x 4
"""
    )
    assert json.loads(run("inspect", net, "--json").stdout)["sites"][0]["name"] == "fc"


def test_methods_are_listed_and_explained() -> None:
    every, one = run("methods"), run("methods", "bias")

    assert [line.split()[0] for line in every.stdout.splitlines()] == list(methods.names())
    assert one.stdout.startswith("Bias Compensation: ")
    assert "  keep = 'if-better'  `if-better`: adopted where" in one.stdout
    assert json.loads(run("methods", "bias", "--json").stdout)["name"] == "bias"
    assert [page["name"] for page in json.loads(run("methods", "--json").stdout)] == list(methods.names())


def test_recipes_are_listed_and_shown() -> None:
    every, one = run("recipe", "list"), run("recipe", "show", "bc")

    assert [line.split()[0] for line in every.stdout.splitlines()] == list(recipe.NAMED)
    assert recipe.loads(one.stdout) == recipe.NAMED["bc"]
    assert [r["name"] for r in json.loads(run("recipe", "list", "--json").stdout)] == list(recipe.NAMED)
    assert recipe.loads(json.loads(run("recipe", "show", "bc", "--json").stdout)["toml"]) == recipe.NAMED["bc"]


def test_export_writes_a_checked_model(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    output = tmp_path / "tanh.onnx"

    found = run("export", "torch.nn:Tanh", "--input", "input=1x3", "--dynamic", "batch", "-o", output)
    again = run("export", "torch.nn:Tanh", "--input", "input=1x3", "-o", output, "--force", "--json")

    lines = found.stdout.splitlines()
    assert lines[0] == "Inputs     input float32[batch, 3]"
    assert lines[3].startswith("Max error  ")
    assert lines[-2:] == [str(output), f"Next: onnxcomp quantize {output}"]
    assert json.loads(again.stdout)["path"] == str(output)


# --- the process -----------------------------------------------------------------------------------------------------


def test_an_interrupt_ends_with_130_and_one_line(net: Path) -> None:
    code = f"import onnxcomp.bench; print('ready', flush=True); {CODE}"
    command = [sys.executable, "-c", code, "bench", str(net), "--rounds", "100000", "--shape", "x=1x4"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=20)

    assert (process.returncode, output, errors) == (cli.INTERRUPTED, "", "Interrupted.\n")


def test_a_closed_pipe_is_no_complaint() -> None:
    reader, writer = os.pipe()
    os.close(reader)

    done = subprocess.run(
        [sys.executable, "-c", CODE, "recipe", "show", "auto"],
        cwd=ROOT,
        stdout=writer,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writer)

    assert done.stderr == b""


def test_names_that_the_output_cannot_encode_are_escaped(tmp_path: Path) -> None:
    path = save(tmp_path / "né.onnx", np.eye(4, dtype=np.float32))
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-c", CODE, "inspect", str(path)]

    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)

    assert "n\\xe9.onnx" in done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal, which Windows lacks")
def test_progress_is_shown_to_a_terminal_only(net: Path, data: Path) -> None:
    command = [sys.executable, "-c", CODE, "compare", str(net), str(net), "--data", str(data), "--samples", "3"]
    ours, theirs = os.openpty()

    terminal = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=theirs, check=True)
    piped = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    shown = os.read(ours, 1 << 16)
    os.close(ours)
    os.close(theirs)

    assert b"comparing" in shown
    assert b"3/3" in shown
    assert piped.stderr == b""
    assert b"\x1b" not in terminal.stdout
