"""The command line: the only module that prints or exits.

The answer goes to stdout, as text or with --json as JSON; progress, warnings and errors go to stderr. Exit codes: 0
done, 2 usage, 3 model, 4 data, 5 the result failed its proof, 6 it is worse than asked, 130 interrupted. Everything
heavy is imported inside the commands, so that help is instant.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from inspect import cleandoc
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Any

import click

from onnxcomp import __version__
from onnxcomp.errors import BoundError, OnnxcompError, UsageError

if TYPE_CHECKING:
    from onnxcomp.preprocess import Preprocess
    from onnxcomp.recipe import Recipe

INTERRUPTED = 130


class Command(click.Command):
    """A command with --json and --debug. Its docstring is one paragraph, and then examples, printed as they are written.

    Its function returns the answer, and then what to show of it: facts by name, and text.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.help, _, self.epilog = cleandoc(self.help or "").partition("\n\n")
        self.params.append(click.Option(["--json"], is_flag=True, help="Print the answer as JSON."))
        self.params.append(click.Option(["--debug"], is_flag=True, help="Show an error's trace."))

    def invoke(self, ctx: click.Context) -> None:
        """Run the command and print its answer."""
        as_json, ctx.meta["debug"] = ctx.params.pop("json"), ctx.params.pop("debug")
        answer, *shown = super().invoke(ctx)
        from onnxcomp.report import json
        from onnxcomp.report.text import facts

        lines = "\n".join(facts(part) if isinstance(part, dict) else part for part in shown)
        text = json.to_json(answer) if as_json else lines.rstrip("\n")
        encoding = sys.stdout.encoding or "utf-8"
        click.echo(text.encode(encoding, "backslashreplace").decode(encoding))
        ctx.exit(ctx.meta.get("exit code", 0))

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples."""
        formatter.write(f"\nExample:\n{indent(self.epilog or '', '  ')}\n")


class Commands(click.Group):
    """Commands whose errors become one line on stderr and an exit code."""

    command_class = Command
    group_class = type

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except OnnxcompError as error:
            if ctx.meta.get("debug"):
                click.echo("".join(traceback.format_exception(error)), err=True, nl=False)
            click.echo(f"{type(error).__name__}: {' '.join(str(error).splitlines())}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            ctx.exit(INTERRUPTED)


def _steps(ctx: click.Context, parameter: click.Parameter, value: str | None) -> Preprocess | None:
    from onnxcomp.preprocess import Preprocess

    return None if value is None else Preprocess.parse(value)


def _provider(ctx: click.Context, parameter: click.Parameter, value: str | None) -> None:
    if value is not None:
        from onnxcomp import runtime

        ctx.with_resource(runtime.provider(value))


def _shapes(ctx: click.Context, parameter: click.Parameter, values: Sequence[str]) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for text in values:
        found = re.fullmatch(r"(.+)=([1-9]\d*(?:x[1-9]\d*)*)", text, re.ASCII)
        if found is None:
            raise UsageError(f"Shape '{text}' is not understood. Write it like pixel_values=1x3x224x224.")
        shapes[found[1]] = tuple(map(int, found[2].split("x")))
    return shapes


PROVIDER = click.option(
    "--provider", callback=_provider, expose_value=False, metavar="NAME",
    help="ONNX Runtime's execution provider: cpu by default, cuda, tensorrt.",
)  # fmt: skip
PREPROCESS = click.option("--preprocess", callback=_steps, metavar='"KEY=VALUE ..."', help="From pixels to the model's input.")


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="onnxcomp")
def main() -> None:
    """Quantize ONNX models and repair the quantization error."""


@main.command()
@click.argument("model", type=click.Path())
@click.option("--data", type=click.Path(), help="Calibration samples: .npz, .npy, a folder of either, or of images.")
@click.option("-o", "--output", type=click.Path(), help="Where the result goes; by default MODEL's name with the bits.")
@click.option("--bits", metavar="wXaY", help="Width of weights and activations, 2 to 8 bits each; w8a8 by default.")
@click.option("--recipe", "recipe_name", default="auto", metavar="NAME|FILE.toml", help="See `onnxcomp recipe list`.")
@click.option("--compensate", metavar="auto|none|NAME,...", help="Exactly these methods, in this order.")
@click.option("--target", metavar="NAME", help="The runtime to write for (see `onnxcomp targets`); this machine's by default.")
@click.option("--half", is_flag=True, default=None, help="Write float16 beside the codes, where the target takes it.")
@click.option("--samples", type=int, metavar="N", help="Calibrate on at most N samples; 128 by default.")
@click.option("--include", multiple=True, metavar="PATTERN", help="Quantize only sites that match: a glob, re: or op:.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave sites that match in float.")
@click.option("--products", is_flag=True, default=None, help="Quantize MatMuls of two activations too.")
@click.option("--ranges", metavar="mse|percentile|minmax", help="How activation ranges are chosen.")
@click.option("--activations", metavar="auto|static|dynamic|token|float", help="When activation ranges are measured.")
@PREPROCESS
@PROVIDER
@click.option("--seed", type=int, metavar="N", help="Decides which samples are used; 0 by default.")
@click.option("--max-drop", type=float, metavar="POINTS", help="Write nothing if more of the answers on --data change.")
@click.option("--labels", type=click.Path(), help="Let --max-drop count right answers instead: .npy, .npz or .csv.")
@click.option("--force", is_flag=True, help="Overwrite the output.")
@click.option("--split", is_flag=True, help="Write a model of each weight term too; for xint of granularity 'model'.")
@click.option("--all", "all_sites", is_flag=True, help="Show every site.")
def quantize(
    model: str, data: str | None, output: str | None, *, max_drop: float | None, labels: str | None,
    force: bool, split: bool, all_sites: bool, **options: Any,
) -> tuple[object, ...]:  # fmt: skip
    """Quantize MODEL and write the result once it is proven to run.

    onnxcomp quantize vit.onnx --data calib.npz
    onnxcomp quantize vit.onnx --data images/ --preprocess "crop=224 mean=0.5 std=0.5" --bits w4a8 -o vit4.onnx
    """
    if max_drop is not None and data is None:
        raise UsageError("--max-drop is measured on samples. Pass --data.")
    if split and max_drop is not None:
        raise UsageError("--split writes its files at once, and --max-drop decides later. Give one of them.")
    if labels is not None and max_drop is None:
        raise UsageError("--labels is for --max-drop. Pass both, or compare the result with `onnxcomp compare`.")
    recipe, path = _recipe(**options), Path(model)
    destination = Path(output) if output is not None else path.with_name(f"{path.stem}.{recipe.bits}.onnx")

    from onnxcomp import pipeline
    from onnxcomp.comparison import compare as compare_models
    from onnxcomp.comparison import demand
    from onnxcomp.graph import files
    from onnxcomp.report import text

    files.check_output(destination, path, force=force)
    with _progress() as progress:
        written = None if max_drop is not None else destination
        result = pipeline.quantize(path, data, recipe, output=written, force=force, split=split, progress=progress)
        if max_drop is not None:
            found = compare_models(path, result.model, data, labels=labels, preprocess=recipe.preprocess, progress=progress)
            demand(found, max_drop)
            files.save(result.model, destination, force=force, source=path)
    shown, following = result.report, ["compare", model, str(destination), "--data", "TEST_DATA"]
    if recipe.preprocess is not None:
        following += ["--preprocess", str(recipe.preprocess)]
    if data is None:
        click.echo(shown.notes[0], err=True)
        shown, following = dataclasses.replace(shown, notes=shown.notes[1:]), ["bench", model, str(destination)]
    return result.report, text.report(shown, all_sites=all_sites), f"\n{destination}\nNext: onnxcomp {shlex.join(following)}"


@main.command()
@click.argument("reference", type=click.Path())
@click.argument("other", type=click.Path())
@click.option("--data", type=click.Path(), required=True, help="Samples: .npz, .npy, a folder of either, or of images.")
@click.option("--labels", type=click.Path(), help="One label per answer: .npy, .npz, or a file,label .csv.")
@PREPROCESS
@PROVIDER
@click.option("--samples", "limit", type=int, metavar="N", help="Compare on N of the samples.")
def compare(reference: str, other: str, data: str, **options: Any) -> tuple[object, ...]:
    """Compare the outputs of two models on samples.

    onnxcomp compare vit.onnx vit.w8a8.onnx --data test.npz
    onnxcomp compare vit.onnx vit.w8a8.onnx --data images/ --labels labels.csv --preprocess crop=224
    """
    from onnxcomp.comparison import compare as compare_models
    from onnxcomp.report import text

    with _progress() as progress:
        found = compare_models(reference, other, data, progress=progress, **options)
    return found, text.comparison(found)


@main.command()
@click.argument("models", nargs=-1, required=True, type=click.Path(), metavar="MODEL...")
@click.option("--data", type=click.Path(), help="Samples to run on; made-up ones by default.")
@click.option("--shape", callback=_shapes, multiple=True, metavar="NAME=1x3x224x224", help="Shape of a made-up input.")
@PREPROCESS
@PROVIDER
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Threads per model.")
@click.option("--rounds", type=click.IntRange(min=1), default=20, show_default=True, help="Rounds of 20 ms per model.")
@click.option("--profile", "operators", is_flag=True, help="Show the time by type of operator.")
def bench(models: tuple[str, ...], data: str | None, shape: dict[str, tuple[int, ...]], **options: Any) -> tuple[object, ...]:
    """Time models in turn; ratios are to the first.

    onnxcomp bench vit.onnx vit.w8a8.onnx --threads 1
    onnxcomp bench vit.onnx --shape pixel_values=8x3x224x224 --profile
    """
    if data is not None and shape:
        raise UsageError("--data and --shape exclude each other: the samples have shapes of their own.")
    from onnxcomp.bench import bench as time_models
    from onnxcomp.report import text

    found = time_models(models, data, shapes=shape, **options)
    for note in found.notes:
        click.echo(note, err=True)
    return found, text.benchmark(found)


@main.command()
@click.argument("model", type=click.Path())
@click.option("--target", default="auto", metavar="NAME", help="The runtime to judge for; this machine's by default.")
@click.option("--strict", is_flag=True, help="Exit with 6 where a rule is broken.")
def lint(model: str, target: str, strict: bool) -> tuple[object, ...]:
    """Judge any ONNX file by the rules of a target.

    onnxcomp lint model.onnx --target tensorrt
    onnxcomp lint vit.w8a8.onnx --strict
    """
    from onnxcomp.lint import lint as judge
    from onnxcomp.report import text

    found = judge(model, target)
    for note in found.notes:
        click.echo(note, err=True)
    if strict and found.violations:
        click.get_current_context().meta["exit code"] = BoundError.exit_code
    return found, text.judgement(found)


@main.command()
def targets() -> tuple[object, ...]:
    """List the runtimes that files can be written for.

    onnxcomp targets
    """
    from onnxcomp import targets as runtimes

    found = [runtimes.find(name) for name in runtimes.names()]
    chosen = runtimes.find("auto").name
    shown = {t.name: [f"{t.summary}{' (this machine)' if t.name == chosen else ''}", t.describe()] for t in found}
    return [{"name": t.name, "summary": t.summary, "takes": t.describe(), "needs": t.needs} for t in found], shown


@main.command()
@click.argument("model", type=click.Path())
@click.option("--all", "all_sites", is_flag=True, help="Show every site.")
def inspect(model: str, all_sites: bool) -> tuple[object, ...]:
    """Show a model's sites, or how it was quantized.

    onnxcomp inspect vit.onnx --all
    onnxcomp inspect vit.w8a8.onnx --json
    """
    from onnxcomp.inspect import inspect as inspect_file
    from onnxcomp.report import text

    found = inspect_file(model)
    return found, text.inspection(found, all_sites=all_sites)


@main.command()
@click.argument("model", type=click.Path())
@click.option("--method", "methods", multiple=True, required=True, metavar="NAME", help="The method to take out.")
@click.option("-o", "--output", type=click.Path(), help="Where the file goes; MODEL.stripped.onnx by default.")
@click.option("--force", is_flag=True, help="Overwrite the output.")
def strip(model: str, methods: tuple[str, ...], output: str | None, force: bool) -> tuple[object, ...]:
    """Take a method's compensations out of a quantized model again.

    onnxcomp strip vit.w4a4.onnx --method nbc -o plain.onnx
    """
    from onnxcomp.strip import strip as strip_file

    destination = output or str(Path(model).with_suffix(".stripped.onnx"))
    places = strip_file(model, methods, output=destination, force=force).places
    return {"path": destination, "stripped": places}, {"Stripped": [", ".join(places)], "File": [destination]}


@main.command()
@click.argument("name", required=False)
def methods(name: str | None) -> tuple[object, ...]:
    """List the compensation methods, or explain one.

    onnxcomp methods
    onnxcomp methods bias
    """
    from onnxcomp import manual

    if name is None:
        pages = manual.pages()
        return pages, {page.name: [page.summary] for page in pages}
    page = manual.page(name)
    options = {f"  {option.name} = {option.default}": [option.help] for option in page.options}
    return page, f"{page.text}\n\nOptions\n", options


@main.group()
def recipe() -> None:
    """List the named recipes, or show one as TOML."""


@recipe.command("list")
def list_recipes() -> tuple[object, ...]:
    """List the named recipes.

    onnxcomp recipe list
    """
    from onnxcomp import recipe as recipes

    found = [{"name": r.name, "description": r.description} for r in recipes.NAMED.values()]
    return found, {r["name"]: [r["description"]] for r in found}


@recipe.command("show")
@click.argument("name", metavar="NAME|FILE")
def show_recipe(name: str) -> tuple[object, ...]:
    """Print a recipe as TOML, every key written out.

    onnxcomp recipe show base > mine.toml
    """
    from onnxcomp import recipe as recipes

    found = recipes.find(name)
    return {"name": found.name, "toml": recipes.dumps(found)}, recipes.dumps(found)


@main.command()
@click.argument("spec", metavar="PKG.MODULE:FACTORY|FILE.pt2")
@click.option("--input", "inputs", multiple=True, required=True, metavar="NAME=SHAPE[:TYPE]", help="An input: x=1x3x224x224.")
@click.option("--dynamic", multiple=True, metavar="batch|NAME:AXIS=DIM", help="A dimension that may vary.")
@click.option("-o", "--output", type=click.Path(), required=True, help="The ONNX file to write.")
@click.option("--force", is_flag=True, help="Overwrite the output.")
def export(spec: str, inputs: tuple[str, ...], output: str, **options: Any) -> tuple[object, ...]:
    """Export a torch module to ONNX and check it against torch.

    onnxcomp export pkg.module:factory --input x=1x3x224x224 --dynamic batch -o model.onnx
    """
    from onnxcomp.export import export as export_module

    found = export_module(spec, inputs, output=output, **options)
    error = f"{found.max_error:.3g}, tolerance {found.tolerance:.3g}"
    lines = {"Inputs": found.inputs, "Outputs": found.outputs, "Opset": [str(found.opset)], "Max error": [error]}
    return found, lines, f"\n{found.path}\nNext: {shlex.join(['onnxcomp', 'quantize', str(found.path)])}"


# --- what the commands share -----------------------------------------------------------------------------------------


def _recipe(recipe_name: str, compensate: str | None, exclude: tuple[str, ...], **changes: Any) -> Recipe:
    """The recipe of that name or file, with what was given on the command line in place of its own values."""
    from onnxcomp import recipe as recipes

    recipe = recipes.find(recipe_name)
    changes = {key: value for key, value in changes.items() if value is not None and value != ()}
    methods = None if compensate is None else recipes.parse_compensate(compensate)
    if methods is not None:
        # A list means these methods and nothing chosen automatically, so on plain ranges too.
        changes = {"ranges": "mse", "activations": "static"} | changes | {"compensate": methods}
    return dataclasses.replace(recipe, exclude=(*recipe.exclude, *exclude), **changes)


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """What takes progress(stage, done, total) and shows a bar, if stderr is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

    columns = ("{task.description}", BarColumn(), "{task.completed}/{task.total}", TimeElapsedColumn(), TimeRemainingColumn())
    console, is_quiet = Console(stderr=True), not sys.stderr.isatty()
    with Progress(*columns, console=console, transient=True, disable=is_quiet) as bar:
        task = bar.add_task("", total=None)
        yield lambda stage, done, total: bar.update(task, description=stage, completed=done, total=total)
