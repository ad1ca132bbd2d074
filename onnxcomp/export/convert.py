"""From torch to the file: torch's exporter, tidied, checked, moved into place."""

from __future__ import annotations

import ast
import contextlib
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxcomp.errors import ModelError, UsageError
from onnxcomp.export.check import check
from onnxcomp.export.inputs import Input, draw, read_inputs
from onnxcomp.export.network import Network, leaves, load, sentence
from onnxcomp.graph.files import PendingFile
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
    torch = _import_torch()
    described = read_inputs(inputs, dynamic)
    rng = np.random.default_rng(seed)
    with _current_folder_importable(), _quiet(), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        network = load(spec, tuple(i.name for i in described))
        if network.source is not network.module and any(i.axes for i in described):
            raise UsageError(
                f"{network.title}: the dynamic axes of a .pt2 file are those it was saved with. Set dynamic_shapes in "
                "torch.export.export instead."
            )
        with _in_eval_mode(network):
            model = _convert(network, described, rng)
            with PendingFile(model, output, force=force) as pending:
                session = Session(pending.path)
                agreement = check(network, session, described, rng)
                pending.commit()
    return ExportReport(
        path=Path(output),
        max_error=agreement.error,
        tolerance=agreement.tolerance,
        opset=next(entry.version for entry in model.opset_import if not entry.domain),
        inputs=tuple(_describe(name, kind.dtype, kind.shape) for name, kind in session.inputs),
        outputs=tuple(_describe(name, kind.dtype, kind.shape) for name, kind in session.outputs),
    )


def _import_torch() -> Any:
    try:
        import onnxscript  # noqa: F401
        import torch
    except ModuleNotFoundError as error:
        raise UsageError(
            f"Exporting needs the package {error.name}, which is not installed. Run: pip install 'onnxcomp[torch]'"
        ) from error
    return torch


def _convert(network: Network, inputs: Sequence[Input], rng: np.random.Generator) -> Any:
    """The ModelProto."""
    import torch

    feed = draw([i.traced() for i in inputs], rng)
    outputs = _output_names(network.run(feed))
    positional, keyword = network.arguments({name: torch.from_numpy(value) for name, value in feed.items()})
    positional_axes, keyword_axes = network.arguments({i.name: dict(i.axes) for i in inputs})
    try:
        program = torch.onnx.export(
            network.source,
            positional,
            kwargs=keyword,
            input_names=network.names,
            dynamic_shapes=(keyword_axes or positional_axes) if any(i.axes for i in inputs) else None,
            opset_version=OPSET,
            dynamo=True,
            optimize=False,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        raise ModelError(f"{network.title}: torch cannot export it: {sentence(_root(error))}") from error
    assert program is not None, "with dynamo, torch returns a program"
    _tidy(program.model)
    _name_nodes(program.model)
    _name_ports(program.model, network.names, outputs)
    _drop_origins(program.model)
    return program.model_proto


def _tidy(model: ir.Model) -> None:
    """Fold constants and drop what computes nothing; unlike in torch's own clean-up, nothing is fused."""
    from onnx_ir.passes import Sequential, common
    from onnxscript import optimizer, rewriter
    from onnxscript.rewriter.rules import common as rules

    simplifying = [
        rules.add_0_rule,
        rules.sub_0_rule,
        rules.mul_by_1_rule,
        rules.div_by_1_rule,
        rules.dropout_inference_rule,
        rules.dropout_zero_rule,
        rules.no_op_cast_rule,
        rules.no_op_expand_rule,
        rules.no_op_transpose_rule,
        rules.collapse_slice_rule,
        rules.collapse_slice2_rule,
        rules.materialize_reshape_shape_rule,
        rules.remove_optional_bias_from_conv_rule,
        rules.remove_optional_bias_from_gemm_rule,
    ]
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


def _drop_origins(model: ir.Model) -> None:
    """Forget the stack traces that torch attaches: they name folders of this machine."""
    from onnx_ir.passes import common

    common.ClearMetadataAndDocStringPass()(model)
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def _output_names(returned: Any) -> list[str]:
    """The keys of a dict, else `output`, or `output_0`, `output_1` and so on."""
    count = len(leaves(returned))
    kept = [str(key) for key, part in returned.items() if part is not None] if isinstance(returned, Mapping) else []
    if len(kept) == count:
        return kept
    return ["output"] if count == 1 else [f"output_{index}" for index in range(count)]


def _describe(name: str, dtype: np.dtype | None, shape: tuple[int | str | None, ...] | None) -> str:
    sizes = "..." if shape is None else ", ".join("?" if size is None else str(size) for size in shape)
    return f"{name} {dtype}[{sizes}]"


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@contextlib.contextmanager
def _current_folder_importable() -> Iterator[None]:
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


@contextlib.contextmanager
def _in_eval_mode(network: Network) -> Iterator[None]:
    """Every part of the module in eval mode, and back in its own afterwards. A program has no modes."""
    modes = [(part, part.training) for part in network.module.modules()]
    if network.source is network.module:
        network.module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warnings and log lines: what matters of them comes as an error."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
