"""torch to ONNX, checked: the only part that imports torch (the extra `torch`), and only when it runs.

A module, in eval mode from then on, or a torch.export program becomes one ONNX file at opset 20. Constants are folded;
BatchNormalization stays, since preparation folds it where that is safe. Nodes are named by the module they
come from, `/blocks/0/attn/qkv/MatMul`, so that patterns read like the code; no path of the machine gets into the file.
Before it is moved into place, ONNX Runtime runs it against torch on three random draws; in the second, every axis that
varies is twice as long, which keeps axes that the model ties together in step.

    tolerance = 2^12 u max|y|        u: the unit roundoff of the type, 2^-24 for float32

Sums of up to 2^12 terms, added in another order, differ by about 2^6 u of their size, and 2^6 layers add that up. In
half precision sums run in float32, which leaves one rounding per layer: 2^6 u. Integers and truth values must be equal.

Limits: inputs are tensors on the CPU; outputs are tensors in any nesting of tuples, lists and dicts.
"""

from __future__ import annotations

import ast
import inspect
import logging
import pkgutil
import re
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np

from onnxcomp.errors import ModelError, UsageError, VerificationError
from onnxcomp.graph.files import PendingFile
from onnxcomp.numerics.arrays import describe
from onnxcomp.runtime import Session

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

_TYPES = ("float32", "float64", "float16", "int64", "int32", "int8", "uint8", "bool")
_INPUT = re.compile(rf"(?P<name>[^=:,\s]+)=(?P<shape>[1-9]\d*(x[1-9]\d*)*)(:(?P<dtype>{'|'.join(_TYPES)}))?")
_AXIS = re.compile(r"((?P<input>[^=:,\s]+):(?P<axis>\d+)=)?(?P<name>[^\W\d]\w*)")
_UNFIT = (AssertionError, AttributeError, BadZipFile, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError)
"""What Python and torch raise for a file, a factory or inputs that they cannot use."""


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how well it agrees with torch."""

    path: Path
    max_error: float
    """The largest absolute difference to torch, of the output and draw that came closest to its tolerance."""
    tolerance: float
    """What rounding explains of it."""
    opset: int
    inputs: tuple[str, ...]
    """Name, type and shape of each, as in `x float32[batch, 1, 16, 16]`."""
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Input:
    """One input, its shape an example where axes vary."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    axes: dict[int, str] = field(default_factory=dict)
    """The name of each axis that varies."""


def export(
    spec: str | Path | torch.nn.Module, inputs: Sequence[str], *,
    dynamic: Sequence[str] = (), output: str | Path, force: bool = False, seed: int = 0,
) -> ExportReport:  # fmt: skip
    """Write `spec` as the ONNX file `output` once it agrees with torch.

    `spec` is a module; a `.pt2` file of torch.export.save; or `package.module:factory`, looked for in the current
    folder too, where the factory takes no arguments and returns a module, or is one. `inputs` read
    `pixel_values=1x3x224x224` or `input_ids=1x16:int64`, in the order of `forward` or by the names of its parameters.
    In `dynamic`, `batch` makes the first axis of every input vary and `input_ids:1=sequence` a certain one. `seed`
    decides the values to check on and a factory's random weights.

    Raises UsageError for inputs that cannot be understood, ModelError where loading, torch or ONNX Runtime fails, and
    VerificationError where the two disagree; no file is written then.
    """
    try:
        import onnxscript  # noqa: F401
        import torch
    except ModuleNotFoundError as error:
        raise UsageError(f"Exporting needs the package {error.name}. Run: pip install 'onnxcomp[torch]'") from error
    with torch.random.fork_rng(devices=[]), torch.no_grad(), warnings.catch_warnings(), ExitStack() as restore:
        restore.callback(logging.disable, logging.root.manager.disable)
        restore.callback(sys.path.remove, str(Path.cwd()))
        torch.manual_seed(seed)
        warnings.simplefilter("ignore")  # what matters comes as an error
        logging.disable()
        sys.path.insert(0, str(Path.cwd()))
        network = _Network(spec, read_inputs(inputs, dynamic))
        model = _convert(network)
        with PendingFile(model, output, force=force) as pending:
            session = Session(pending.path)
            error, tolerance = _check(network, session)
            pending.commit()
    opset = next(entry.version for entry in model.opset_import if not entry.domain)
    ports = (tuple(f"{name} {describe(t.dtype, t.shape)}" for name, t in side) for side in (session.inputs, session.outputs))
    return ExportReport(Path(output), error, tolerance, opset, *ports)


def read_inputs(inputs: Sequence[str], dynamic: Sequence[str]) -> list[Input]:
    """The inputs with their varying axes. Raises UsageError for a text that cannot be understood."""
    found: dict[str, Input] = {}
    for text in inputs:
        match = _INPUT.fullmatch(text)
        if match is None or match["name"] in found:
            how = f"Write each NAME once, as NAME=SIZExSIZE or NAME=SIZExSIZE:TYPE, TYPE being {', '.join(_TYPES)}."
            raise UsageError(f"Input '{text}' cannot be understood. {how}")
        found[match["name"]] = Input(match["name"], tuple(map(int, match["shape"].split("x"))), match["dtype"] or "float32")
    for text in dynamic:
        match = _AXIS.fullmatch(text)
        axis = int(match["axis"] or 0) if match else 0
        chosen = [i for i in found.values() if match and match["input"] in (None, i.name) and axis < len(i.shape)]
        if match is None or not chosen:
            how = "Write INPUT:AXIS=NAME, or a name alone, such as batch, for the first axis of every input."
            raise UsageError(f"Dynamic axis '{text}' is none of the inputs {', '.join(inputs)}. {how}")
        for described in chosen:
            described.axes[axis] = match["name"]
    return list(found.values())


class _Network:
    """A module or program, and how it is called: in order, or by name if all inputs bear names of parameters."""

    def __init__(self, spec: str | Path | torch.nn.Module, inputs: Sequence[Input]) -> None:
        import torch

        self.title = type(spec).__name__ if isinstance(spec, torch.nn.Module) else str(spec)
        self.source = source = spec if isinstance(spec, torch.nn.Module) else _load(self.title)
        is_program = isinstance(source, torch.export.ExportedProgram)
        if is_program and any(i.axes for i in inputs):
            raise UsageError(f"{spec} has the axes it was saved with. Set dynamic_shapes in torch.export.export instead.")
        self.module = source.module() if is_program else source.eval()
        parameters = list(inspect.signature(self.module.forward).parameters)
        is_named = all(i.name in parameters for i in inputs)
        self.inputs = sorted(inputs, key=lambda i: parameters.index(i.name)) if is_named else inputs
        saved = list(source.example_inputs[1]) if is_program and source.example_inputs else []
        self._keywords = [i.name for i in self.inputs] if is_named and not is_program else saved

    def arguments(self, values: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """One value per input, as positional and keyword arguments."""
        split = len(values) - len(self._keywords)
        return tuple(values[:split]), dict(zip(self._keywords, values[split:], strict=True))

    def run(self, axes: Mapping[str, Collection[int]], factor: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Random inputs, `factor` times as long along these axes, and what torch returns for them.

        Floats are standard normal; integers and truth values are 0 or 1, which fits ids, types and masks alike. Raises
        ModelError where the module does not take them.
        """
        import torch

        feed = {}
        for i in self.inputs:
            shape = [size * factor if axis in axes[i.name] else size for axis, size in enumerate(i.shape)]
            drawn = torch.randn(shape) if "float" in i.dtype else torch.randint(2, shape)
            feed[i.name] = drawn.to(getattr(torch, i.dtype))
        given = ", ".join(f"{name} {describe(x.numpy().dtype, x.shape)}" for name, x in feed.items())
        with _explained(f"{self.title} does not run in torch on {given}"):
            positional, keyword = self.arguments(list(feed.values()))
            return feed, _name_tensors(self.module(*positional, **keyword), "output")


def _load(spec: str) -> torch.nn.Module | torch.export.ExportedProgram:
    """The program in a `.pt2` file, or the module that `package.module:factory` is or returns."""
    import torch

    with _explained(f"{spec} is no PACKAGE.MODULE:FACTORY or .pt2 file that can be loaded"):
        if spec.endswith(".pt2"):
            return torch.export.load(spec)
        made = pkgutil.resolve_name(spec)
        torch.manual_seed(torch.initial_seed())  # importing the package may have drawn numbers already
        made = made if isinstance(made, torch.nn.Module) else made()
        if not isinstance(made, torch.nn.Module):
            raise TypeError(f"it returned something of type {type(made).__name__}, not a torch.nn.Module")
        return made


def _name_tensors(value: Any, name: str) -> dict[str, torch.Tensor]:
    """What a module returned, by the keys of dicts and the places in tuples: `output_0`, `output_1` and so on."""
    import torch

    if isinstance(value, torch.Tensor):
        return {name: value}
    if not isinstance(value, list | tuple | Mapping):
        raise TypeError(f"it returns something of type {type(value).__name__}, not tensors in tuples, lists or dicts")
    parts = value.items() if isinstance(value, Mapping) else ((f"{name}_{n}", part) for n, part in enumerate(value))
    found = [_name_tensors(part, str(key)) for key, part in parts if part is not None]
    return {key: tensor for named in found for key, tensor in named.items()}


def _convert(network: _Network) -> Any:
    """The ModelProto."""
    import torch

    # torch takes a size of 1 for a fixed one, so what varies is traced twice as long.
    feed, outputs = network.run({i.name: i.axes for i in network.inputs}, 2)
    positional, keyword = network.arguments(list(feed.values()))
    positional_axes, keyword_axes = network.arguments([i.axes for i in network.inputs])
    with _explained(f"{network.title}: torch cannot export it"):
        program: Any = torch.onnx.export(
            network.source, positional, kwargs=keyword, dynamic_shapes=keyword_axes or positional_axes,
            opset_version=20, dynamo=True, optimize=False, verbose=False,
        )  # fmt: skip
    _tidy(program.model, [*feed, *outputs])
    return program.model_proto


def _tidy(model: ir.Model, ports: Sequence[str]) -> None:
    """Fold constants, write known shapes down, name nodes and ports; unlike in torch's own clean-up, nothing is fused."""
    from onnx_ir.passes import common
    from onnxscript import optimizer, rewriter
    from onnxscript.rewriter.rules import common as rules

    simplifying = [rules.collapse_slice_rule, rules.collapse_slice2_rule, rules.materialize_reshape_shape_rule]
    common.InlinePass()(model)
    for _ in range(2):
        optimizer.fold_constants(model)
        rewriter.rewrite(model, pattern_rewrite_rules=simplifying)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.OutputFixPass()(model)
    for node in model.graph.all_nodes():
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        path = next((scope for scope in reversed(scopes[:-1]) if scope and not scope.startswith("_")), "")
        node.name = "/".join(["", *filter(None, path.split(".")), node.op_type])
    values = (*model.graph.inputs, *model.graph.outputs)
    for value, name in zip(values, ports, strict=True):
        value.name = name
    common.NameFixPass()(model)  # numbers what repeats; ports keep their names before anything else
    for part in (*model.graph.all_nodes(), *values, *model.graph.initializers.values()):
        part.metadata_props.clear()  # stack traces, which name folders of this machine


def _check(network: _Network, session: Session) -> tuple[float, float]:
    """Error and tolerance of the output, of all draws, that comes closest to it. Raises VerificationError beyond it."""
    free = {name: [a for a, size in enumerate(kind.shape or ()) if isinstance(size, str)] for name, kind in session.inputs}
    found = []
    for factor in (1, 2, 1):
        feed, expected = network.run(free, factor)
        values = session.run({name: x.numpy() for name, x in feed.items()})
        for (name, value), y in zip(values.items(), expected.values(), strict=True):
            error, tolerance = _compare(value, y, network.module)
            if error > tolerance:
                text = f"{network.title}: output '{name}' of the ONNX model differs from torch by {error:.3g}, more than the"
                raise VerificationError(f"{text} {tolerance:.3g} that rounding explains. No file was written.")
            found.append((error, tolerance))
    return max(found, key=lambda pair: pair[0] / pair[1] if pair[0] else 0.0)


def _compare(value: np.ndarray, expected: torch.Tensor, module: torch.nn.Module) -> tuple[float, float]:
    """The largest absolute difference, NaN and infinities being huge numbers, and the tolerance by the formula above.

    The roundoff is the coarser of the output's and the weights'. The difference is infinite where shapes differ.
    """
    import torch

    y = expected.double().numpy()
    if value.shape != y.shape or not expected.is_floating_point():
        return 0.0 if np.array_equal(value, y) else np.inf, 0.0
    error = float(np.abs(np.nan_to_num(value.astype(np.float64), nan=1e300) - np.nan_to_num(y, nan=1e300)).max(initial=0.0))
    roundoff = max(torch.finfo(x.dtype).eps for x in (expected, *module.parameters()) if x.is_floating_point()) / 2
    magnitude = float(np.abs(y[np.isfinite(y)]).max(initial=0.0))
    return error, (2.0**12 if roundoff < 2.0**-20 else 2.0**6) * roundoff * magnitude


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn what torch raises into a ModelError that says `what` failed, and the first paragraph of the first cause."""
    try:
        yield
    except _UNFIT as error:
        cause = error.__cause__ or error
        paragraph = (str(cause).strip() or type(cause).__name__).split("\n\n")[0]
        raise ModelError(f"{what}: {' '.join(paragraph.split()).rstrip('.')}.") from error
