"""From torch to ONNX: what the file holds, how it is checked, and every sentence a user may get instead of one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxcomp.errors import ModelError, UsageError, VerificationError
from onnxcomp.export import export, read_inputs
from onnxcomp.runtime import Session

needs_torch = pytest.mark.skipif(
    find_spec("torch") is None or find_spec("onnxscript") is None,
    reason="needs torch and onnxscript: pip install 'onnxcomp[torch]'",
)

NETS = """
import torch
from torch import nn


def convolution():
    return nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU6(), nn.Flatten(), nn.Linear(16, 3))


class Ids(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(2, 8)
        self.positions = nn.Parameter(torch.randn(1, 16, 8))
        self.head = nn.Linear(8, 5)

    def forward(self, input_ids, token_type_ids=None, attention_mask=None):
        hidden = self.embed(input_ids) + self.positions[:, : input_ids.shape[1]]
        if attention_mask is not None:
            hidden = hidden * attention_mask[..., None]
        return {"logits": self.head(hidden), "token_type_ids": token_type_ids, "input_ids": input_ids}


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)


class Branch(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Fixed(nn.Module):
    def forward(self, x):
        return x + torch.ones(x.shape[0] if x.shape[0] == 2 else 4, 3)


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.rows = nn.Parameter(torch.randn(3, 3))

    def forward(self, x):
        return x + self.rows[: x.shape[0]]


class Trees(nn.Module):
    def forward(self, x):
        return x, {"last": -x, "pair": (x + 1, None, x + 2)}


class Keyword(nn.Module):
    def forward(self, a, *, b):
        return a - 2 * b


class Pair(nn.Module):
    def forward(self, a, b):
        return a @ b


class Text(nn.Module):
    def forward(self, x):
        return "text"


def with_argument(width):
    return nn.Linear(width, 1)


def dictionary():
    return {}


width = 3
module = nn.Linear(3, 2)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with a module `nets` in it."""
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "needy.py").write_text("import a_package_nobody_has\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("nets", None)


@needs_torch
def test_a_factory_becomes_one_checked_file_that_takes_any_batch(folder: Path):
    report = export("nets:convolution", ["x=1x2x4x4"], dynamic=["batch"], output=folder / "m.onnx")

    assert report.path == folder / "m.onnx"
    assert report.max_error <= report.tolerance
    assert (report.opset, report.inputs) == (20, ("x float32[batch, 2, 4, 4]",))
    assert report.outputs == ("output float32[batch, 3]",)
    assert sorted(path.name for path in folder.glob("m*")) == ["m.onnx"]
    for batch in (1, 5):
        assert Session(report.path).run({"x": np.ones((batch, 2, 4, 4), np.float32)})["output"].shape == (batch, 3)


@needs_torch
def test_the_graph_is_plain_and_speaks_of_the_modules_but_not_of_the_machine(folder: Path):
    export("nets:convolution", ["x=1x2x4x4"], dynamic=["batch"], output="m.onnx")
    model = onnx.load("m.onnx")

    onnx.checker.check_model(model, full_check=True)
    assert [(node.name, node.op_type) for node in model.graph.node] == [
        ("/0/Conv", "Conv"),
        ("/1/BatchNormalization", "BatchNormalization"),
        ("/2/Clip", "Clip"),
        ("/3/Reshape", "Reshape"),
        ("/4/Gemm", "Gemm"),
    ]
    assert {"0.weight", "1.running_mean", "4.bias"} <= {tensor.name for tensor in model.graph.initializer}
    assert all(not node.metadata_props and not node.doc_string for node in model.graph.node)
    assert str(folder).encode() not in Path("m.onnx").read_bytes()


@needs_torch
def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_weights():
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        export("nets:convolution", ["x=1x2x4x4"], output=f"{name}.onnx", seed=seed)
    a, b, c = (Path(f"{name}.onnx").read_bytes() for name in "abc")

    assert a == b
    assert a != c


@needs_torch
def test_inputs_with_the_names_of_parameters_are_passed_by_name_and_each_axis_varies():
    report = export(
        "nets:Ids",
        ["attention_mask=1x8:int64", "input_ids=1x8:int64"],
        dynamic=["batch", "input_ids:1=sequence", "attention_mask:1=sequence"],
        output="ids.onnx",
    )

    assert report.inputs == ("input_ids int64[batch, sequence]", "attention_mask int64[batch, sequence]")
    # An output cannot share the name of an input, and one that torch leaves out (None) is none.
    assert [text.split()[0] for text in report.outputs] == ["logits", "input_ids_1"]
    feed = {"input_ids": np.ones((3, 5), np.int64), "attention_mask": np.zeros((3, 5), np.int64)}
    bias = next(t for t in onnx.load("ids.onnx").graph.initializer if t.name == "head.bias")
    # A mask of zeros leaves the head's bias alone.
    assert np.array_equal(Session(report.path).run(feed)["logits"], np.broadcast_to(numpy_helper.to_array(bias), (3, 5, 5)))


@needs_torch
@pytest.mark.parametrize(("name", "output"), [("x", "output"), ("output", "output_1")])
def test_a_module_that_returns_its_input_has_two_names_for_it(name: str, output: str):
    import torch

    report = export(torch.nn.Identity(), [f"{name}=1x3"], dynamic=["batch"], output="m.onnx")
    x = np.arange(6, dtype=np.float32).reshape(2, 3)

    assert report.outputs == (f"{output} float32[batch, 3]",)
    np.testing.assert_array_equal(Session(report.path).run({name: x})[output], x)


@needs_torch
def test_a_saved_program_keeps_its_own_dynamic_axes():
    import torch

    axes = ({0: torch.export.Dim.DYNAMIC},)
    torch.export.save(torch.export.export(torch.nn.Linear(3, 2), (torch.ones(2, 3),), dynamic_shapes=axes), "p.pt2")
    report = export("p.pt2", ["features=2x3"], output="p.onnx")

    assert Session(report.path).run({"features": np.ones((7, 3), np.float32)})["output"].shape == (7, 2)
    with pytest.raises(UsageError) as caught:
        export("p.pt2", ["features=2x3"], dynamic=["batch"], output="q.onnx")
    assert str(caught.value) == ("p.pt2 has the axes it was saved with. Set dynamic_shapes in torch.export.export instead.")
    with pytest.raises(ModelError, match=r"^p\.pt2 does not run in torch on a float32\[2, 3\], b float32\[2, 3\]: [^\n]+\.$"):
        export("p.pt2", ["a=2x3", "b=2x3"], output="q.onnx")


@needs_torch
@pytest.mark.parametrize("inputs", [["a=2x3", "b=2x3"], ["b=2x3", "a=2x3"], ["x=2x3", "y=2x3"]])
def test_a_saved_program_takes_its_inputs_by_name_or_in_order(inputs: list[str], monkeypatch: pytest.MonkeyPatch):
    import torch

    monkeypatch.syspath_prepend(Path.cwd())
    nets = import_module("nets")
    a, b = np.ones((2, 3), np.float32), np.zeros((2, 3), np.float32)
    arguments = (torch.from_numpy(a),), {"b": torch.from_numpy(b)}
    torch.export.save(torch.export.export(nets.Keyword(), *arguments), "k.pt2")
    report = export("k.pt2", inputs, output="k.onnx")
    first, second = sorted(text.partition("=")[0] for text in inputs)

    np.testing.assert_array_equal(Session(report.path).run({first: a, second: b})["output"], a - 2 * b)


@needs_torch
def test_outputs_are_named_by_keys_and_places():
    report = export("nets:Trees", ["x=2x3"], output="m.onnx")

    assert [text.split()[0] for text in report.outputs] == ["output_0", "last", "pair_0", "pair_2"]


@needs_torch
def test_a_module_is_exported_in_eval_mode_and_torch_draws_the_same_numbers_afterwards():
    import torch

    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(3))
    random = torch.random.get_rng_state()
    export(module, ["x=2x3"], output="m.onnx")

    assert not any(part.training for part in module.modules())
    assert torch.equal(torch.random.get_rng_state(), random)
    assert "Dropout" not in {node.op_type for node in onnx.load("m.onnx").graph.node}


@needs_torch
def test_a_difference_beyond_rounding_is_an_error_and_leaves_no_file(folder: Path):
    with pytest.raises(
        VerificationError,
        match=r"^nets:Noise: output 'output' of the ONNX model differs from torch by \S+, more than the \S+ that "
        r"rounding explains\. No file was written\.$",
    ):
        export("nets:Noise", ["x=2x3"], output="noise.onnx")
    assert not list(folder.glob("*noise*"))


@needs_torch
def test_an_existing_file_is_kept_unless_forced(folder: Path):
    (folder / "m.onnx").write_text("mine")

    with pytest.raises(UsageError, match=r"^m\.onnx exists\. Pass --force to overwrite it\.$"):
        export("nets:module", ["x=2x3"], output="m.onnx")
    assert (folder / "m.onnx").read_text() == "mine"
    export("nets:module", ["x=2x3"], output="m.onnx", force=True)
    assert onnx.load("m.onnx").graph.output


@needs_torch
@pytest.mark.parametrize(
    ("spec", "dynamic", "text"),
    [
        (
            "nets:Branch",
            (),
            r"^nets:Branch: torch cannot export it: Could not guard on data-dependent expression [^\n]*\.$",
        ),
        ("nets:Fixed", ("batch",), r"^nets:Fixed: torch cannot export it: [^\n]*inferred a static shape of 4[^\n]*\.$"),
    ],
)
def test_what_torch_cannot_export_is_one_line(spec: str, dynamic: tuple[str, ...], text: str):
    with pytest.raises(ModelError, match=text):
        export(spec, ["x=2x3"], dynamic=dynamic, output="m.onnx")


@needs_torch
def test_axes_that_vary_must_run_twice_as_long_in_torch_too():
    with pytest.raises(ModelError) as caught:
        export("nets:Table", ["x=2x3"], dynamic=["batch"], output="m.onnx")
    assert str(caught.value) == (
        "nets:Table does not run in torch on x float32[4, 3]: The size of tensor a (4) must match the size of tensor b (3) "
        "at non-singleton dimension 0."
    )


@needs_torch
@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("nets", "'module' object is not callable."),
        ("no_such.nets:vit", "No module named 'no_such'."),
        ("needy:vit", "No module named 'a_package_nobody_has'."),
        ("nets:convolutoin", "module 'nets' has no attribute 'convolutoin'."),
        ("nets:width", "'int' object is not callable."),
        ("nets:with_argument", "with_argument() missing 1 required positional argument: 'width'."),
        ("nets:dictionary", "it returned something of type dict, not a torch.nn.Module."),
        ("absent.pt2", "[Errno 2] No such file or directory: 'absent.pt2'."),
        ("nets.pt2", "File is not a zip file."),
    ],
)
def test_what_cannot_be_loaded_is_told_in_one_line(spec: str, reason: str):
    Path("nets.pt2").write_text("no program")

    with pytest.raises(ModelError) as caught:
        export(spec, ["x=2x3"], output="m.onnx")
    assert str(caught.value) == f"{spec} is no PACKAGE.MODULE:FACTORY or .pt2 file that can be loaded: {reason}"
    assert not Path("m.onnx").exists()


@needs_torch
@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("nets:Pair", "Pair.forward() missing 1 required positional argument: 'b'."),
        ("nets:Text", "it returns something of type str, not tensors in tuples, lists or dicts."),
        (
            "nets:convolution",
            "Expected 3D (unbatched) or 4D (batched) input to conv2d, but got input of size: [2, 3].",
        ),
    ],
)
def test_what_does_not_run_in_torch_is_told_in_one_line(spec: str, reason: str):
    with pytest.raises(ModelError) as caught:
        export(spec, ["x=2x3"], output="m.onnx")
    assert str(caught.value) == f"{spec} does not run in torch on x float32[2, 3]: {reason}"
    assert not Path("m.onnx").exists()


@pytest.mark.parametrize("package", ["torch", "onnxscript"])
def test_without_torch_one_sentence_says_what_to_install(package: str, monkeypatch: pytest.MonkeyPatch):
    for name in ("torch", "onnxscript"):
        monkeypatch.setitem(sys.modules, name, None if name == package else sys)

    with pytest.raises(UsageError) as caught:
        export("nets:convolution", ["x=1x2x4x4"], output="m.onnx")
    assert str(caught.value) == (f"Exporting needs the package {package}. Run: pip install 'onnxcomp[torch]'")


def test_a_name_alone_makes_the_first_axis_of_every_input_vary():
    ids, mask = read_inputs(["ids=1x16:int64", "mask=1x16:bool"], ["batch", "ids:1=sequence"])

    assert (ids.shape, ids.dtype, ids.axes) == ((1, 16), "int64", {0: "batch", 1: "sequence"})
    assert (mask.dtype, mask.axes) == ("bool", {0: "batch"})


@pytest.mark.parametrize("inputs", [["x=1x3xfoo"], ["x=0x3"], ["x=1x3:float23"], ["x=1", "x=2"]])
def test_an_input_that_cannot_be_understood_is_told_in_one_line(inputs: list[str]):
    with pytest.raises(UsageError) as caught:
        read_inputs(inputs, [])
    assert str(caught.value) == (
        f"Input '{inputs[-1]}' cannot be understood. Write each NAME once, as NAME=SIZExSIZE or NAME=SIZExSIZE:TYPE, TYPE "
        "being float32, float64, float16, int64, int32, int8, uint8, bool."
    )


@pytest.mark.parametrize("axis", ["x:1", "pixel:0=batch", "x:2=width", "batch,x:1=width"])
def test_a_dynamic_axis_that_no_input_has_is_told_in_one_line(axis: str):
    with pytest.raises(UsageError) as caught:
        read_inputs(["x=1x3"], [axis])
    assert str(caught.value) == (
        f"Dynamic axis '{axis}' is none of the inputs x=1x3. Write INPUT:AXIS=NAME, or a name alone, such as batch, for the "
        "first axis of every input."
    )
