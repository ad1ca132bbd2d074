"""A stretch of the compressed model as torch computes it, node by node, and what of its constants may be refined.

torch computes what ONNX Runtime does, up to the order of sums; what rounds has the gradient of what does not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxcomp.graph.edit import DOMAIN, Constant, Graph, Node
from onnxcomp.methods.base import Array
from onnxcomp.numerics.affine import SMALLEST_SCALE, Scheme, along

if TYPE_CHECKING:
    from torch import Tensor

TINY = 1e-30


@dataclass(frozen=True, eq=False)
class Parameter:
    """A constant that is refined, as what `latent` makes of its values at the start."""

    kind: str
    latent: Tensor
    start: Tensor
    ends: tuple[float, float] = (0, 0)
    """Of codes the smallest and the largest, of a scale the largest factor's logarithm as the second."""

    def value(self) -> Tensor:
        """What the constant's readers see; codes are rounded where they are read."""
        if self.kind == "code":
            return self.latent
        if self.kind == "scale":
            return self.start * self.latent.clamp(max=self.ends[1]).exp()
        return self.start + self.latent * self.start.abs().mean().clamp(min=1e-3)

    def stored(self) -> Array:
        """What the constant becomes."""
        found = self.value().detach().numpy()
        if self.kind == "code":
            return np.clip(np.rint(found), *self.ends).astype(np.int8)
        return np.asarray(np.maximum(found, np.float32(SMALLEST_SCALE)) if self.kind == "scale" else found)


class Twin:
    """A stretch of the compressed model, as torch computes it."""

    def __init__(self, part: Graph, floats: Mapping[str, Array], fixed: Collection[str]) -> None:
        import torch

        self.part, self.parameters = part, dict[str, Parameter]()
        constants = {t.name: t.values for node in part.nodes for t in node.inputs if isinstance(t, Constant)}
        self.constants = {name: torch.from_numpy(np.array(values)) for name, values in constants.items()}
        for node in part.nodes:
            for tensor, kind, latent, ends in _refined(node, floats):
                if isinstance(tensor, Constant) and tensor.name not in {*fixed, *self.parameters}:
                    zeros = np.zeros(tensor.values.shape) if latent is None else latent
                    own = torch.tensor(zeros, dtype=torch.float32, requires_grad=True)
                    self.parameters[tensor.name] = Parameter(kind, own, self.constants[tensor.name], ends)

    def run(self, feeds: Mapping[str, Array], *, fine: bool = True) -> Tensor:
        """The output for these inputs; not `fine`: as if ranges of 8 bits had no steps, which takes half the time at W4A8."""
        import torch

        live: dict[str, Any] = {name: torch.tensor(x) for name, x in feeds.items()}
        live |= self.constants | {name: p.value() for name, p in self.parameters.items()}
        steps: dict[str, Any] = {}  # of quantized tensors, for those that quantize what is left
        for node in self.part.nodes:
            read: list[Any] = [live[t.name] if t.name else None for t in node.inputs]
            if node.domain != DOMAIN:
                made = operators()[node.op](node.attrs, *read)
            elif not fine and node.attrs["bits"] >= 8 and node.op == "FakeQuantize" and node.attrs["granularity"] == "static":
                made, steps[node.outputs[0].name] = read[:2]
            elif node.op == "Dequantize":
                made = _dequantized(node, *read)
            else:
                before = steps.get(node.inputs[1].name) if len(read) > 1 else None
                made, steps[node.outputs[0].name] = _fake(node, before, *read)
            live |= zip((t.name for t in node.outputs), made if isinstance(made, tuple) else (made,), strict=False)
        return live[self.part.outputs[0].name]


def _refined(node: Node, floats: Mapping[str, Array]) -> Iterator[tuple[Any, str, Array | None, tuple[float, float]]]:
    """What of a node's inputs is refined, and how: its kind, where its latent starts, if not at zero, and its ends."""
    if node.domain == DOMAIN and node.attrs["bits"] < 8:
        if node.op == "Dequantize":
            (codes, scale), scheme = node.inputs[:2], Scheme(node.attrs["bits"], signed=True)
            latent, w = codes.values.astype(np.float32), floats.get(node.outputs[0].name)
            if w is not None and "block" not in node.attrs and w.shape == latent.shape:
                exact = w / along(scale.values, node.attrs["axis"], w.ndim)
                latent = np.clip(exact, latent - 0.49, latent + 0.49)
            yield codes, "code", latent, (scheme.qmin, scheme.qmax)
            yield scale, "scale", None, (0, np.inf)
        elif node.attrs["granularity"] == "static":
            x, scale, zero = node.inputs
            maker = x.inputs[0] if x.inputs else node
            bounds = [t for t in maker.inputs[{"Clip": 2, "Min": 1}.get(maker.op, 9) :] if isinstance(t, Constant)]
            reach = Scheme(node.attrs["bits"], bool(node.attrs["signed"])).qmax - float(zero.values)
            room = min((float(t.values.min()) for t in bounds), default=np.inf) / max(reach * float(scale.values), TINY)
            # A kernel ends at its largest code by itself, while that is within the bounds.
            yield scale, "scale", None, (0, max(np.log(room), 0.0) if room > 1 - 1e-6 else np.inf)
    elif node.op in ("Conv", "Gemm", "Add", "Sum"):
        for tensor in node.inputs[2 if node.op in ("Conv", "Gemm") else 0 :]:
            if isinstance(tensor, Constant) and tensor.dtype == np.float32 and tensor.values.size > 1:
                yield tensor, "bias", None, (0, np.inf)


def _dequantized(node: Node, codes: Tensor, scale: Tensor, *zero: Tensor) -> Tensor:
    scheme, axis, values = Scheme(node.attrs["bits"], signed=True), node.attrs["axis"], codes.float()
    values = (values + (values.round() - values).detach()).clamp(scheme.qmin, scheme.qmax)
    if "block" not in node.attrs:
        return values * scale.reshape([-1 if d == axis % values.ndim else 1 for d in range(values.ndim)])
    size = values.shape[axis]
    step, *zeros = (t.repeat_interleave(node.attrs["block"], axis).narrow(axis, 0, size) for t in (scale, *zero))
    return (values - zeros[0] if zeros else values) * step


def _fake(node: Node, before: Any, x: Tensor, *more: Tensor) -> tuple[Tensor, Tensor]:
    """What an activation quantizer makes of x, and its step; `before`: that of the quantizer whose rest it takes."""
    bits, granularity, ranges = node.attrs["bits"], node.attrs["granularity"], more
    scheme, half = Scheme(bits, signed=bool(node.attrs["signed"])), 2 ** (bits - 1)
    if granularity == "residual":
        x, ranges = x - more[0], more[1:]
    if ranges:
        zero = float(ranges[1])
        return _quantizer().apply(x, ranges[0], scheme.qmin - zero, scheme.qmax - zero), ranges[0]
    if granularity == "residual":
        step = before * node.attrs["finer"]
    else:
        largest = x.detach().abs()
        largest = largest.amax(-1, keepdim=True) if granularity == "token" else largest.amax()
        step = (largest * float(np.float32(node.attrs["ratio"] / (half - 1)))).clamp(min=1e-12)
    return _quantizer().apply(x, step, -half, half - 1), step


@functools.cache
def _quantizer() -> Any:
    """clip(rint(x / s), low, high) s as one function: half the time and memory of its parts."""
    import torch

    class Quantizer(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, scale: Tensor, low: float, high: float) -> Tensor:  # type: ignore[override]
            exact = x / scale
            levels = exact.round().clamp_(low, high)
            ctx.save_for_backward(exact, levels)
            ctx.ends = low - 0.5, high + 0.5
            return levels * scale

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
            exact, levels = ctx.saved_tensors
            inside = torch.where((exact > ctx.ends[0]) & (exact < ctx.ends[1]), g, 0.0)
            return inside, ((g * levels).sum() - (inside * exact).sum()) if ctx.needs_input_grad[1] else None, None, None

    return Quantizer


@functools.cache
def operators() -> Mapping[str, Callable[..., Any]]:
    """ONNX's operators, each a function of the node's attributes and its inputs."""
    import torch
    from torch.nn import functional as f

    def ints(tensor: Tensor) -> list[int]:
        return tensor.reshape(-1).tolist()

    def plain(name: str, a: Any, *xs: Tensor) -> Tensor:
        return getattr(torch, name)(*xs)

    def padded(x: Tensor, pads: Sequence[int], value: float = 0.0) -> Tensor:
        half = len(pads) // 2
        return f.pad(x, [p for d in reversed(range(half)) for p in (pads[d], pads[d + half])], value=value)

    def conv(a: Any, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        rank, pads = w.ndim - 2, list(a.get("pads") or [0] * 2 * (w.ndim - 2))
        if pads[:rank] != pads[rank:]:
            x, pads = padded(x, pads), [0] * 2 * rank
        how = a.get("strides") or 1, pads[:rank], a.get("dilations") or 1, a.get("group", 1)
        return (f.conv1d, f.conv2d, f.conv3d)[rank - 1](x, w, b, *how)

    def gemm(a: Any, x: Tensor, w: Tensor, c: Tensor | None = None) -> Tensor:
        y = a.get("alpha", 1.0) * ((x.T if a.get("transA") else x) @ (w.T if a.get("transB") else w))
        return y if c is None else y + a.get("beta", 1.0) * c

    def pool(a: Any, x: Tensor, how: Callable[..., Tensor], value: float) -> Tensor:
        pads = list(a.get("pads") or [0] * 4)
        return how(padded(x, pads, value) if any(pads) else x, a["kernel_shape"], a.get("strides") or 1)

    def sliced(a: Any, x: Tensor, start: Tensor, end: Tensor, axes: Any = None, steps: Any = None) -> Tensor:
        index, count = [slice(None)] * x.ndim, len(start)
        axes, steps = range(count) if axes is None else ints(axes), [1] * count if steps is None else ints(steps)
        for d, *bounds in zip(axes, ints(start), ints(end), steps, strict=True):
            index[d] = slice(*bounds)
        return x[tuple(index)]

    def gather(a: Any, x: Tensor, index: Tensor) -> Tensor:
        axis = a.get("axis", 0) % x.ndim
        found = x.index_select(axis, (index.reshape(-1) + x.shape[axis]) % x.shape[axis])
        return found.reshape((*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]))

    def reshape(a: Any, x: Tensor, shape: Tensor) -> Tensor:
        return x.reshape([x.shape[i] if d == 0 and not a.get("allowzero") else d for i, d in enumerate(ints(shape))])

    def norm(a: Any, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return f.layer_norm(x, x.shape[a.get("axis", -1) :], w, b, a.get("epsilon", 1e-5))

    alike = ("Abs", "Add", "Erf", "Exp", "Log", "MatMul", "Mul", "Neg", "Pow", "Relu", "Sigmoid", "Sqrt", "Sub", "Tanh")
    named = {name: functools.partial(plain, name.lower()) for name in alike}
    types = {1: torch.float32, 6: torch.int32, 7: torch.int64, 9: torch.bool}
    return named | {
        "Cast": lambda a, x: x.to(types[int(a["to"])]),
        "Clip": lambda a, x, low=None, high=None: x if low is None is high else x.clamp(low, high),
        "Concat": lambda a, *xs: torch.cat(xs, a["axis"]),
        "Conv": conv,
        "Div": lambda a, x, y: x / y if x.is_floating_point() else x.div(y, rounding_mode="trunc"),
        "Expand": lambda a, x, shape: x.expand(torch.broadcast_shapes(x.shape, tuple(ints(shape)))),
        "Flatten": lambda a, x: x.flatten(a.get("axis", 1)),
        "Gather": gather,
        "Gelu": lambda a, x: f.gelu(x, approximate=a.get("approximate", "none")),
        "Gemm": gemm,
        "GlobalAveragePool": lambda a, x: x.mean(list(range(2, x.ndim)), keepdim=True),
        "HardSigmoid": lambda a, x: (x * a.get("alpha", 0.2) + a.get("beta", 0.5)).clamp(0, 1),
        "HardSwish": lambda a, x: f.hardswish(x),
        "LayerNormalization": norm,
        "Max": lambda a, *xs: functools.reduce(torch.maximum, xs),
        "Min": lambda a, *xs: functools.reduce(torch.minimum, xs),
        "MaxPool": lambda a, x: pool(a, x, f.max_pool2d, -np.inf),
        "Pad": lambda a, x, pads, value=None: padded(x, ints(pads), 0.0 if value is None else float(value)),
        "ReduceMean": lambda a, x, axes: x.mean(ints(axes), keepdim=bool(a.get("keepdims", 1))),
        "Reshape": reshape,
        "RMSNormalization": lambda a, x, w: f.rms_norm(x, x.shape[a.get("axis", -1) :], w, a.get("epsilon", 1e-5)),
        "Shape": lambda a, x: torch.tensor(x.shape[a.get("start", 0) : a.get("end")]),
        "Slice": sliced,
        "Softmax": lambda a, x: x.softmax(a.get("axis", -1)),
        "Split": lambda a, x, n=None: x.split(ints(n) if n is not None else x.shape[a["axis"]] // a["num_outputs"], a["axis"]),
        "Squeeze": lambda a, x, axes: x.squeeze(tuple(ints(axes))),
        "Sum": lambda a, *xs: sum(xs),
        "Tile": lambda a, x, repeats: x.tile(tuple(ints(repeats))),
        "Transpose": lambda a, x: x.permute(a["perm"]),
        "Unsqueeze": lambda a, x, axes: functools.reduce(lambda y, d: y.unsqueeze(d), sorted(ints(axes)), x),
    }
