"""ConvTranspose written as a Conv and moves: the same numbers in every form, and the forms that stay."""

from __future__ import annotations

import numpy as np
import pytest
from equality import parse, run

from onnxcomp.graph.convert import to_graph, to_model
from onnxcomp.graph.transposed import write_convs

LINE, PLANE = "float[N,8,L] x", "float[N,8,H,W] x"


def weights(*kernel: int, channels: int = 16, inputs: int = 8) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    made = {"w": (inputs, channels, *kernel), "b": (channels,)}
    return {key: rng.standard_normal(shape).astype(np.float32) for key, shape in made.items()}


def written(attrs: str, *kernel: int, behind: str = "y = Neg(c)", bias: str = ", b", **made: int) -> list[str]:
    """The operators that stand for the ConvTranspose, once they have been shown to compute the same on lengths 1, 5 and 6."""
    stored = weights(*kernel, **made)
    body = f"[up] c = ConvTranspose{attrs}(x, w{bias}) {behind}"
    model = parse(
        f"g ({PLANE if len(kernel) > 1 else LINE}) => (float y) {{ {body} }}", stored if bias else {"w": stored["w"]}, opset=21
    )
    graph = to_graph(model)

    count = write_convs(graph, {"up"})

    assert count == int(graph.nodes[0].op == "Conv")
    if count:
        graph.cleanup()
        found = to_model(graph, model)
        for length in (1, 5, 6):
            shape = (2, stored["w"].shape[0], *(length + axis for axis in range(len(kernel))))
            x = {"x": np.random.default_rng(1).standard_normal(shape).astype(np.float32)}
            np.testing.assert_allclose(run(found, x)["y"], run(model, x)["y"], rtol=1e-4, atol=1e-4)
        assert graph.nodes[0].name == "up"
    return [node.op for node in graph.nodes]


MOVES = ["Reshape", "Transpose", "Reshape"]


@pytest.mark.parametrize(
    ("attrs", "kernel", "moves"),
    [
        ("<strides = [2]>", (4,), MOVES),
        ("<strides = [2], pads = [1, 1]>", (4,), [*MOVES, "Slice"]),
        ("<strides = [8], pads = [4, 4]>", (16,), [*MOVES, "Slice"]),
        ("<strides = [3], pads = [3, 3]>", (9,), MOVES),
        ("<strides = [2], pads = [0, 3]>", (6,), [*MOVES, "Slice"]),
        ("<strides = [2], pads = [3, 0], output_padding = [1]>", (4,), [*MOVES, "Slice"]),
        ("<strides = [2], pads = [1, 1], output_padding = [1]>", (4,), [*MOVES, "Slice"]),
        ("<strides = [2, 2], pads = [1, 1, 1, 1]>", (4, 4), ["DepthToSpace", "Slice"]),
        ("<strides = [2, 2], pads = [1, 2, 0, 1]>", (4, 6), ["DepthToSpace", "Slice"]),
        ("<strides = [2, 2]>", (4, 4), ["DepthToSpace"]),
        ("", (4, 4), []),
        ("<pads = [1, 1]>", (3,), []),
    ],
)
def test_every_form_computes_the_same(attrs: str, kernel: tuple[int, ...], moves: list[str]):
    assert written(attrs, *kernel) == ["Conv", *moves, "Neg"]


def test_without_a_bias_there_is_none():
    assert written("<strides = [2]>", 4, bias="") == ["Conv", *MOVES, "Neg"]


def test_an_activation_that_alone_reads_it_stands_in_front_of_the_moves():
    assert written("<strides = [2]>", 4, behind="r = LeakyRelu<alpha = 0.1>(c) y = Neg(r)") == [
        "Conv",
        "LeakyRelu",
        *MOVES,
        "Neg",
    ]
    assert written("<strides = [2]>", 4, behind="r = Relu(c) y = Add(r, c)") == ["Conv", *MOVES, "Relu", "Add"]


def test_what_makes_a_result_of_the_model_stays():
    assert written("<strides = [2]>", 4, behind="y = Relu(c)") == ["ConvTranspose", "Relu"]


@pytest.mark.parametrize(
    ("attrs", "kernel", "more"),
    [
        ("<strides = [2]>", (2,), {}),
        ("<strides = [2]>", (5,), {}),
        ("<strides = [2, 1]>", (4, 4), {}),
        ("<strides = [2], dilations = [2]>", (4,), {}),
        ("<strides = [2], group = 2>", (4,), {}),
        ('<strides = [2], auto_pad = "SAME_UPPER">', (4,), {}),
        ("<strides = [2], output_shape = [9]>", (4,), {}),
        ("<strides = [2]>", (4,), {"channels": 15}),
        ("<strides = [2, 2, 2]>", (4, 4, 4), {}),
        ("<strides = [2], pads = [4, 0]>", (4,), {}),
    ],
)
def test_other_forms_stay(attrs: str, kernel: tuple[int, ...], more: dict[str, int]):
    assert written(attrs, *kernel, **more) == ["ConvTranspose", "Neg"]
