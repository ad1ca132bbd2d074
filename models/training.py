"""What the training scripts share: one deterministic loop, and the writing of the ONNX file and its card.

Everything runs on one CPU thread from fixed seeds: the same machine with the same torch gives the same file. Another
processor may round differently and end at slightly different weights, so the card is rewritten together with the model.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from models import data
from onnxcomp.export import export
from onnxcomp.runtime import Session


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train: AdamW, linear warm-up over the first tenth, then a cosine down to zero."""

    epochs: int
    peak_rate: float
    batch: int
    rounds: int = 4
    """Fresh pictures of every source digit in one epoch."""
    weight_decay: float = 0.05
    gain_spread: float = 0.8
    """The gains of normalizations start at exp(spread * normal) instead of 1, so that a few channels are far louder
    than the rest. Large networks grow such outliers in training, and they are what makes 4 bits hard."""
    seed: int = 7


def prepare_torch(plan: Plan) -> None:
    """One thread, deterministic kernels, seeded weights."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(plan.seed)


def spread_gains(network: nn.Module, plan: Plan) -> None:
    """Draw the gains of every normalization anew."""
    for module in network.modules():
        if isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
            nn.init.normal_(module.weight, std=plan.gain_spread)
            module.weight.data.exp_()


def train(network: nn.Module, plan: Plan) -> nn.Module:
    """The network trained on freshly drawn pictures, in eval mode."""
    spread_gains(network, plan)
    digits, _, _ = data.split()
    rng = np.random.default_rng(plan.seed)
    steps = plan.epochs * math.ceil(plan.rounds * len(digits.labels) / plan.batch)
    optimizer = torch.optim.AdamW(network.parameters(), lr=plan.peak_rate, weight_decay=plan.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step / steps))
    network.train()
    for _ in range(plan.epochs):
        x, y = (torch.from_numpy(array) for array in data.draw(digits, plan.rounds, rng))
        for part_x, part_y in zip(x.split(plan.batch), y.split(plan.batch), strict=True):
            loss = functional.cross_entropy(network(part_x), part_y)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return network.eval()


def _rate(progress: float) -> float:
    return progress / 0.1 if progress < 0.1 else 0.5 * (1 + math.cos(math.pi * (progress - 0.1) / 0.9))


def publish(network: nn.Module, plan: Plan, *, name: str, text: str | None) -> None:
    """Write `name`.onnx and its card: `text`, which is the script's docstring, and the figures of the file."""
    path = data.FOLDER / f"{name}.onnx"
    report = export(network, ["x=1x1x16x16"], dynamic=["batch"], output=path, force=True)
    test = np.load(data.TEST_FILE)
    answers = Session(path, threads=1).run({"x": test["x"].astype(np.float32)})["output"].argmax(axis=1)
    right = int((answers == test["y"]).sum())
    rows = [
        ("fp32 accuracy on digits_test.npz", f"{right / len(answers):.1%} ({right} of {len(answers)})"),
        ("parameters", f"{sum(p.numel() for p in network.parameters()):,}"),
        ("file", f"{path.stat().st_size:,} bytes, opset {report.opset}"),
        ("input", f"`{report.inputs[0]}`"),
        ("output", f"`{report.outputs[0]}`, logits"),
        (
            "training",
            f"{plan.epochs * plan.rounds} drawings of each of 1169 digits, batch {plan.batch}, seed {plan.seed}",
        ),
        ("made with", f"torch {torch.__version__}"),
    ]
    table = "\n".join(f"| {what} | {value} |" for what, value in rows)
    card = f"# {name}\n\n{inspect.cleandoc(text or '')}\n\n| | |\n|---|---|\n{table}\n"
    path.with_suffix(".md").write_text(card, encoding="utf-8")
