"""torch to ONNX, checked: the only part that imports torch (the extra `torch`), and only when it runs.

A module or a torch.export program becomes one ONNX file at opset 20. Constants are folded and what computes nothing is
dropped; BatchNormalization stays, since preparation folds it where that is safe. Nodes are named by the module they
come from, `/blocks/0/attn/qkv/MatMul`, so that patterns read like the code; no path of the machine gets into the file.
Before it is moved into place, ONNX Runtime runs it against torch on three random draws, with other sizes where axes vary.

    tolerance = 2^12 u max|y|        u: the unit roundoff of the type, 2^-24 for float32

Sums of up to 2^12 terms, added in another order, differ by about 2^6 u of their size, and 2^6 layers add that up. In
half precision sums run in float32, which leaves one rounding per layer: 2^6 u. Integers and truth values must be equal.

Limits: inputs are tensors on the CPU; outputs are tensors in any nesting of tuples, lists and dicts.
"""

from __future__ import annotations

import ast
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxcomp.errors import ModelError, UsageError, VerificationError
from onnxcomp.export.network import Input, Network, draw, leaves, load, read_inputs, sentence
from onnxcomp.graph.files import PendingFile
from onnxcomp.numerics.arrays import describe
from onnxcomp.runtime import Session

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

OPSET = 20


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


def export(
    spec: str | Path | torch.nn.Module,
    inputs: Sequence[str],
    *,
    dynamic: Sequence[str] = (),
    output: str | Path,
    force: bool = False,
    seed: int = 0,
) -> ExportReport:
    """Write `spec` as the ONNX file `output` once it agrees with torch.

    `spec` is a module; a `.pt2` file of torch.export.save; or `package.module:factory`, looked for in the current
    folder too, where the factory takes no arguments and returns a module, or is one. `inputs` read
    `pixel_values=1x3x224x224` or `input_ids=1x16:int64`, in the order of `forward` or by the names of its parameters.
    In `dynamic`, `batch` makes the first axis of every input vary and `input_ids:1=sequence` a certain one. `seed`
    decides the values to check on and a factory's random weights.

    Raises UsageError for a description that cannot be understood, ModelError where torch or ONNX Runtime fails, and
    VerificationError where they disagree; no file is written then.
    """
    try:
        import onnxscript  # noqa: F401
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        raise UsageError(
            f"Exporting needs the package {error.name}, which is not installed. Run: pip install 'onnxcomp[torch]'"
        ) from error
    described = read_inputs(inputs, dynamic)
    rng = np.random.default_rng(seed)
    with ExitStack() as restore:
        _set_up(restore, seed)
        network = load(spec, described)
        if network.source is network.module:
            _set_eval_mode(restore, network.module)
        model = _convert(network, rng)
        with PendingFile(model, output, force=force) as pending:
            session = Session(pending.path)
            error, tolerance = _check(network, session, rng)
            pending.commit()
    opset = next(entry.version for entry in model.opset_import if not entry.domain)
    return ExportReport(Path(output), error, tolerance, opset, _ports(session.inputs), _ports(session.outputs))


def _ports(ports: Sequence[tuple[str, Any]]) -> tuple[str, ...]:
    return tuple(f"{name} {describe(kind.dtype, kind.shape)}" for name, kind in ports)


def _convert(network: Network, rng: np.random.Generator) -> Any:
    """The ModelProto."""
    import torch
    from onnx_ir.passes import common

    inputs = network.inputs
    # torch takes a size of 1 for a fixed one, so an axis that varies is traced with at least 2.
    shapes = [tuple(max(size, 2) if axis in i.axes else size for axis, size in enumerate(i.shape)) for i in inputs]
    feed = draw([replace(i, shape=shape) for i, shape in zip(inputs, shapes, strict=True)], rng)
    outputs = _output_names(network.run(feed))
    positional, keyword = network.arguments(feed)
    positional_axes, keyword_axes = network.arguments({i.name: i.axes for i in inputs})
    try:
        program = torch.onnx.export(
            network.source,
            positional,
            kwargs=keyword,
            input_names=list(feed),
            dynamic_shapes=(keyword_axes or positional_axes) if any(i.axes for i in inputs) else None,
            opset_version=OPSET,
            dynamo=True,
            optimize=False,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ModelError(f"{network.title}: torch cannot export it: {sentence(cause)}") from error
    assert program is not None, "with dynamo, torch returns a program"
    model = program.model
    _tidy(model)
    _name_nodes(model)
    _name_ports(model, list(feed), outputs)
    common.ClearMetadataAndDocStringPass()(model)
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()  # stack traces, which name folders of this machine
    return program.model_proto


def _output_names(returned: Any) -> list[str]:
    """The keys of a dict, else `output`, or `output_0`, `output_1` and so on."""
    count = len(leaves(returned))
    kept = [str(key) for key, part in returned.items() if part is not None] if isinstance(returned, Mapping) else []
    if len(kept) == count:
        return kept
    return ["output"] if count == 1 else [f"output_{index}" for index in range(count)]


def _tidy(model: ir.Model) -> None:
    """Fold constants and drop what computes nothing; unlike in torch's own clean-up, nothing is fused."""
    from onnx_ir.passes import Sequential, common
    from onnxscript import optimizer, rewriter
    from onnxscript.rewriter.rules import common as rules

    simplifying = [
        rules.add_0_rule, rules.sub_0_rule, rules.mul_by_1_rule, rules.div_by_1_rule,
        rules.dropout_inference_rule, rules.dropout_zero_rule,
        rules.no_op_cast_rule, rules.no_op_expand_rule, rules.no_op_transpose_rule,
        rules.collapse_slice_rule, rules.collapse_slice2_rule, rules.materialize_reshape_shape_rule,
        rules.remove_optional_bias_from_conv_rule, rules.remove_optional_bias_from_gemm_rule,
    ]  # fmt: skip
    common.InlinePass()(model)
    for _ in range(2):
        optimizer.fold_constants(model)
        rewriter.rewrite(model, pattern_rewrite_rules=simplifying)
    Sequential(
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.OutputFixPass(),
    )(model)


def _name_nodes(model: ir.Model) -> None:
    """Name every node `/<path of its torch module>/<operator>`, numbered where that repeats."""
    seen: Counter[str] = Counter()
    for node in model.graph.all_nodes():
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        path = next((scope for scope in reversed(scopes[:-1]) if scope and not scope.startswith("_")), "")
        name = "/".join(["", *path.split("."), node.op_type] if path else ["", node.op_type])
        node.name = f"{name}_{seen[name]}" if seen[name] else name
        seen[name] += 1


def _name_ports(model: ir.Model, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Name the inputs as asked, and the outputs so that no other value has their name."""
    produced = (value for node in model.graph.all_nodes() for value in node.outputs)
    taken = {*inputs, *(value.name for value in (*model.graph.initializers.values(), *produced))}
    for value, name in zip(model.graph.outputs, outputs, strict=True):
        while name in taken:
            name = f"{name}_out"
        value.name = name
        taken.add(name)
    for value, name in zip(model.graph.inputs, inputs, strict=True):
        value.name = name


def _check(network: Network, session: Session, rng: np.random.Generator) -> tuple[float, float]:
    """Error and tolerance of the output, of all draws, that comes closest to it. Raises VerificationError beyond it."""
    found = []
    for number in range(3):
        feed = draw(_resize(network.inputs, session, number), rng)
        expected = [leaf.numpy() for leaf in leaves(network.run(feed))]
        values = session.run({name: feed[name].numpy() for name, _ in session.inputs})
        for (name, value), y in zip(values.items(), expected, strict=True):
            error, tolerance = _difference(value, y), _tolerance(network, y)
            if error > tolerance:
                raise VerificationError(
                    f"{network.title}: output '{name}' of the ONNX model differs from torch by {error:.3g}, "
                    f"more than the {tolerance:.3g} that rounding explains. No file was written."
                )
            found.append((error, tolerance))
    return max(found, key=lambda pair: pair[0] / pair[1] if pair[0] else 0.0)


def _resize(inputs: Sequence[Input], session: Session, number: int) -> Sequence[Input]:
    """The inputs of one draw: where the file's axes vary, `number` rows more and, the second time, fewer elsewhere.

    A program may tie axes together, such as `2*s0`: then its inputs stay as they are.
    """
    stored = {name: kind.shape or () for name, kind in session.inputs}
    if not all(isinstance(size, int) or (size or "").isidentifier() for shape in stored.values() for size in shape):
        return inputs
    resized = []
    for described in inputs:
        is_free = [isinstance(size, str) for size in stored.get(described.name, described.shape)]
        shape = [_vary(axis, size, number) if is_free[axis] else size for axis, size in enumerate(described.shape)]
        resized.append(replace(described, shape=tuple(shape)))
    return resized


def _vary(axis: int, size: int, number: int) -> int:
    if axis == 0:
        return size + number
    other = size // 2 if size >= 4 else size + 1
    return other if number == 1 else size


def _difference(value: np.ndarray, expected: np.ndarray) -> float:
    """The largest absolute difference, NaN and infinities being huge numbers; infinite where shapes differ."""
    if value.shape != expected.shape:
        return np.inf
    found, wanted = (np.nan_to_num(x.astype(np.float64), nan=1e300) for x in (value, expected))
    return float(np.abs(found - wanted).max(initial=0.0))


def _tolerance(network: Network, expected: np.ndarray) -> float:
    """The formula above; the roundoff is the coarser of the output's and the weights'."""
    import torch

    if expected.dtype.kind != "f":
        return 0.0
    types = [torch.from_numpy(expected).dtype, *(p.dtype for p in network.module.parameters() if p.is_floating_point())]
    roundoff = max(torch.finfo(kind).eps for kind in types) / 2
    magnitude = float(np.abs(expected[np.isfinite(expected)]).max(initial=0.0))
    return (2.0**12 if roundoff < 2.0**-20 else 2.0**6) * roundoff * magnitude


def _set_up(restore: ExitStack, seed: int) -> None:
    """Seed torch, make the current folder importable, and silence warnings and logs: what matters comes as an error."""
    import torch

    restore.enter_context(torch.random.fork_rng(devices=[]))
    restore.enter_context(torch.no_grad())
    restore.enter_context(warnings.catch_warnings())
    restore.callback(logging.disable, logging.root.manager.disable)
    torch.manual_seed(seed)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    restore.callback(sys.path.remove, folder)


def _set_eval_mode(restore: ExitStack, module: torch.nn.Module) -> None:
    for part in module.modules():
        restore.callback(setattr, part, "training", part.training)
    module.eval()
