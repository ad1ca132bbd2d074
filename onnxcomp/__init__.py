"""Post-training quantization of ONNX models, with compensation subgraphs that repair the quantization error.

    import onnxcomp

    result = onnxcomp.quantize("model.onnx", data="calib.npz", output="model.int8.onnx")
    print(onnxcomp.compare("model.onnx", result.model, data="test.npz"))

The public names are loaded on first use: `import onnxcomp` alone loads neither onnx, onnxruntime nor torch.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnxcomp.analysis import analyze
    from onnxcomp.comparison import compare
    from onnxcomp.errors import OnnxcompError
    from onnxcomp.pipeline import Result, quantize
    from onnxcomp.recipe import Bits, Recipe
    from onnxcomp.report.model import Report

__all__ = ["Bits", "OnnxcompError", "Recipe", "Report", "Result", "__version__", "analyze", "compare", "quantize"]

_HOME = {
    "Bits": "onnxcomp.recipe", "Recipe": "onnxcomp.recipe", "OnnxcompError": "onnxcomp.errors",
    "Report": "onnxcomp.report.model", "Result": "onnxcomp.pipeline",
    "analyze": "onnxcomp.analysis", "compare": "onnxcomp.comparison", "quantize": "onnxcomp.pipeline",
}  # fmt: skip

try:
    __version__ = version("onnxcomp")
except PackageNotFoundError:
    __version__ = "0+unknown"


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'onnxcomp' has no attribute '{name}'")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
