"""Reconstruction: the rounding, ranges and biases of a finished stretch refined together, so that it gives what the float
model has there. Optional (`reconstruct = true`), and the only part beside `export` that needs torch.

    min  mean |G(xh) - F(x)|^2 / |F(x)|^2      F(x): the float model's own tensor behind the stretch, G the compressed
                                               stretch, xh: what the compressed model computes in front of it

so a stretch also takes up what those before it have lost. The mean is over tokens, in a CNN over samples: a few huge ones do
not rule. Refined by Adam, with straight-through gradients:

    code    clip(rint(u)), from u = w / scale as near as that is to the code that the closed forms have chosen
    scale   s e^v of a weight's channel or of a static range; zero points stay
    bias    b + mean|b| v, of layers and of what is added to tensors, compensations included

8-bit codes and ranges stay as they are, and stretches that have no others: too little is lost there.

Paper   rounding by the output: AdaRound, arXiv:2004.10568; by blocks: BRECQ, arXiv:2102.05426; with the compressed model's
        input: QDrop, arXiv:2203.05740; ranges by gradients: LSQ, arXiv:1902.08153.
Cost    nothing at run time; `STEPS` passes there and back over `BATCH` samples for each stretch.
Gate    a stretch is kept as it is when, on held-out samples, the output of the float model behind it is the best of `LOOKS`
        looks, in the mean of the samples' SQNR, if that is better than at the start and its own error is less.
Limits  holds input and output of a stretch for up to `MOST` samples in memory. A stretch with an operator that has no
        counterpart here stays as it is, and so do constants that others read too.
"""

from __future__ import annotations

import functools
import importlib.util
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from onnxcomp.errors import UsageError
from onnxcomp.graph.edit import DOMAIN, Graph
from onnxcomp.methods.base import HOLD_OUT, Array, Batch, Outcome, Samples, is_held_out
from onnxcomp.methods.twin import TINY, Twin, operators
from onnxcomp.numerics.arrays import energies, sqnr_db

if TYPE_CHECKING:
    from torch import Tensor

STEPS, LOOKS, MOST = 100, 4, 256
"""Steps; how often held-out samples are looked at; and samples in all, at most."""
BATCH, LARGEST, VALUES = 4, 16, 1 << 18
"""Samples a step; at most, where they give but few values: so many, or a fourth where each has to run alone."""
RATES: Mapping[str, float] = {"code": 0.004, "scale": 0.002, "bias": 0.001}
"""Of Adam, at the start; they fall to zero along a cosine. At twice these, noise undid what later steps had to gain back."""
THREADS = 2
"""Fixed, for the order of sums depends on it."""
SAME_DB = 1.0
"""How far torch may be off in dB of the error that ONNX Runtime has left."""


RESULT = "result/"
"""In front of the name of an output: what the float model has there in the end."""


class Sample(NamedTuple):
    """A sample in front of the stretch: its number, how many travelled with it, and all that is read of it."""

    number: int
    together: int
    live: Mapping[str, Array]


def check(*, with_data: bool) -> None:
    """Raise UsageError where reconstruction cannot work."""
    if not with_data:
        raise UsageError("Reconstruction is fitted to samples. Pass --data, or leave --reconstruct out.")
    if importlib.util.find_spec("torch") is None:
        raise UsageError("Reconstruction needs the package torch. Run: pip install 'onnxcomp[torch]'")


def fit(
    name: str, part: Graph, feeds: Mapping[str, str], samples: Samples, floats: Mapping[str, Array], fixed: Collection[str],
    seed: int, *, tokens: bool = False, y: str = "", tail: Callable[[Mapping[str, Array]], Mapping[str, Array]] | None = None,
    beside: Collection[str] = (),
) -> Outcome:  # fmt: skip
    """New values for constants of `part`, one finished stretch called `name`, by their names.

    feeds   input of the part -> the read that it is fed with; `f_xh` is what the part shall give, `g_xh` what it gives
    floats  dequantized weight -> the float one
    fixed   constants that must stay
    tokens  whether the last axis of what it gives is a token's
    y       what it gives, for the `tail`: the float model behind it, from live tensors to outputs; None where there is none
    beside  what the tail reads, and under `RESULT` and an output's name what the float model has there
    """
    unknown = sorted({n.op for n in part.nodes if n.domain != DOMAIN} - operators().keys())
    quantized = [n for n in part.nodes if n.domain == DOMAIN]
    if unknown:
        return Outcome(None, f"{', '.join(unknown)} cannot be computed by torch here")
    import torch

    with torch.enable_grad(), ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(THREADS)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        twin = Twin(part, floats, fixed)
        if not twin.parameters or (quantized and all(n.attrs["bits"] >= 8 for n in quantized)):
            return Outcome(None, "it has no codes of fewer than 8 bits" if twin.parameters else "nothing in it may change")
        names = (*feeds.values(), *beside, "g_xh", "f_xh")
        seen = samples.reduce(functools.partial(_read, names=names, stride=-(-samples.count // MOST)))
        fitted = [s for s in seen if not is_held_out(s.number)]
        judges = [s for s in seen if is_held_out(s.number)] or fitted
        if not fitted:
            return Outcome(None, "there are too few samples")

        def error(some: Sequence[Sample], *, fine: bool, ends: list[float]) -> Tensor:
            """Of what the stretch gives, in the mean; if `fine`, that of the model's outputs is put to the `ends`."""
            total = torch.zeros(())
            for count, live in _stacked(some):
                g = twin.run({name: live[read] for name, read in feeds.items()}, fine=fine)
                total = total + count / len(some) * _relative(g, torch.tensor(live["f_xh"]), tokens=tokens)
                for output, found in tail({**live, y: g.numpy()}).items() if tail and fine else ():
                    pairs = zip(np.split(live[RESULT + output], count), np.split(found, count), strict=True)
                    ends += [sqnr_db(*energies(wanted, made)) for wanted, made in pairs]
            return total

        def judge() -> tuple[float, float]:
            ends = list[float]()
            with torch.no_grad():
                own = sqnr_db(1.0, float(error(judges, fine=True, ends=ends)))
            return own, float(np.mean(ends)) if tail else own

        known = [float(_relative(*(torch.tensor(s.live[k]) for k in ("g_xh", "f_xh")), tokens=tokens)) for s in judges]
        before = best = np.nan, np.nan
        with suppress(ArithmeticError, LookupError, RuntimeError, TypeError, ValueError):
            before = best = judge()
        if not abs(before[0] - sqnr_db(1.0, sum(known) / len(known))) < SAME_DB:
            return Outcome(None, "torch computes it otherwise than ONNX Runtime")
        found = dict[str, Array]()
        optimizer = torch.optim.Adam([{"params": [p.latent], "lr": RATES[p.kind]} for p in twin.parameters.values()])
        rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.5 + 0.5 * float(np.cos(np.pi * i / STEPS)))
        most = VALUES // (4 if all(s.together == 1 for s in seen) else 1) // seen[0].live["f_xh"].size
        batch = max(BATCH, min(LARGEST, most))
        for step in range(1, STEPS + 1):
            optimizer.zero_grad()
            picked = torch.randperm(len(fitted), generator=generator)[:batch].tolist()
            error([fitted[i] for i in sorted(picked)], fine=False, ends=[]).backward()
            optimizer.step()
            rates.step()
            if step % (STEPS // LOOKS) == 0:
                now = judge()
                if now[0] > before[0] and now[1] > best[1]:
                    best, found = now, {name: p.stored() for name, p in twin.parameters.items()}
        if not found:
            return Outcome(None, "on held-out samples it does not improve, or the model does not", 0.0, before[0], before[0])
        return Outcome(found, f"{len(found)} tensors refined", best[0] - before[0], before[0], best[0])


def _relative(g: Tensor, y: Tensor, *, tokens: bool = False) -> Tensor:
    """The squared error of g over the energy of y, of each of the `tokens` or of each sample; the mean of them."""
    axes = -1 if tokens else tuple(range(1, y.ndim))
    return ((g - y).square().sum(axes) / (y.square().sum(axes) + TINY)).mean()


def _read(batch: Batch, names: Sequence[str], stride: int) -> tuple[Sample, ...]:
    """The samples of a batch, of those in every `stride`th group of `HOLD_OUT`."""
    reads = {name: batch.read(name) for name in names}
    count = len(reads["f_xh"])
    together = count if {len(read) for read in reads.values()} == {count} else 1
    return tuple(
        Sample(number, together, {name: read[min(i, len(read) - 1)] for name, read in reads.items()})
        for i, number in enumerate(batch.indices[:count])
        if number // HOLD_OUT % stride == 0
    )


def _stacked(some: Sequence[Sample]) -> Iterator[tuple[int, dict[str, Array]]]:
    """Up to `LARGEST` samples as one, where they have the same shapes and may be run together; and how many they are."""
    groups: dict[Any, list[Sample]] = {}
    for s in some:
        groups.setdefault((s.together > 1 or s.number, *(a.shape for a in s.live.values())), []).append(s)
    for alike in groups.values():
        for start in range(0, len(alike), LARGEST):
            rows = [s.live for s in alike[start : start + LARGEST]]
            yield len(rows), {k: np.concatenate([r[k] for r in rows]) if len(rows) > 1 else a for k, a in rows[0].items()}
