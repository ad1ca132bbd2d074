import numpy as np
import onnx

class LazyValues:
    tensor: onnx.TensorProto
    shape: tuple[int, ...]
    def __init__(self, tensor: onnx.TensorProto) -> None: ...
    def load(self) -> np.ndarray: ...
