"""torch to ONNX, checked: the only part that imports torch (the extra `torch`), and only when it runs.

A module or a torch.export program becomes one ONNX file at opset 20. Constants are folded and what computes nothing is
dropped; BatchNormalization stays, since preparation folds it where that is safe. Nodes are named by the module they
come from, `/blocks/0/attn/qkv/MatMul`, so that patterns read like the code; no path of the machine gets into the file.
Before it is moved into place, ONNX Runtime runs it against torch on random draws.

Limits: inputs are tensors on the CPU; outputs are tensors in any nesting of tuples, lists and dicts.
"""

from onnxcomp.export.convert import ExportReport, export

__all__ = ["ExportReport", "export"]
