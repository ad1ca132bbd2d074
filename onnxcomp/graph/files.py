"""Model files: reading, writing in one step, metadata and digests.

A model read here carries its weights in memory, also where they lie in separate files beside the model; above `INLINE_LIMIT`
bytes they stay there, checked, and are mapped (`graph.mapped`). A model is written to a hidden folder beside its destination
and moved into place in the end, so a failure leaves nothing behind and a reader never sees half a file. Above `INLINE_LIMIT`
bytes the weights go to `<name>.data` beside the model (protobuf ends at 2 GiB), and so do those of a model whose weights are
mapped, for a runtime maps them there again.

Limits: weights inside the bodies of If, Loop and Scan always stay inside the model file. A model and its weight file
are two moves: one that fails undoes the other, but a machine that stops between the two can leave a mismatched pair.
"""

import functools
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

import onnx
from google.protobuf.message import DecodeError, EncodeError
from onnx import ModelProto, NodeProto, TensorProto, checker, helper, numpy_helper, parser, shape_inference
from onnx.external_data_helper import ExternalDataInfo

from onnxcomp import scratch
from onnxcomp.errors import ModelError, UsageError
from onnxcomp.graph import mapped, weights
from onnxcomp.graph.edit import DOMAIN

Location = str | os.PathLike[str]
REPORT, FOLDS = "onnxcomp.report", "onnxcomp.folds"
"""Keys of the metadata under which the report, and what was folded into constants, are stored."""
INLINE_LIMIT = 1_900_000_000
_ALIGNMENT = 4096
_CHUNK = 1 << 20


def load(source: Location | bytes | ModelProto) -> ModelProto:
    """The model with all its weights in memory, or in files that are mapped.

    A ModelProto is returned as it is, and no function of this package changes it. Raises ModelError for a file that is
    missing, is no ONNX model, or whose weight files are missing, too short or outside the model's folder.
    """
    if isinstance(source, ModelProto | bytes):
        model = source if isinstance(source, ModelProto) else _parse(source, "The bytes given")
        outside = next((t for t in weights.external_tensors(model.graph) if not mapped.is_mapped(t)), None)
        if outside is not None:
            raise ModelError(f"The weight '{outside.name}' lies in a file beside the model. Give the model's path.")
        return model
    path = Path(source)
    model = _read_structure(path)
    is_large = mapped.outside(model) > INLINE_LIMIT
    main = sum(tensor.data_location == TensorProto.EXTERNAL for tensor in model.graph.initializer if is_large)
    for number, tensor in enumerate(weights.external_tensors(model.graph)):
        if number >= main or not mapped.map_external(tensor, path):
            weights.read_external(tensor, path)
    return model


def parse(text: str) -> ModelProto:
    """The model that ONNX's textual form of it stands for."""
    return parser.parse_model(text)


def read_nodes(path: Path) -> tuple[NodeProto, ...]:
    """The operators of the main graph of a model file, in order; weights beside the file are not read."""
    return tuple(_read_structure(path).graph.node)


def metadata(model: ModelProto) -> dict[str, str]:
    """The model's metadata, keys sorted."""
    return {p.key: p.value for p in sorted(model.metadata_props, key=lambda p: p.key)}


def set_metadata(model: ModelProto, values: Mapping[str, str]) -> None:
    """Set these keys of the model's metadata, in place; other keys stay, and all are stored sorted."""
    merged = metadata(model) | dict(values)
    helper.set_model_props(model, dict(sorted(merged.items())))


def files_of(source: object) -> tuple[Path, ...]:
    """The file of a model, and those beside it that hold its weights, sorted; none for a model in memory."""
    if not isinstance(source, str | os.PathLike):
        return ()
    path = Path(source)
    outside = weights.external_tensors(_read_structure(path).graph)
    beside = sorted({path.parent / ExternalDataInfo(tensor).location for tensor in outside})
    for file in beside:
        if not file.is_file():
            raise ModelError(f"{path}: the weight file '{file.name}' is missing. Copy it beside the model.")
    return path, *beside


def size(path: Location) -> int:
    """The bytes of a model and its weight files."""
    return sum(file.stat().st_size for file in files_of(path))


def sha256(source: Location | bytes | ModelProto) -> str:
    """Hex digest of a model: of its bytes, then of those of its weight files in the order of their names."""
    if isinstance(source, ModelProto):
        with loadable(source) as found:
            return sha256(found)
    digest = hashlib.sha256(source if isinstance(source, bytes) else b"")
    for file in files_of(source):
        with weights.reading(file) as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def bytes_of(model: ModelProto) -> int:
    """The bytes of a model and of the weights that it refers to; above `INLINE_LIMIT` those of its weights alone."""
    stored = _weight_bytes(model)
    return stored if stored > INLINE_LIMIT else model.ByteSize() + mapped.outside(model)


def _weight_bytes(model: ModelProto) -> int:
    return sum(map(weights.tensor_bytes, weights.walk_tensors(model.graph)))


@contextmanager
def loadable(model: Location | bytes | ModelProto) -> Iterator[bytes | str]:
    """The model as a runtime takes it: bytes, or a path, where need be of a file that is there for the time being."""
    if not isinstance(model, ModelProto):
        yield model if isinstance(model, bytes) else os.fspath(model)
    elif _weight_bytes(model) - mapped.outside(model) <= INLINE_LIMIT and len(raw := to_bytes(model)) <= INLINE_LIMIT:
        yield raw
    else:
        with scratch.folder() as folder, PendingFile(model, folder / "m.onnx") as pending:
            yield str(pending.path)


def to_bytes(model: ModelProto) -> bytes:
    """The model serialized, always the same bytes for the same model. Raises ModelError above 2 GiB."""
    try:
        return model.SerializeToString(deterministic=True)
    except (EncodeError, ValueError) as error:
        raise ModelError("The model exceeds 2 GiB, the most that ONNX can hold in one piece.") from error


def check(path: Location) -> str:
    """Run the full checker on a model file; returns `onnx` and its version. Raises ModelError with its complaint."""
    try:
        checker.check_model(os.fspath(path), full_check=True)
    except (checker.ValidationError, shape_inference.InferenceError) as error:
        raise ModelError(f"The ONNX checker refuses the model: {str(error).strip().splitlines()[0]}") from error
    return f"onnx {onnx.__version__}"


def check_output(output: Location | None, source: object = None, *, force: bool = False) -> None:
    """Raise UsageError if a model read from `source` cannot be written to `output`, before any work is done.

    `source` matters where it is a path: the input and its weight files are never written over.
    """
    if output is None:
        return
    output = Path(output)
    if not output.parent.is_dir():
        raise UsageError(f"The folder {output.parent} does not exist. Create it first, or choose another output.")
    if output.is_dir():
        raise UsageError(f"{output} is a folder. Give the name of the file to write.")
    _check_free([output], files_of(source), force=force)


def save(model: ModelProto, path: Location, *, force: bool = False, source: Location | None = None) -> None:
    """Write `model` to `path` in one step; see PendingFile for the arguments and errors."""
    with PendingFile(model, path, force=force, source=source) as pending:
        pending.commit()


def save_text(text: str, path: Location) -> None:
    """Write `text` to `path` in one step, over what is there. Raises ModelError where writing fails."""
    path = Path(path)
    with _writing(path), TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent, ignore_cleanup_errors=True) as folder:
        part = Path(folder) / path.name
        with part.open("wb") as stream:
            stream.write(text.encode())
            settle(stream)
        part.replace(path)


class PendingFile(AbstractContextManager["PendingFile"]):
    """A model written beside its destination, ready to be run, and moved there by `commit`.

    `path` is the written file, loadable as it is; leaving the context without `commit` removes it. An existing
    destination is replaced only with `force`, and never when it is `source`, the file that the model was read from.
    Raises UsageError for a destination that cannot be used and ModelError where writing fails.
    """

    def __init__(self, model: ModelProto, path: Location, *, force: bool = False, source: Location | None = None) -> None:
        domains = {o.domain for o in model.opset_import} | {node.domain for node in weights.walk_nodes(model.graph)}
        assert DOMAIN not in domains, "abstract nodes were not lowered"
        check_output(path, source, force=force)
        self.destination = destination = Path(path)
        is_large = _weight_bytes(model) > INLINE_LIMIT or mapped.outside(model) > 0
        beside = [destination.with_name(f"{destination.name}.data")] if is_large else []
        self._targets = [*beside, destination]
        self._check_targets = functools.partial(_check_free, self._targets, files_of(source), force=force)
        self._check_targets()
        with ExitStack() as written, _writing(destination):
            folder = TemporaryDirectory(prefix=f".{destination.name}.", dir=destination.parent, ignore_cleanup_errors=True)
            self._folder = Path(written.enter_context(folder))
            self.path = self._folder / destination.name
            structure = _write_weights(model, self._folder / beside[0].name) if beside else mapped.embed(model)
            with self.path.open("wb") as stream:
                stream.write(to_bytes(structure))
                settle(stream)
            self._written = written.pop_all()

    def commit(self) -> None:
        """Move the file into place. Where that fails, the destination is left as it was."""
        self._check_targets()
        with _writing(self.destination), self, ExitStack() as undo:
            for target in self._targets:
                backup = self._folder / f"{target.name}.before"
                if target.exists() and target != self.destination:
                    os.link(target, backup)
                (self._folder / target.name).replace(target)
                if backup.exists():
                    undo.callback(backup.replace, target)
                else:
                    undo.callback(target.unlink)
            undo.pop_all()

    def __exit__(self, *_: object) -> None:
        self._written.close()


@contextmanager
def _writing(destination: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ModelError(f"{destination} cannot be written: {weights.reason(error)}.") from error


def _check_free(targets: Sequence[Path], inputs: tuple[Path, ...], *, force: bool) -> None:
    for target in targets:
        if not target.exists():
            continue
        if any(target.samefile(file) for file in inputs):
            raise UsageError(f"{target} is the input itself, which is never changed. Choose another output.")
        if not force:
            raise UsageError(f"{target} exists. Pass --force to overwrite it.")


def _read_structure(path: Path) -> ModelProto:
    if path.is_dir():
        raise ModelError(f"{path} is a folder. Give the path of the .onnx file in it.")
    with weights.reading(path) as stream:
        return _parse(stream.read(), str(path))


def _parse(data: bytes, what: str) -> ModelProto:
    try:
        model = ModelProto.FromString(data)
    except DecodeError:
        model = ModelProto()
    if not model.graph.output:
        raise ModelError(f"{what}: not an ONNX model, or one that is cut short.")
    return model


def _write_weights(model: ModelProto, file: Path) -> ModelProto:
    """Write the large initializers to `file`; the model returned refers to them there."""
    skeleton, large = weights.split_weights(model)
    with file.open("wb") as stream:
        for name, tensor in large.items():
            stream.write(b"\0" * (-stream.tell() % _ALIGNMENT))
            stub = skeleton.graph.initializer.add(name=name, data_type=tensor.data_type, dims=tensor.dims)
            stub.doc_string = tensor.doc_string
            weights.refer(stub, file.name, stream.tell(), weights.tensor_bytes(tensor))
            if tensor.data_location == TensorProto.EXTERNAL:
                stream.write(mapped.array_of(tensor).data)
            else:
                packed = tensor if tensor.HasField("raw_data") else numpy_helper.from_array(numpy_helper.to_array(tensor))
                stream.write(packed.raw_data)
        settle(stream)
    return mapped.embed(skeleton)


def settle(stream: BinaryIO) -> None:
    """Wait until what was written is on the disk."""
    stream.flush()
    os.fsync(stream.fileno())
