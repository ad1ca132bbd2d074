"""Weights of 2 and 3 bits: they take as many bits in the file, and are the same numbers as int4 ones."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from abstract import both, dequantize, matmul, static
from equality import ops, stored
from onnx import TensorProto, numpy_helper, parser
from tiny import TINY_PLACEHOLDER  # noqa
