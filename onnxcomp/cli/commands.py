"""Every command but `quantize`."""

import shlex
from pathlib import Path
from typing import Any

import click

from onnxcomp.cli.shell import PREPROCESS, PROVIDER, main, progress_bar, read_recipe, shapes
from onnxcomp.errors import BoundError, UsageError


@main.command()
@click.argument("reference", type=click.Path())
@click.argument("other", type=click.Path())
@click.option("--data", type=click.Path(), required=True, help="Samples: .npz, .npy, a folder of either, or of images.")
@click.option("--labels", type=click.Path(), help="One label per answer: .npy, .npz, or a file,label .csv.")
@PREPROCESS
@PROVIDER
@click.option("--samples", "limit", type=int, metavar="N", help="Compare on N of the samples.")
@click.option("--methods", is_flag=True, help="What each method in OTHER is worth: without it, and what it adds.")
def compare(reference: str, other: str, data: str, *, methods: bool, **options: Any) -> tuple[object, ...]:
    """Compare the outputs of two models on samples.

    onnxcomp compare vit.onnx vit.w8a8.onnx --data test.npz
    onnxcomp compare vit.onnx vit.w8a8.onnx --data images/ --labels labels.csv --preprocess crop=224
    onnxcomp compare vit.onnx vit.w4a4.onnx --data test.npz --methods
    """
    from onnxcomp.comparison import compare as compare_models
    from onnxcomp.report import text
    from onnxcomp.worth import compare_methods

    with progress_bar() as progress:
        found = (compare_methods if methods else compare_models)(reference, other, data, progress=progress, **options)
    return found, text.comparison(found)


@main.command()
@click.argument("model", type=click.Path())
@click.option("--data", type=click.Path(), required=True, help="Calibration samples, as for quantize.")
@click.option("--bits", metavar="wXaY", help="Width to judge at; w4a4 by default.")
@click.option("--recipe", "recipe_name", default="auto", metavar="NAME|FILE.toml", help="See `onnxcomp recipe list`.")
@click.option("--target", metavar="NAME", help="The runtime to quantize for; this machine's by default.")
@click.option("--samples", type=int, metavar="N", help="Calibrate on at most N samples; 128 by default.")
@PREPROCESS
@PROVIDER
@click.option("--all", "all_sites", is_flag=True, help="Show every site.")
def analyze(model: str, data: str, *, all_sites: bool, **options: Any) -> tuple[object, ...]:
    """Rank the sites by what quantizing them does to the output.

    onnxcomp analyze vit.onnx --data calib.npz --bits w4a4
    """
    from onnxcomp.analysis import analyze as rank
    from onnxcomp.report import text

    options["bits"] = options["bits"] or (None if Path(options["recipe_name"]).suffix == ".toml" else "w4a4")
    with progress_bar() as progress:
        found = rank(model, data, read_recipe(**options), progress=progress)
    return found, text.damages(found, all_sites=all_sites)


@main.command()
@click.argument("models", nargs=-1, required=True, type=click.Path(), metavar="MODEL...")
@click.option("--data", type=click.Path(), help="Samples to run on; made-up ones by default.")
@click.option("--shape", callback=shapes, multiple=True, metavar="NAME=1x3x224x224", help="Shape of a made-up input.")
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
    chosen = runtimes.here()
    shown = {t.name: [f"{t.summary}{' (this machine)' if t.name == chosen else ''}", t.describe()] for t in found}
    return [{"name": t.name, "summary": t.summary, "takes": t.describe(), "needs": t.needs} for t in found], shown


@main.command()
@click.argument("model", type=click.Path())
@click.option("--report", "page", type=click.Path(), metavar="FILE.html", help="Write the report as a web page too.")
@click.option("--force", is_flag=True, help="Overwrite FILE.html.")
@click.option("--all", "all_sites", is_flag=True, help="Show every site.")
def inspect(model: str, page: str | None, force: bool, all_sites: bool) -> tuple[object, ...]:
    """Show a model's sites, or how it was quantized.

    onnxcomp inspect vit.onnx --all
    onnxcomp inspect vit.w8a8.onnx --report vit.html
    """
    from onnxcomp.graph import files
    from onnxcomp.inspect import inspect as inspect_file
    from onnxcomp.report import html, text

    files.check_output(page, model, force=force)
    found = inspect_file(model)
    if page is not None:
        if found.report is None:
            raise UsageError(f"{model} has no report, for onnxcomp did not quantize it. Leave --report out.")
        files.save_text(html.page(found.report), page)
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
    """Print a recipe as TOML, or that of a quantized file.

    onnxcomp recipe show base > mine.toml
    onnxcomp recipe show vit.w4a4.onnx > frozen.toml
    """
    from onnxcomp import account, recipe as recipes
    from onnxcomp.inspect import inspect as inspect_file

    if Path(name).suffix != ".onnx":
        found = recipes.find(name)
    else:
        report = inspect_file(name).report
        if report is None:
            raise UsageError(f"{name} was not quantized by onnxcomp, so it holds no recipe. Give a file that `quantize` wrote.")
        found = account.frozen(report)
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
