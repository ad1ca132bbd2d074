"""One quantization by one other tool, run with the Python of that tool's own environment; knows nothing of onnxcomp.

    python peer_worker.py TOOL SETTING MODEL.onnx FEEDS.npz OUT.onnx

FEEDS holds the calibration samples: the array of input NAME of sample I is called "I/NAME". What a tool raises is the answer.
The seconds that it took, imports included, end the log.
"""

# Every tool is imported where it is used: each environment holds one of them.
from __future__ import annotations

import dataclasses
import importlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

LAYERS = ["Conv", "MatMul", "Gemm"]
Feed = dict[str, np.ndarray]
tool = importlib.import_module


@dataclasses.dataclass
class Job:
    """What to quantize, with what, and where to put it."""

    model: Path
    feeds: list[Feed]
    output: Path

    def save(self, model: Any) -> None:
        tool("onnx").save(model, str(self.output))


class Reader:
    """The samples as ONNX Runtime's quantizer, and those built on it, read them."""

    def __init__(self, feeds: list[Feed]) -> None:
        self.feeds = feeds
        self.rest = iter(feeds)

    def get_next(self) -> Feed | None:
        return next(self.rest, None)

    def rewind(self) -> None:
        self.rest = iter(self.feeds)

    def __iter__(self) -> Iterator[Feed]:
        return iter(self.feeds)

    def __len__(self) -> int:
        return len(self.feeds)


def reader(base: type, feeds: list[Feed]) -> Any:
    """A reader of the class that a tool insists on."""
    return type("Samples", (Reader, base), {})(feeds)


# --- onnxruntime -----------------------------------------------------------------------------------------------------


def ort_static(job: Job, *, prepared: bool = True, **settings: Any) -> None:
    q = tool("onnxruntime.quantization")
    with tempfile.TemporaryDirectory() as folder:
        source = _prepared(job, folder) if prepared else job.model
        q.quantize_static(str(source), str(job.output), reader(q.CalibrationDataReader, job.feeds), **settings)


def ort_u8s8(job: Job, **settings: Any) -> None:
    q = tool("onnxruntime.quantization")
    types = {"activation_type": q.QuantType.QUInt8, "weight_type": q.QuantType.QInt8}
    ort_static(job, **types, per_channel=True, reduce_range=False, **settings)


def ort_percentile(job: Job) -> None:
    ort_u8s8(job, calibrate_method=tool("onnxruntime.quantization").CalibrationMethod.Percentile)


def ort_dynamic(job: Job, **settings: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tool("onnxruntime.quantization").quantize_dynamic(str(_prepared(job, folder)), str(job.output), **settings)


def ort_transformer(job: Job) -> None:
    """Fused by onnxruntime.transformers first, as its documentation advises, then quantized dynamically."""
    with tempfile.TemporaryDirectory() as folder:
        fused = tool("onnxruntime.transformers.optimizer").optimize_model(str(job.model), model_type="bert", opt_level=0)
        fused.save_model_to_file(str(Path(folder) / "fused.onnx"))
        q = tool("onnxruntime.quantization")
        kinds = ["MatMul", "Gemm", "Attention", "EmbedLayerNormalization"]
        q.quantize_dynamic(
            str(Path(folder) / "fused.onnx"), str(job.output), per_channel=True, op_types_to_quantize=kinds,
            extra_options={"DefaultTensorType": tool("onnx").TensorProto.FLOAT},
        )  # fmt: skip


def ort_w4(job: Job, **settings: Any) -> None:
    nbits = tool("onnxruntime.quantization.matmul_nbits_quantizer")
    quantizer = nbits.MatMulNBitsQuantizer(tool("onnx").load(str(job.model)), block_size=32, is_symmetric=True, **settings)
    quantizer.process()
    quantizer.model.save_model_to_file(str(job.output))


def _prepared(job: Job, folder: str) -> Path:
    path = Path(folder) / "prepared.onnx"
    shape_inference = tool("onnxruntime.quantization.shape_inference")
    try:
        shape_inference.quant_pre_process(str(job.model), str(path))
    except Exception:  # its symbolic shape inference gives up on some models
        shape_inference.quant_pre_process(str(job.model), str(path), skip_symbolic_shape=True)
    return path


# --- nncf ------------------------------------------------------------------------------------------------------------


def nncf_int8(job: Job, *, transformer: bool = False, mixed: bool = False) -> None:
    nncf = tool("nncf")
    settings = {"model_type": nncf.ModelType.TRANSFORMER} if transformer else {}
    settings |= {"preset": nncf.QuantizationPreset.MIXED} if mixed else {}
    dataset = nncf.Dataset(job.feeds)
    job.save(nncf.quantize(tool("onnx").load(str(job.model)), dataset, subset_size=len(job.feeds), **settings))


def nncf_w4(job: Job) -> None:
    nncf = tool("nncf")
    mode = nncf.CompressWeightsMode.INT4_SYM
    job.save(nncf.compress_weights(tool("onnx").load(str(job.model)), mode=mode, group_size=32, ratio=1.0, all_layers=True))


# --- onnxsim ---------------------------------------------------------------------------------------------------------


def onnxsim_call(job: Job, name: str, *, calibrated: bool = False, **settings: Any) -> None:
    onnx, onnxsim = tool("onnx"), tool("onnxsim")
    model = onnx.shape_inference.infer_shapes(onnxsim.simplify(str(job.model))[0])
    data = {"calibration_data": job.feeds} if calibrated else {}
    job.save(getattr(onnxsim, name)(model, **data, **settings))


# --- onnx-neural-compressor ------------------------------------------------------------------------------------------


def inc_call(job: Job, kind: str, **settings: Any) -> None:
    q, config = tool("onnx_neural_compressor.quantization"), tool("onnx_neural_compressor.quantization.config")
    if "static" in kind.lower() or "smooth" in kind.lower():
        base = tool("onnx_neural_compressor.data_reader").CalibrationDataReader
        settings = {"calibration_data_reader": reader(base, job.feeds)} | settings
    with tempfile.TemporaryDirectory() as folder:
        q.quantize(str(_prepared(job, folder)), str(job.output), getattr(config, kind)(**settings))


def inc_static(job: Job) -> None:
    q = tool("onnx_neural_compressor.quantization")
    inc_call(
        job, "StaticQuantConfig", activation_type=q.QuantType.QUInt8, weight_type=q.QuantType.QInt8, per_channel=True,
        quant_format=q.QuantFormat.QDQ,
    )  # fmt: skip


# --- nvidia-modelopt -------------------------------------------------------------------------------------------------


def modelopt_call(job: Job, mode: str, **settings: Any) -> None:
    quantize = tool("modelopt.onnx.quantization").quantize
    with tempfile.TemporaryDirectory() as folder:  # it writes beside its input
        copy = Path(folder) / "model.onnx"
        copy.write_bytes(job.model.read_bytes())
        stacked = {name: [feed[name] for feed in job.feeds] for name in job.feeds[0]}
        length = {name: min(array.shape[1] for array in arrays) for name, arrays in stacked.items()}
        ragged = any(len({array.shape for array in arrays}) > 1 for arrays in stacked.values())
        data = {n: np.concatenate([a[:, : length[n]] if ragged else a for a in arrays]) for n, arrays in stacked.items()}
        data = {name: np.ascontiguousarray(array) for name, array in data.items()}
        shapes = ",".join(f"{name}:{'x'.join(map(str, (1, *array.shape[1:])))}" for name, array in data.items())
        quantize(
            str(copy), quantize_mode=mode, calibration_data=data, calibration_shapes=shapes, output_path=str(job.output),
            calibration_eps=["cpu"], high_precision_dtype="fp32", **settings,
        )  # fmt: skip


# --- aimet-onnx ------------------------------------------------------------------------------------------------------


def aimet(job: Job, weights: int, activations: int, **settings: Any) -> None:
    sim_module = tool("aimet_onnx")
    onnx = tool("onnx")
    types = {"param_type": f"int{weights}", "activation_type": f"int{activations}"}
    types = {key: getattr(sim_module, value) for key, value in types.items()}
    sim = sim_module.QuantizationSimModel(onnx.load(str(job.model)), **types, **settings)
    sim.compute_encodings(job.feeds)
    job.save(sim.to_onnx_qdq())


# --- amd-quark -------------------------------------------------------------------------------------------------------


def quark(job: Job, kind: str) -> None:
    onnx_api = tool("quark.onnx")
    base = tool("onnxruntime.quantization").CalibrationDataReader
    quantizer = onnx_api.ModelQuantizer(onnx_api.QConfig.get_default_config(kind))
    quantizer.quantize_model(str(job.model), str(job.output), reader(base, job.feeds))


SETTINGS: dict[str, dict[str, Callable[[Job], None]]] = {
    "ort": {
        "static": lambda job: ort_static(job, prepared=False),
        "static-u8s8": ort_u8s8,
        "static-u8s8-percentile": ort_percentile,
        "static-u8s8-layers": lambda job: ort_u8s8(job, op_types_to_quantize=LAYERS),
        "dynamic": ort_dynamic,
        "dynamic-matmul": lambda job: ort_dynamic(job, per_channel=True, op_types_to_quantize=["MatMul", "Gemm"]),
        "dynamic-fused": ort_transformer,
        "w4": ort_w4,
        "w4-int8": lambda job: ort_w4(job, accuracy_level=4),
    },
    "nncf": {
        "int8": nncf_int8,
        "int8-mixed": lambda job: nncf_int8(job, mixed=True),
        "int8-transformer": lambda job: nncf_int8(job, transformer=True),
        "w4": nncf_w4,
    },
    "onnxsim": {
        "static": lambda job: onnxsim_call(job, "quantize_static", calibrated=True),
        "static-mse": lambda job: onnxsim_call(job, "quantize_static", calibrated=True, method="mse"),
        "static-full": lambda job: onnxsim_call(job, "quantize_static", calibrated=True, full_graph=True),
        "qoperator": lambda job: onnxsim_call(job, "quantize_qoperator", calibrated=True),
        "dynamic": lambda job: onnxsim_call(job, "quantize_dynamic"),
        "dynamic-fused": lambda job: onnxsim_call(job, "quantize_dynamic_matmul_integer_to_float"),
        "w4": lambda job: onnxsim_call(job, "quantize_weight_only_int4"),
    },
    "inc": {
        "static": inc_static,
        "smooth": lambda job: inc_call(job, "SmoothQuantConfig"),
        "dynamic": lambda job: inc_call(job, "DynamicQuantConfig"),
        "w4": lambda job: inc_call(job, "RTNConfig", weight_group_size=32),
    },
    "modelopt": {
        "int8": lambda job: modelopt_call(job, "int8"),
        "int8-max": lambda job: modelopt_call(job, "int8", calibration_method="max"),
        "w4": lambda job: modelopt_call(job, "int4", calibration_method="rtn_dq"),
    },
    "aimet": {
        "w8a8": lambda job: aimet(job, 8, 8),
        "w4a8": lambda job: aimet(job, 4, 8),
        "w4a4": lambda job: aimet(job, 4, 4),
    },
    "quark": {
        "u8s8": lambda job: quark(job, "U8S8_AAWS"),
        "xint8": lambda job: quark(job, "XINT8"),
        "a8w8": lambda job: quark(job, "A8W8"),
    },
}
"""What each tool is asked for, by the names that the table uses; a setting that starts with w4 has weights of 4 bits."""


def main() -> None:
    name, setting, model, feeds, output = sys.argv[1:]
    samples: dict[str, Feed] = {}
    with np.load(feeds) as archive:
        for key in archive.files:
            number, _, called = key.partition("/")
            samples.setdefault(number, {})[called] = archive[key]
    job, start = Job(Path(model), list(samples.values()), Path(output)), time.perf_counter()
    SETTINGS[name][setting](job)
    print(f"\nseconds: {time.perf_counter() - start:.2f}")


if __name__ == "__main__":
    main()
