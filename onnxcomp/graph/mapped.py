"""Weights that stay in their files: arrays mapped from there, and tensors of a model that say where they lie.

Of a model whose weights exceed `files.INLINE_LIMIT`, what is read is mapped, and what is rewritten goes to a temporary file
and is mapped too. A graph holds mapped arrays as it holds any others; a model made of it refers to the files, by locations
relative to the root of the file system, where a runtime maps them again. So a float weight is in memory only while it is
worked on, and a whole model can be loaded that takes none.

Limits: float and 8-bit weights of the main graph; shapes, bfloat16 and codes of fewer than 8 bits are read. A rewritten weight
holds a file open. On Windows everything must lie on one drive.
"""

import mmap
import os
import tempfile
import weakref
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from onnx import ModelProto, TensorProto, helper
from onnx.external_data_helper import ExternalDataInfo
from onnx_graphsurgeon.ir.tensor import LazyValues

from onnxcomp import scratch
from onnxcomp.errors import ResourceError
from onnxcomp.graph.weights import WEIGHT_BYTES, external_tensors, find_external, reason, refer, set_values, tensor_bytes

SPILL_BYTES = 1 << 20
"""From which what is made of mapped weights is mapped too."""
ROOT = Path(os.sep).resolve()
"""What the locations are relative to."""

_known: dict[str, tuple[int, int, int]] = {}
"""The locations of files that were mapped here, and which files these were: a model from outside may not refer to any other."""
_open: weakref.WeakValueDictionary[str, np.memmap] = weakref.WeakValueDictionary()


def is_mapped(tensor: TensorProto) -> bool:
    """Whether the tensor refers to a file that was mapped here."""
    return any(entry.key == "location" and entry.value in _known for entry in tensor.external_data)


def outside(model: ModelProto) -> int:
    """The bytes of all weights that lie in other files."""
    return sum(tensor_bytes(tensor) for tensor in external_tensors(model.graph))


def map_external(tensor: TensorProto, model_path: Path) -> bool:
    """Let the tensor refer to its file wherever the model is, in place; False if it must be read. Raises ModelError where
    the file is missing, lies outside the model's folder or holds too few bytes.
    """
    if tensor_bytes(tensor) < WEIGHT_BYTES or helper.tensor_dtype_to_np_dtype(tensor.data_type).char not in "efdbB":
        return False
    file, start = find_external(tensor, model_path)
    refer(tensor, _map(file)[0], start, tensor_bytes(tensor))
    return True


def array_of(tensor: TensorProto) -> np.ndarray:
    """The values of a tensor that refers to a mapped file; they cannot be written."""
    info = ExternalDataInfo(tensor)
    assert info.location in _known, tensor.name
    whole, start = _map(ROOT / info.location)[1], info.offset or 0
    flat = np.asarray(whole[start : start + tensor_bytes(tensor)])
    return flat.view(helper.tensor_dtype_to_np_dtype(tensor.data_type)).reshape(tuple(tensor.dims))


def stored(name: str, values: np.ndarray) -> np.ndarray | LazyValues:
    """Of values that are mapped a tensor that refers to their file, of others these."""
    home = _home(values)
    if home is None or not values.flags.c_contiguous or values.nbytes < WEIGHT_BYTES:
        return values
    tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(values.dtype), dims=values.shape)
    refer(tensor, home[0], values.ctypes.data - home[1].ctypes.data, values.nbytes)
    return LazyValues(tensor)


def keep(values: np.ndarray, *old: np.ndarray, always: bool = False) -> np.ndarray:
    """What was made of `old` weights: mapped if one of them is, which then lets go of the pages that it has read, or `always`.
    Raises ResourceError where there is no room for it.
    """
    homes = [home for home in map(_home, old) if home is not None]
    if values.nbytes < SPILL_BYTES or not (homes or always):
        return values
    try:
        with ExitStack() as made:
            path = made.enter_context(scratch.folder()) / "weight"
            with path.open("wb") as stream:
                stream.write(np.ascontiguousarray(values).data)
            whole = _map(path)[1]
            weakref.finalize(whole, made.pop_all().close)
    except OSError as error:
        text = f"{tempfile.gettempdir()} cannot hold the model's weights: {reason(error)}."
        raise ResourceError(f"{text} Point $TMPDIR to a folder on a larger disk.") from error
    for _, read in homes:
        if isinstance(read.base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            read.base.madvise(mmap.MADV_DONTNEED)
    return np.asarray(whole).view(values.dtype).reshape(values.shape)


def embed(model: ModelProto) -> ModelProto:
    """The model with what lies in mapped files read into it: a copy, or the model itself where nothing does."""
    if not outside(model):
        return model
    copy = ModelProto()
    copy.CopyFrom(model)
    for tensor in [tensor for tensor in external_tensors(copy.graph) if is_mapped(tensor)]:
        set_values(tensor, array_of(tensor).tobytes())
    return copy


def _map(path: Path) -> tuple[str, np.memmap]:
    """The location and the bytes of a file, mapped once as long as it is the same file."""
    path = path.resolve()
    location, status = path.relative_to(ROOT).as_posix(), path.stat()
    stamp, whole = (status.st_ino, status.st_mtime_ns, status.st_size), _open.get(location)
    if whole is None or _known[location] != stamp:
        whole = np.memmap(path, np.uint8, "r")
    _known[location], _open[location] = stamp, whole
    return location, whole


def _home(values: object) -> tuple[str, np.memmap] | None:
    """The location and the bytes of the file that an array is mapped from."""
    while isinstance(values, np.ndarray) and not isinstance(values.base, mmap.mmap):
        values = values.base
    return next((found for found in _open.items() if found[1] is values), None)
