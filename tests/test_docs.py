"""The pages say what is true: their commands and their Python are run, where what they need is here."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from click.testing import CliRunner
from test_readme import find_command, options

from onnxcomp import targets
from onnxcomp.cli import main

ROOT = Path(__file__).resolve().parents[1]
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "onnxcomp" / "docs").glob("*.md"))}
OTHERS = ("schedule",)
"""Pages that are about no target."""
LONGEST = 150
BLOCK = re.compile(r"(?:^<!-- (not run|needs)[: ]+(.+?) -->\n)?^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
VERSION = re.compile(r"(?:ONNX Runtime|OpenVINO|TensorRT|Android|opset) \d+(?:\.\d+)?")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; the mark in front of it says that it is not run, or what it needs."""

    page: str
    mark: str
    needs: str
    language: str
    text: str

    def commands(self) -> list[list[str]]:
        """The arguments of its calls of onnxcomp."""
        return [shlex.split(line)[1:] for line in self.text.splitlines() if line.startswith("onnxcomp ")]


BLOCKS = [Block(page, *found.groups(default="")) for page, text in PAGES.items() for found in BLOCK.finditer(text)]
SNIPPETS = [block for block in BLOCKS if block.language == "python"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a page, with the files that its commands have made."""

    @cache
    def make(page: str) -> Path:
        folder = tmp_path_factory.mktemp(page)
        shutil.copytree(ROOT / "models", folder / "models", ignore=shutil.ignore_patterns("__pycache__"))
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            for arguments in [a for block in BLOCKS if block.page == page and not block.mark for a in block.commands()]:
                result = CliRunner().invoke(main, arguments, prog_name="onnxcomp")
                assert result.exit_code == 0, f"onnxcomp {shlex.join(arguments)}\n{result.output}"
        return folder

    return make


def title(page: str) -> str:
    return PAGES[page].partition("\n")[0].removeprefix("# ").partition(":")[0]


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run(page: str, made: Callable[[str], Path]):
    assert list(made(page).glob("*.onnx"))


@pytest.mark.parametrize("block", SNIPPETS, ids=lambda block: block.page)
def test_the_python_of_a_page_runs_or_where_a_device_is_needed_compiles(
    block: Block, made: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
):
    code = compile(block.text, f"{block.page}.md", "exec")
    if block.mark == "not run":
        pytest.skip(f"compiled only: it needs {block.needs}")
    if block.needs and importlib.util.find_spec(block.needs) is None:
        pytest.skip(f"compiled only: {block.needs} is not installed")
    monkeypatch.chdir(made(block.page))

    names: dict[str, object] = {"__name__": "__main__"}
    exec(code, names)

    assert getattr(names.get("scores"), "shape", (1, 10)) == (1, 10)


def test_every_target_has_one_page_and_every_page_a_target():
    titles = [name for page in PAGES.keys() - set(OTHERS) for name in title(page).split(" and ")]

    assert sorted(titles) == list(targets.names())


def test_a_page_names_the_versions_that_its_target_needs():
    needs = {name: " ".join((*targets.find(name).needs, *targets.find(name).packed_needs)) for name in targets.names()}
    missing = [
        (page, version)
        for page, text in PAGES.items()
        if page not in OTHERS
        for name in title(page).split(" and ")
        for version in VERSION.findall(needs[name])
        if version not in " ".join(text.split())
    ]

    assert missing == []


def test_every_command_and_option_of_a_page_exists():
    unknown = []
    for arguments in [a for block in BLOCKS for a in block.commands()]:
        path, command = find_command(arguments)
        given = {word for word in arguments if word.startswith("-")}
        unknown += [(" ".join(path), option) for option in given - options(command)]

    assert unknown == []


def test_a_page_names_files_and_pages_that_exist():
    linked = {(page, name) for page, text in PAGES.items() for name in re.findall(r"\]\(([\w-]+)\.md\)", text)}

    assert {link for link in linked if link[1] not in PAGES} == set()


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_short(page: str):
    lines = PAGES[page].splitlines()

    assert len(lines) <= LONGEST
    assert max(map(len, lines)) <= 132
