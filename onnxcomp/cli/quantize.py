"""`onnxcomp quantize`."""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from onnxcomp.cli.shell import PREPROCESS, PROVIDER, THREADS, main, progress_bar, read_recipe, size
from onnxcomp.errors import UsageError

LONG = 60
"""Seconds from which a run says in front what it will take."""
LARGE, ROUNDS = 1 << 30, 5
"""Bytes of a model from which it is not timed in the end, and rounds in which others are."""


@main.command()
@click.argument("model", type=click.Path())
@click.option("--data", type=click.Path(), help="Calibration samples: .npz, .npy, a folder of either, or of images.")
@click.option("-o", "--output", type=click.Path(), help="Where the result goes; by default MODEL's name with the bits.")
@click.option(
    "--bits", metavar="wXaY", help="Width of weights and activations, 2 to 8 bits each; w8a8 by default. auto: per site."
)
@click.option(
    "--block", type=int, metavar="N", help="For --bits wX: a scale per N inputs (16, 32, 64, 128) or, 0, per channel."
)
@click.option(
    "--embeddings/--no-embeddings", default=None, help="Embedding tables with --bits, or in float; by default in 8 bits."
)
@click.option("--recipe", "recipe_name", default="auto", metavar="NAME|FILE.toml", help="See `onnxcomp recipe list`.")
@click.option("--compensate", metavar="auto|none|NAME,...", help="Exactly these methods, in this order.")
@click.option("--reconstruct", is_flag=True, default=None, help="Refine every block by gradients; needs torch, and minutes.")
@click.option("--target", metavar="NAME", help="The runtime to write for (see `onnxcomp targets`); this machine's by default.")
@click.option("--half/--no-half", default=None, help="Float16 beside the codes, or not; by default if MODEL is, for tensorrt.")
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
@click.option(
    "--max-size",
    metavar="SIZE|RATIO",
    callback=size,
    help="With --bits auto: the file at most, 2MB say; below 1 of MODEL's size.",
)
@click.option("--max-latency", type=float, metavar="RATIO", help="With --bits auto: time at most, over MODEL's.")
@click.option("--labels", type=click.Path(), help="Let --max-drop count right answers instead: .npy, .npz or .csv.")
@click.option(
    "--memory", metavar="SIZE", callback=size, help="For the samples' activations, 2GB say; a quarter of what is free."
)
@click.option("--work", type=click.Path(), metavar="DIR", help="Keep what is finished there; the same command goes on.")
@click.option("--cluster", metavar="ADDRESS", help="Run samples on a Dask cluster: tcp://HOST:PORT, or local:N processes.")
@THREADS
@click.option("--force", is_flag=True, help="Overwrite the output.")
@click.option("--dry-run", is_flag=True, help="Show what would be done and what it would take; write nothing.")
@click.option("--split", is_flag=True, help="Write a model of each weight term too; for xint of granularity 'model'.")
@click.option("--report", "page", type=click.Path(), metavar="FILE.html", help="Write the report as a web page too.")
@click.option("--all", "all_sites", is_flag=True, help="Show every site.")
def quantize(
    model: str, data: str | None, output: str | None, *, max_drop: float | None, max_size: float | None,
    max_latency: float | None, labels: str | None, memory: int | None, work: str | None, cluster: str | None,
    dry_run: bool, force: bool,
    split: bool, page: str | None, all_sites: bool, **options: Any,
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
    bounds = {"max_drop": max_drop, "max_size": max_size, "max_latency": max_latency}
    bits = options.pop("bits")
    is_auto = bits == "auto"
    if is_auto and (data is None or split or set(bounds.values()) == {None}):
        raise UsageError("--bits auto needs --data and a bound, --max-drop, --max-size or --max-latency, and takes no --split.")
    if not is_auto and (max_size, max_latency) != (None, None):
        raise UsageError("--max-size and --max-latency choose bits. Pass --bits auto.")
    recipe, path = read_recipe(bits=None if is_auto else bits, **options), Path(model)
    widths = "auto" if is_auto else recipe.bits
    destination = Path(output) if output is not None else path.with_name(f"{path.stem}.{widths}.onnx")

    from onnxcomp import automatic, bench, pipeline, targets
    from onnxcomp.comparison import compare as compare_models, demand
    from onnxcomp.graph import files
    from onnxcomp.report import html, text
    from onnxcomp.report.model import Forecast

    def announce(found: Forecast) -> None:
        if (found.disk_bytes and work is None) or found.seconds > LONG:
            click.echo(text.forecast(found), err=True)

    files.check_output(destination, path, force=force)
    files.check_output(page, path, force=force)
    said: dict[str, Sequence[str]] = {}
    kept = "Nothing is kept; --work DIR would." if work is None else f"Start it again, with --work {work}, and it goes on."
    click.get_current_context().meta["interrupted"] = kept
    with progress_bar() as progress:
        if dry_run:
            plan = pipeline.foresee(path, data, recipe, memory=memory, work=work)
            return plan, text.plan(plan, all_sites=all_sites)
        how = {"force": force, "memory": memory, "work": work, "cluster": cluster, "progress": progress}
        if is_auto:
            result, said["Bounds"] = automatic.quantize(path, data, recipe, labels=labels, output=destination, **bounds, **how)
            said["Recipe"] = [str(destination.with_suffix(".recipe.toml"))]
        else:
            written = None if max_drop is not None else destination
            result = pipeline.quantize(path, data, recipe, output=written, split=split, announce=announce, **how)
        if max_drop is not None and not is_auto:
            found = compare_models(path, result.finished, data, labels=labels, preprocess=recipe.preprocess, progress=progress)
            demand(found, max_drop)
            files.save(result.finished, destination, force=force, source=path)
    if data is not None and result.report.target == targets.here() and files.size(path) < LARGE:
        how = {"preprocess": recipe.preprocess, "rounds": ROUNDS, "count": 1}
        said["Speed"] = text.speed(bench.bench([path, destination], data, **how).models[1])
    if page is not None:
        files.save_text(html.page(result.report), page)
    if result.traffic:
        click.echo(text.traffic(result.traffic, all_steps=all_sites), err=True)
    shown, following = result.report, ["compare", model, str(destination), "--data", "TEST_DATA"]
    if recipe.preprocess is not None:
        following += ["--preprocess", str(recipe.preprocess)]
    if data is None:
        click.echo(shown.notes[0], err=True)
        shown, following = dataclasses.replace(shown, notes=shown.notes[1:]), ["bench", model, str(destination)]
    last = f"\n{destination}\nNext: onnxcomp {shlex.join(following)}"
    return result.report, text.report(shown, said, all_sites=all_sites), last
