"""What tiny models are made with: ONNX text, weights from a seeded generator, and samples to feed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx.parser
from onnx import ModelProto, numpy_helper

Array = np.ndarray
Feed = dict[str, Array]
Weights = dict[str, Array]

SAMPLES = 12


@dataclass(frozen=True)
class Tiny:
    """One model and its samples."""

    name: str
    model: ModelProto
    samples: list[Feed]

    @property
    def stacks(self) -> bool:
        """Whether samples may be fed together: the model's batch size varies."""
        return not self.model.graph.input[0].type.tensor_type.shape.dim[0].HasField("dim_value")

    def stacked(self, size: int) -> list[Feed]:
        """The samples in order, in batches of at most `size` neighbours of one shape."""
        groups: list[list[Feed]] = []
        for feed in self.samples:
            if groups and len(groups[-1]) < size and _shapes(groups[-1][0]) == _shapes(feed):
                groups[-1].append(feed)
            else:
                groups.append([feed])
        return [{key: np.concatenate([feed[key] for feed in group]) for key in group[0]} for group in groups]


def build(name: str, text: str, weights: Weights, samples: list[Feed]) -> Tiny:
    """A Tiny from ONNX text whose undefined names are the `weights`."""
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(numpy_helper.from_array(value, key) for key, value in weights.items())
    return Tiny(name, model, samples)


def feeds(rng: np.random.Generator, *shape: int, name: str = "x") -> list[Feed]:
    """Samples of normal numbers, each [1, *shape]."""
    return [{name: rng.normal(size=(1, *shape)).astype(np.float32)} for _ in range(SAMPLES)]


def weight(rng: np.random.Generator, *shape: int, fan_in: int) -> Array:
    """Normal numbers of variance 1/fan_in."""
    return (rng.normal(size=shape) / np.sqrt(fan_in)).astype(np.float32)


def bias(rng: np.random.Generator, *shape: int) -> Array:
    """Small normal numbers."""
    return (0.2 * rng.normal(size=shape)).astype(np.float32)


def dense(rng: np.random.Generator, key: str, inputs: int, outputs: int) -> Weights:
    """Weight `w{key}` [inputs, outputs] and bias `b{key}` of a linear layer."""
    return {f"w{key}": weight(rng, inputs, outputs, fan_in=inputs), f"b{key}": bias(rng, outputs)}


def conv(rng: np.random.Generator, key: str, *shape: int) -> Weights:
    """Weight `w{key}` of `shape` and bias `b{key}` of a Conv."""
    return {f"w{key}": weight(rng, *shape, fan_in=int(np.prod(shape[1:]))), f"b{key}": bias(rng, shape[0])}


def _shapes(feed: Feed) -> list[tuple[int, ...]]:
    return [array.shape for array in feed.values()]


def header(opset: int) -> str:
    return f'<ir_version: {8 if opset < 19 else 10}, opset_import: ["" : {opset}]>'


def arrays(scalars: Mapping[str, np.generic]) -> Weights:
    return {key: np.asarray(value) for key, value in scalars.items()}
