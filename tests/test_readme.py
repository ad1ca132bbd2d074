"""The README says what is true: its sessions are run, its commands, options, keys and files exist."""

from __future__ import annotations

import dataclasses
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from onnxcomp import errors, recipe as recipes
from onnxcomp.cli import main
from onnxcomp.methods.bias import BiasCompensation
from onnxcomp.preprocess import Preprocess

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
HOUSE = (ROOT / "onnxcomp" / "README.md").read_text(encoding="utf-8")
PROSE = re.sub(r"^```.*?^```", "", TEXT, flags=re.DOTALL | re.MULTILINE)
SYSTEM = ("python3", "pip", "pytest", "dask")
"""What is called in the README and is not ours."""

ELLIPSIS = "..."
"""In a session, alone on a line: any number of lines."""
NUMBER = re.compile(r"(?<![\w/.])[+-]?\d+(?:\.\d+)*(?![\w/])")
ANSWERS = re.compile(r"%| (?:points|of 1000|lost|gained|\+-)")
"""What stands behind a number of answers, or their share."""
FEW_ANSWERS = 5
RELATIVE = 0.02
"""Another processor or runtime rounds the last bit of a float differently, and a code here and there with it. Of 1000
answers that turns a few, dB and sizes move by less than a fiftieth, and every other number by a unit of its last digit.
"""


@dataclasses.dataclass(frozen=True)
class Session:
    """A command of the README and the lines shown under it."""

    command: str
    shown: tuple[str, ...]


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


def sessions() -> list[Session]:
    """The commands of every console block in their order, each with the lines up to the next one."""
    parts = [part for block in blocks("console") for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]]
    return [Session(command, tuple(shown)) for command, *shown in (part.rstrip("\n").split("\n") for part in parts)]


def calls() -> Iterator[list[str]]:
    """The arguments of every call of onnxcomp, in blocks and in the text."""
    lines = [session.command for session in sessions()]
    lines += [command for block in blocks("sh") for line in block.splitlines() for command in line.split(" && ")]
    lines += re.findall(r"`(onnxcomp [^`]+)`", PROSE)
    for line in lines:
        program, *arguments = shlex.split(line)
        if Path(program).name == "onnxcomp":
            yield arguments


def find_command(arguments: list[str]) -> tuple[list[str], click.Command]:
    """The path of the command that is called, and the command."""
    path: list[str] = []
    command: click.Command = main
    for word in arguments:
        if not isinstance(command, click.Group):
            break
        assert word in command.commands, f"onnxcomp {' '.join(arguments)}: there is no command '{word}'"
        path, command = [*path, word], command.commands[word]
    return path, command


def leaves(group: click.Group = main, *path: str) -> Iterator[tuple[str, click.Command]]:
    """Every command by its full name."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from leaves(command, *path, name)
        else:
            yield " ".join((*path, name)), command


def options(command: click.Command) -> set[str]:
    """The options that `--help` of the command shows."""
    context = click.Context(command, **main.context_settings)
    return {name for parameter in command.get_params(context) if isinstance(parameter, click.Option) for name in parameter.opts}


def find_difference(found: list[str], shown: tuple[str, ...], *, is_timed: bool) -> str | None:
    """None where the lines are those shown: words exactly, numbers closely (not at all where they are timings)."""
    at = 0
    is_open = False
    for line in shown:
        if line == ELLIPSIS:
            is_open = True
            continue
        reach = found[at:] if is_open else found[at : at + 1]
        step = next((i for i, candidate in enumerate(reach) if is_same(candidate, line, is_timed=is_timed)), None)
        if step is None:
            return f"shown: {line}\nfound:\n" + "\n".join(reach)
        at, is_open = at + step + 1, False
    if at < len(found) and not is_open:
        return "not shown:\n" + "\n".join(found[at:])
    return None


def is_same(found: str, shown: str, *, is_timed: bool) -> bool:
    """Whether the words are equal and the numbers close. The proof names versions and measures mere rounding."""
    if words(found) != words(shown):
        return False
    if is_timed or shown.startswith("Verified"):
        return True
    pairs = zip(NUMBER.finditer(found), NUMBER.finditer(shown), strict=True)
    return all(is_close(a.group(), b.group(), shown[b.end() :], shown[: b.start()]) for a, b in pairs)


def words(line: str) -> str:
    """The line without its numbers, and without the widths of columns, which follow the numbers."""
    return " ".join(NUMBER.sub("#", line).split())


def is_close(found: str, shown: str, behind: str, before: str) -> bool:
    """Whether two numbers may come from the same computation on two machines."""
    if shown.count(".") > 1:
        return True  # a version
    value, digits = float(shown), len(shown.partition(".")[2])
    slack = max(10.0**-digits, RELATIVE * abs(value))
    if ANSWERS.match(behind) or before.endswith("+- "):
        slack = FEW_ANSWERS * (0.1 if digits else 1.0)
    return abs(float(found) - value) <= slack + 1e-9


def in_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Go to a folder with what the README's commands read: the models, not what was made of them, and the recipes shown."""
    shutil.copytree(ROOT / "models", tmp_path / "models", ignore=shutil.ignore_patterns("__pycache__", "*.w*a*.onnx"))
    for block in blocks("toml"):
        name, _, _ = block.removeprefix("# ").partition("\n")
        (tmp_path / name).write_text(block, encoding="utf-8")
    monkeypatch.chdir(tmp_path)


def test_the_sessions_do_what_they_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    in_a_copy(tmp_path, monkeypatch)
    monkeypatch.setattr("onnxcomp.targets.here", lambda: "ort-x86")  # where they were shown
    wrong = []
    for session in sessions():
        program, *arguments = shlex.split(session.command)
        assert program == "onnxcomp"
        result = CliRunner().invoke(main, arguments, prog_name="onnxcomp")
        difference = find_difference(result.output.rstrip("\n").split("\n"), session.shown, is_timed=arguments[0] == "bench")
        if result.exit_code != 0 or difference is not None:
            wrong.append(f"$ {session.command}\nexit code {result.exit_code}\n{difference}")

    assert not wrong, "\n\n".join(wrong)


def test_every_session_shows_something():
    assert sessions()
    assert [session.command for session in sessions() if not session.shown] == []


@pytest.mark.parametrize(
    ("found", "shown", "same"),
    [
        ("output  31.9 dB  99.80% (998 of 1000)", "output  31.8 dB  99.50% (995 of 1000)", True),
        ("output  31.9 dB  99.80% (998 of 1000)", "output  33.9 dB  99.80% (998 of 1000)", False),
        ("output  31.9 dB  99.80% (998 of 1000)", "output  31.9 dB  99.00% (990 of 1000)", False),
        ("Kernels  18 of 18 quantized sites", "Kernels  16 of 18 quantized sites", False),
        ("/blocks/0/Conv  w8a8  48.1 -> 50.2", "/blocks/0/Conv  w4a8  48.1 -> 50.2", False),
        ("/blocks/0/Conv  w8a8  48.1 -> 50.2", "/blocks/1/Conv  w8a8  48.1 -> 50.2", False),
        ("Made by  onnxcomp 0.1.0", "Made by  onnxcomp 0.2.0", True),
    ],
)
def test_lines_are_compared_by_words_and_close_numbers(found: str, shown: str, same: bool):
    assert is_same(found, shown, is_timed=False) is same


def test_an_ellipsis_alone_stands_for_any_lines():
    assert find_difference(["a", "b", "c"], ("a", "...", "c"), is_timed=False) is None
    assert find_difference(["a", "c"], ("a", "...", "c", "..."), is_timed=False) is None
    assert find_difference(["a", "b", "c"], ("a", "c"), is_timed=False) == "shown: c\nfound:\nb"
    assert find_difference(["a", "b"], ("a",), is_timed=False) == "not shown:\nb"


def test_every_command_and_option_that_is_named_exists():
    unknown = []
    for arguments in calls():
        path, command = find_command(arguments)
        given = {word.partition("=")[0] for word in arguments[len(path) :] if re.match(r"--?[a-z]", word)}
        unknown += [f"{' '.join(path)} {option}" for option in sorted(given - options(command))]

    assert unknown == []


def test_every_option_that_the_text_names_belongs_to_a_command():
    known = {option for _, command in leaves() for option in options(command)}

    assert set(re.findall(r"`(?:\w+ )?(--[a-z-]+)", PROSE)) - known == set()


def test_every_command_is_shown():
    shown = {" ".join(find_command(arguments)[0]) for arguments in calls()}

    assert {name for name, _ in leaves()} - shown == set()


def test_the_recipe_names_every_key_and_no_other():
    (block,) = blocks("toml")
    table = tomllib.loads(block)
    rules, (bias,) = table["site"], table["compensate"]

    def fields(kind: type) -> set[str]:
        return {field.name for field in dataclasses.fields(kind)}

    assert table.keys() == fields(recipes.Recipe)
    assert table["preprocess"].keys() == fields(Preprocess)
    assert {key for rule in rules for key in rule} == fields(recipes.SiteRule)
    assert bias.keys() == fields(BiasCompensation) | {"method"}


def test_the_recipe_says_what_the_defaults_are():
    """Where the example does not show a key off, it holds the key's default; a method's keys all do."""
    (block,) = blocks("toml")
    shown, default = recipes.loads(block), recipes.Recipe()

    differing = {f.name for f in dataclasses.fields(shown) if getattr(shown, f.name) != getattr(default, f.name)}
    assert differing == {"name", "description", "bits", "exclude", "preprocess", "site"}


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    in_a_copy(tmp_path, monkeypatch)
    (block,) = blocks("python")

    exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})

    name, decibel, points = capsys.readouterr().out.split()
    assert name.startswith("/")
    assert 10 < float(decibel) < 40  # 4-bit weights: about 6 dB a bit
    assert abs(float(points)) < 5
    assert (tmp_path / "vit4.onnx").is_file()


def test_the_exit_codes_are_those_of_the_errors():
    rows = {int(code) for code in re.findall(r"^\| (\d+) \|", TEXT, re.MULTILINE)}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.OnnxcompError)]

    assert rows == {0, 130} | {kind.exit_code for kind in kinds}


def test_a_fresh_machine_needs_one_line_to_quantize_and_one_to_test():
    (install, test) = next(block for block in blocks("sh") if "venv" in block).splitlines()

    for line in (install, test):
        assert line.startswith("python3 -m venv .venv && .venv/bin/pip install ")
    assert ".venv/bin/onnxcomp quantize models/" in install
    assert test.endswith(" && .venv/bin/python -m pytest -n auto --dist loadfile")


def test_ci_installs_and_tests_as_the_readme_says_in_an_environment_of_its_own():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    (_, line) = next(block for block in blocks("sh") if "venv" in block).splitlines()
    _, install, test = (re.sub(r"\.venv/bin/(python -m )?", "-m ", step) for step in line.split(" && "))

    # CI adds --quiet, and runs the tests in three parts that are the whole: `versions` tests are skipped unless asked for.
    # Only the first part runs in parallel, for the others fill the machine by themselves.
    assert install.replace("install", "install --quiet") in script
    assert f'{test} -m "not real"' in script
    assert re.findall(r"-m pytest -m (versions|real)", script) == ["versions", "real"]
    assert "venv=$(mktemp -d)" in script
    assert '-m venv "$venv"' in script


def test_every_file_that_is_named_exists():
    named = {name for name in re.findall(r"`([\w./-]+/[\w.-]*|[\w./-]+\.(?:py|md))`", PROSE) if not name.startswith("../")}

    assert {name for name in named if not (ROOT / name).exists()} == set()


def test_the_house_names_every_module_once():
    package = ROOT / "onnxcomp"
    modules = {p.relative_to(package).as_posix() for p in package.rglob("*.py") if p.read_text(encoding="utf-8").strip()}
    named = re.findall(r"^\| `([\w/]+\.py)` \|", HOUSE, re.MULTILINE)

    assert sorted(named) == sorted(modules)
