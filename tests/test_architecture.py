"""The architecture, held by reading the sources: who may import whom, how long a file may be, what loads when."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "onnxcomp"

LAYERS = (
    ("errors", "scratch", "toml"),
    ("numerics", "preprocess"),
    ("data", "graph"),
    ("runtime",),
    ("methods",),
    ("calibrate", "targets"),
    ("recipe", "report"),
    ("choose", "compress", "verify", "lint"),
    ("finish",),
    ("account",),
    ("transform",),
    ("pipeline", "comparison", "inspect", "bench", "manual", "strip", "export"),
    ("analysis", "worth"),
    ("automatic",),
    ("cli",),
)
"""From the ground up. Imports reach into the layers below and into one's own package, never sideways or up."""

ONLY = {"export": {"errors", "numerics", "graph.files", "runtime"}}
"""Modules that may use less than their layer would allow."""

THIRD_PARTY = {
    "PIL": {"data", "preprocess"},
    "click": {"cli"},
    "cloudpickle": {"calibrate.cluster"},
    "dask": {"calibrate.cluster"},
    "distributed": {"calibrate.cluster"},
    "google.protobuf": {"graph"},
    "ml_dtypes": {"graph", "numerics"},
    "numpy": {name for layer in LAYERS for name in layer},
    "onnx": {"graph"},
    "onnx_ir": {"export"},
    "onnx_graphsurgeon": {"graph"},
    "onnxruntime": {"runtime"},
    "openvino": {"targets"},
    "onnxruntime.transformers": {"graph"},
    "onnxscript": {"export"},
    "pydantic": {"errors", "methods", "preprocess", "recipe", "report"},
    "pydantic_core": {"report"},
    "rich": {"cli"},
    "threadpoolctl": {"runtime"},
    "tomli": {"toml"},
    "torch": {"export", "methods.reconstruction", "methods.twin"},  # gradients are what the latter two are about
}
"""Packages and the parts of the library that may import them."""

FILE_LINES = 400
LIBRARY_LINES = 10_620


@dataclass(frozen=True)
class Import:
    """One import statement of the library. `target` is the module or, in `from a import b`, `a.b`."""

    module: str
    target: str
    line: int
    is_lazy: bool
    """It stands inside a function."""
    is_typing: bool
    """It stands under `if TYPE_CHECKING:`."""

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.target}"


def modules() -> dict[str, Path]:
    """Every module of the library below `onnxcomp.`, the package itself as the empty name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(path: Path) -> ast.Module:
    """The parsed file."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports() -> Iterator[Import]:
    """Every import of the library, wherever it stands."""
    for module, path in modules().items():
        yield from _imports(module, tree(path), is_lazy=False, is_typing=False)


def _imports(module: str, node: ast.AST, *, is_lazy: bool, is_typing: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        yield from (Import(module, alias.name, node.lineno, is_lazy, is_typing) for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        yield from (Import(module, f"{base}.{alias.name}", node.lineno, is_lazy, is_typing) for alias in node.names)
    inner_lazy = is_lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
    for child in ast.iter_child_nodes(node):
        typing = is_typing or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and child in node.body)
        yield from _imports(module, child, is_lazy=inner_lazy, is_typing=typing)


def part(module: str) -> str:
    """The top-level module or package that a module of the library belongs to."""
    return module.partition(".")[0]


def rank(name: str) -> int:
    """The height of a part's layer."""
    return next(height for height, layer in enumerate(LAYERS) if name in layer)


def own(target: str) -> str | None:
    """The module below `onnxcomp.` that an import names, None for one of another package."""
    if target.partition(".")[0] != "onnxcomp":
        return None
    inner = target.removeprefix("onnxcomp").removeprefix(".")
    while inner and inner not in modules():
        inner = inner.rpartition(".")[0]
    return inner


def test_every_part_of_the_library_has_a_place_in_the_picture():
    known = {name for layer in LAYERS for name in layer} | {""}

    assert {part(module) for module in modules()} <= known


def test_imports_are_absolute():
    relative = [
        f"{module}:{node.lineno}"
        for module, path in modules().items()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ImportFrom) and node.level
    ]

    assert not relative


def test_imports_point_down():
    wrong = []
    for found in imports():
        target = own(found.target)
        if target is None or found.module == "":
            continue
        if target == "":
            if found.target != "onnxcomp.__version__":
                wrong.append(str(found))
        elif part(target) != part(found.module) and rank(part(target)) >= rank(part(found.module)):
            wrong.append(str(found))

    assert not wrong


def test_the_package_itself_imports_its_modules_only_for_the_type_checker():
    eager = [str(found) for found in imports() if found.module == "" and own(found.target) is not None and not found.is_typing]

    assert not eager


def test_a_restricted_part_uses_only_what_it_may():
    wrong = []
    for found in imports():
        target = own(found.target)
        allowed = ONLY.get(part(found.module))
        if allowed is None or not target or part(target) == part(found.module):
            continue
        if not any(target == name or target.startswith(f"{name}.") for name in allowed):
            wrong.append(str(found))

    assert not wrong


def test_third_party_packages_are_imported_only_where_their_layer_says():
    wrong = []
    for found in imports():
        top = found.target.partition(".")[0]
        if top == "onnxcomp" or top in sys.stdlib_module_names:
            continue
        names = [name for name in THIRD_PARTY if found.target == name or found.target.startswith(f"{name}.")]
        allowed = THIRD_PARTY[max(names, key=len)] if names else set()
        if not {part(found.module), found.module} & allowed:
            wrong.append(str(found))

    assert not wrong


@pytest.mark.parametrize("package", ["torch", "distributed", "onnx_ir", "onnxscript", "onnxruntime.transformers"])
def test_slow_packages_are_imported_inside_functions(package: str):
    eager = [
        str(found)
        for found in imports()
        if f"{found.target}.".startswith(f"{package}.") and not found.is_lazy and not found.is_typing
    ]

    assert not eager


def test_no_file_is_longer_than_it_may_be():
    folders = [folder for folder in ("onnxcomp", "tests", "tools", "models") if (ROOT / folder).is_dir()]
    sizes = {str(path.relative_to(ROOT)): _lines(path) for folder in folders for path in (ROOT / folder).rglob("*.py")}

    assert {name: lines for name, lines in sizes.items() if lines > FILE_LINES} == {}


def test_the_library_stays_within_its_budget_of_lines():
    """Lines of code: blank lines, comments and docstrings are free, or they would be saved on first."""
    assert sum(_code_lines(path) for path in modules().values()) < LIBRARY_LINES


def _code_lines(path: Path) -> int:
    layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    with path.open("rb") as file:
        tokens = [token for token in tokenize.tokenize(file.readline) if token.type not in (*layout, tokenize.ENCODING)]
    lines = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def _lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_every_module_has_a_docstring():
    """A package's empty `__init__.py` needs none."""
    bare = [name for name, path in modules().items() if tree(path).body and not ast.get_docstring(tree(path))]

    assert not bare


def test_nothing_swallows_every_exception():
    """Cleaning up and raising on is no swallowing."""
    wrong = []
    for module, path in modules().items():
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.ExceptHandler) or ast.unparse(node.body[-1]) == "raise":
                continue
            caught = [] if node.type is None else ast.unparse(node.type).strip("()").split(", ")
            if not caught or {"Exception", "BaseException"} & set(caught):
                wrong.append(f"{module}:{node.lineno}")

    assert not wrong


def test_only_the_command_line_prints_or_exits():
    wrong = [
        f"{module}:{node.lineno}"
        for module, path in modules().items()
        for node in ast.walk(tree(path))
        if part(module) != "cli"
        and isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("print", "exit", "sys.exit", "quit")
    ]

    assert not wrong


def test_modules_call_nothing_for_its_effect_when_they_are_imported():
    wrong = [
        f"{module}:{node.lineno}"
        for module, path in modules().items()
        for node in tree(path).body
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    ]

    assert not wrong


_SIDE_EFFECTS = """
import importlib, logging, os, random, sys, warnings
import click, google.protobuf, ml_dtypes, numpy, onnx, onnx_graphsurgeon, onnxruntime, PIL.Image, rich.console

def state():
    root = logging.getLogger()
    return (
        root.level, list(root.handlers), root.manager.disable, list(warnings.filters), dict(os.environ), os.getcwd(),
        sys.getrecursionlimit(), list(sys.path), sys.excepthook, sys.stdout, sys.stderr,
        numpy.geterr(), numpy.get_printoptions(), random.getstate(), str(numpy.random.get_state()),
    )

for name in sys.argv[1:]:
    before = state()
    importlib.import_module(name)
    assert state() == before, f"importing {name} changes the process"
assert "torch" not in sys.modules
"""


def test_importing_any_module_changes_nothing_in_the_process():
    names = [f"onnxcomp.{name}" if name else "onnxcomp" for name in modules() if not name.endswith("__main__")]

    assert _python(_SIDE_EFFECTS, *names) == ""


_HEAVY = "heavy = ' '.join(sorted({'onnx', 'onnx_graphsurgeon', 'onnxruntime', 'torch'} & set(sys.modules)))"


def test_importing_the_package_loads_no_heavy_library():
    assert _python(f"import onnxcomp, sys; {_HEAVY}; print(heavy)") == "\n"


def test_the_help_of_the_command_line_loads_no_heavy_library():
    code = f"""
import sys
sys.argv = ["onnxcomp", "--help"]
from onnxcomp.cli import main
try:
    main()
except SystemExit as end:
    assert end.code == 0
{_HEAVY}
assert not heavy, heavy
"""

    assert "Usage:" in _python(code)


def _python(code: str, *arguments: str) -> str:
    """What a fresh interpreter prints."""
    command = [sys.executable, "-W", "error", "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_tracked_file_names_a_folder_of_a_developers_machine():
    """Also inside ONNX files, where exporters leave stack traces."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout, so no file is tracked")
    command = [git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    files = [ROOT / name.decode() for name in listed if name and (ROOT / name.decode()).is_file()]
    machine = re.compile(rb"/(work|farm|root|home|Users)/")

    assert [str(path.relative_to(ROOT)) for path in files if machine.search(path.read_bytes())] == []


def test_every_public_name_resolves_and_explains_itself():
    import onnxcomp

    unexplained = [name for name in onnxcomp.__all__ if name != "__version__" and not getattr(onnxcomp, name).__doc__]

    assert unexplained == []
    assert re.match(r"\d", onnxcomp.__version__)
    assert set(onnxcomp.__all__) <= set(dir(onnxcomp))


def test_importing_the_modules_hides_no_public_name():
    """`onnxcomp.compare` is the function, whether or not the module of that name has been imported."""
    names = [f"onnxcomp.{name}" for name in modules() if name == part(name) != ""]
    code = """
import importlib, sys, types
import onnxcomp
for name in sys.argv[1:]:
    importlib.import_module(name)
print([name for name in onnxcomp.__all__ if isinstance(getattr(onnxcomp, name), types.ModuleType)])
"""

    assert _python(code, *names) == "[]\n"


def test_the_type_checker_and_the_lazy_loader_see_the_same_public_names():
    import onnxcomp

    typed = {found.target for found in imports() if found.module == "" and found.is_typing}

    assert typed == {f"{home}.{name}" for name, home in onnxcomp._HOME.items()}
    assert {*onnxcomp._HOME, "__version__"} == set(onnxcomp.__all__)


def test_an_unknown_public_name_is_an_attribute_error():
    import onnxcomp

    with pytest.raises(AttributeError, match=r"^module 'onnxcomp' has no attribute 'quantise'$"):
        _ = onnxcomp.quantise
