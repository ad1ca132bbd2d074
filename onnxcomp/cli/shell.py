"""What every command shares: how an answer is printed, how an error ends, and the options that several take.

The answer goes to stdout, as text or with --json as JSON; progress, warnings and errors go to stderr. Exit codes: 0
done, 2 usage, 3 model, 4 data, 5 the result failed its proof, 6 it is worse than asked, 7 no room left, 130 interrupted.
Everything heavy is imported inside the commands, so that help is instant.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from inspect import cleandoc
from textwrap import indent
from typing import TYPE_CHECKING, Any

import click

from onnxcomp import __version__
from onnxcomp.errors import OnnxcompError, UsageError

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

        lines = "\n".join(facts(part) if isinstance(part, dict) else part for part in shown if part)
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
            click.echo(f"Interrupted. {ctx.meta.get('interrupted', '')}".rstrip(), err=True)
            ctx.exit(INTERRUPTED)


def _steps(ctx: click.Context, parameter: click.Parameter, value: str | None) -> Preprocess | None:
    from onnxcomp.preprocess import Preprocess

    return None if value is None else Preprocess.parse(value)


def _of_sessions(ctx: click.Context, parameter: click.Parameter, value: object) -> None:
    """Let sessions have what the function of `runtime` that is called like the option sets."""
    if value is not None:
        from onnxcomp import runtime

        ctx.with_resource(getattr(runtime, parameter.name or "")(value))


def shapes(ctx: click.Context, parameter: click.Parameter, values: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Read --shape NAME=1x3x224x224."""
    found = {}
    for text in values:
        read = re.fullmatch(r"(.+)=([1-9]\d*(?:x[1-9]\d*)*)", text, re.ASCII)
        if read is None:
            raise UsageError(f"Shape '{text}' is not understood. Write it like pixel_values=1x3x224x224.")
        found[read[1]] = tuple(map(int, read[2].split("x")))
    return found


def size(ctx: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    """Read a number of bytes such as 512MB, whole from 1 on."""
    if value is None:
        return None
    read = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kMGT]?)B?", value, re.ASCII)
    if read is None:
        raise UsageError(f"Size '{value}' is not understood. Write it like 512MB or 2GB.")
    found = float(read[1]) * 1000 ** " kMGT".index(read[2] or " ")
    return int(found) if found >= 1 else found


PROVIDER = click.option(
    "--provider", callback=_of_sessions, expose_value=False, metavar="NAME",
    help="ONNX Runtime's execution provider: cpu by default, cuda, tensorrt.",
)  # fmt: skip
THREADS = click.option(
    "--threads", callback=_of_sessions, expose_value=False, type=click.IntRange(min=1), metavar="N",
    help="Threads of ONNX Runtime; every core by default. They change no byte.",
)  # fmt: skip
PREPROCESS = click.option("--preprocess", callback=_steps, metavar='"KEY=VALUE ..."', help="From pixels to the model's input.")


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="onnxcomp")
def main() -> None:
    """Quantize ONNX models and repair the quantization error."""


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """What takes progress(stage, done, total) and shows a bar, if stderr is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

    columns = ("{task.description}", BarColumn(), "{task.completed}/{task.total}", TimeElapsedColumn(), TimeRemainingColumn())
    console, is_quiet = Console(stderr=True), not sys.stderr.isatty()
    with Progress(*columns, console=console, transient=True, disable=is_quiet) as bar:
        task = bar.add_task("", total=None)
        yield lambda stage, done, total: bar.update(task, description=stage, completed=done, total=total)


def read_recipe(recipe_name: str, compensate: str | None = None, exclude: tuple[str, ...] = (), **changes: Any) -> Recipe:
    """The recipe of that name or file, with what was given on the command line in place of its own values."""
    from onnxcomp import recipe as recipes

    recipe = recipes.find(recipe_name)
    changes = {key: value for key, value in changes.items() if value is not None and value != ()}
    methods = None if compensate is None else recipes.parse_compensate(compensate)
    if methods is not None:
        # A list means these methods and nothing chosen automatically, so on plain ranges too.
        changes = {"ranges": "mse", "activations": "static"} | changes | {"compensate": methods}
    return dataclasses.replace(recipe, exclude=(*recipe.exclude, *exclude), **changes)
