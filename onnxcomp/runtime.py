"""ONNX Runtime: sessions, inferred types, what it makes of a model, and how long that takes.

The only module that imports onnxruntime. Sessions are quiet and deterministic; a failure is a ModelError with the
runtime's own sentence. A model is one in memory, its bytes, or a path. Weights that are mapped from files
(`graph.mapped`) are mapped by the runtime too.

Limits: CPU time that other processes take is part of a latency. Models are timed in turn and ratios taken round by
round, so that it stays out of the comparison.
"""

from __future__ import annotations

import functools
import json
import os
import re
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as native  # pyright: ignore[reportAttributeAccessIssue]

from onnxcomp import scratch
from onnxcomp.errors import ModelError, UsageError
from onnxcomp.graph import files, mapped
from onnxcomp.graph.types import TensorType, element_type
from onnxcomp.graph.unsigned import unsigned_weights
from onnxcomp.graph.weights import expose_all

if TYPE_CHECKING:
    from threadpoolctl import ThreadpoolController

S = TypeVar("S")
T = TypeVar("T")
Model = files.ModelProto | bytes | str | Path
Feed = Mapping[str, np.ndarray]
Progress = Callable[[str, int, int], None]
"""Takes a stage, how much of it is done, and of how much."""

_CPU = "CPUExecutionProvider"
_providers: ContextVar[tuple[str, ...]] = ContextVar("providers", default=(_CPU,))
_threads: ContextVar[int] = ContextVar("threads", default=0)

_KINDS = [kind for kind in vars(native).values() if isinstance(kind, type) and issubclass(kind, Exception)]
_FAILURES = (*_KINDS, RuntimeError, ValueError)
_FATAL = 4
_EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"
_ROUND_SECONDS = 0.02
_WARM_PASSES = 4
_PROFILED_RUNS = 10


@dataclass(frozen=True)
class Latency:
    """Milliseconds per run: median, 10 and 90 % quantile over the rounds; the same of the ratio to the first model."""

    median_ms: float
    low_ms: float
    high_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float


class Session:
    """A loaded model, ready to run on the CPU. `inputs` and `outputs` are (name, type) pairs in the model's order.

    `threads` 0 leaves their number to `threads()`, else to the runtime. `faithful`: int8 activations stay int8, as they do on
    ARM, where the runtime would turn them into uint8 here (which 1.32 cannot load behind a Reshape from opset 21 on); products
    are added right even on a CPU that `saturates`; a float bias stays float (which 1.32 quantizes wrongly where scales are
    float16), and weights in a file beside the model stay there. `options` replace all others. Raises ModelError for a model
    that cannot be loaded.
    """

    def __init__(
        self, model: Model, *, optimize: bool = True, threads: int = 0, faithful: bool = True,
        options: ort.SessionOptions | None = None,
    ) -> None:  # fmt: skip
        chosen = options or _options(threads, optimize=optimize, faithful=faithful)
        beside = faithful and isinstance(model, str | Path) and Path(f"{model}.data").is_file()
        if options is None and faithful and not beside and saturates():
            model = unsigned_weights(files.load(model))
        outside = mapped.outside(model) if isinstance(model, files.ModelProto) else 0
        if outside > files.INLINE_LIMIT or beside:  # weights are mapped, but packed ones would be copies in memory
            chosen.add_session_config_entry("session.disable_prepacking", "1")
        try:
            # Without the fallback a provider that cannot start is an error, not the CPU.
            exact = [(name, {"use_tf32": "0"} if "CUDA" in name and faithful else {}) for name in _providers.get()]
            with files.loadable(model) as source:
                if outside and isinstance(source, bytes):
                    chosen.add_session_config_entry(_EXTERNAL_FOLDER, str(mapped.ROOT))
                self.native = ort.InferenceSession(source, chosen, providers=exact, enable_fallback=False)
        except _FAILURES as error:
            what = str(model) if isinstance(model, str | Path) else "the model"
            raise ModelError(f"ONNX Runtime cannot load {what}: {_sentence(error)}") from error
        self.inputs, self.outputs = _ports(self.native.get_inputs()), _ports(self.native.get_outputs())
        self._halves = frozenset(name for name, kind in self.inputs if kind.dtype == np.float16)

    def run(self, feeds: Feed) -> dict[str, np.ndarray]:
        """The outputs for one feed, by name; a float16 input takes float32 too. Raises ModelError where the run fails."""
        given = {name: array.astype(np.float16) if name in self._halves else array for name, array in feeds.items()}
        try:
            values: Sequence[Any] = self.native.run(None, given)
        except _FAILURES as error:
            raise ModelError(f"ONNX Runtime cannot run the model: {_sentence(error)}") from error
        return dict(zip([name for name, _ in self.outputs], values, strict=True))


@contextmanager
def _setting(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    """Let the variable have this value."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def provider(name: str) -> AbstractContextManager[None]:
    """Let sessions run on another execution provider: `cuda`, `tensorrt` or any that the installed ONNX Runtime has. What it
    does not take runs on the CPU. Raises UsageError for a provider that is not there.
    """
    known = {full.removesuffix("ExecutionProvider").lower(): full for full in ort.get_available_providers()}
    if name.lower() not in known:
        raise UsageError(f"The installed ONNX Runtime has no execution provider '{name}', only: {', '.join(known)}.")
    return _setting(_providers, tuple(dict.fromkeys((known[name.lower()], _CPU))))


def current_provider() -> str:
    """The name of the execution provider that sessions run on."""
    return _providers.get()[0].removesuffix("ExecutionProvider").lower()


def threads(count: int) -> AbstractContextManager[None]:
    """Let sessions that name no number of threads have so many."""
    return _setting(_threads, count)


def cores() -> int:
    """How many threads may run at once: as many as `threads` says, else as this process has cores."""
    return _threads.get() or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def each(fn: Callable[[T], S], items: Iterable[T]) -> Iterator[S]:
    """`fn` of every item, in their order; as many at once as there are cores, each on one."""
    count, begun = cores(), deque[Future[S]]()
    with one_thread(), ThreadPoolExecutor(count) as pool:
        for item in items:
            if len(begun) > count:  # results wait for their turn, and are not small
                yield begun.popleft().result()
            begun.append(pool.submit(copy_context().run, fn, item))
        while begun:
            yield begun.popleft().result()


@contextmanager
def one_thread() -> Iterator[None]:
    """Matrix products on one core each: several would add up in another order, and wait for one another."""
    with _libraries().limit(limits=1, user_api="blas"):
        yield


@functools.cache
def _libraries() -> ThreadpoolController:
    from threadpoolctl import ThreadpoolController  # which sets a variable of the environment

    return ThreadpoolController()


def ignore(stage: str, done: int, total: int) -> None:
    """Report no progress."""


def version() -> str:
    """The version of the installed ONNX Runtime."""
    return ort.__version__


@functools.cache
def saturates() -> bool:
    """Whether this CPU adds two products of unsigned and signed 8-bit codes wrongly, in 16 bits, as x86 without VNNI does."""
    text = '<ir_version: 8, opset_import: ["" : 13]> p (uint8[1,2] a) => (int32[1,1] y) <int8[2,1] w = {127, 127}>'
    probe, feed = files.parse(f"{text} {{ y = MatMulInteger(a, w) }}"), {"a": np.full((1, 2), 255, np.uint8)}
    with provider("cpu"):
        return Session(probe, faithful=False).run(feed)["y"].item() != 2 * 255 * 127


def infer_types(model: Model) -> dict[str, TensorType]:
    """Element type and shape of the inputs and of every node's outputs, as ONNX Runtime infers them.

    A dimension that varies is its name, or None where it has none. Tensors inside the bodies of control flow are left
    out. Raises ModelError for a model that cannot be loaded.
    """
    loaded = files.load(model)
    session = Session(expose_all(loaded), optimize=False)
    stored = {tensor.name for tensor in loaded.graph.initializer}
    return {name: kind for name, kind in (*session.inputs, *session.outputs) if name not in stored}


def optimized(model: Model) -> tuple[files.NodeProto, ...]:
    """The operators that ONNX Runtime executes on the CPU, whatever the provider, in place of the model's own, in order.

    Changes of memory layout are left out: they rename tensors and nodes, and compute the same. Raises ModelError for a
    model that cannot be loaded.
    """
    with scratch.folder() as folder:
        path = folder / "optimized.onnx"
        options = _options(1, faithful=False)
        options.add_session_config_entry("session.qdqisint8allowed", "1")
        options.optimized_model_filepath = str(path)
        # Weights go to a file of their own: in one file, a model of more than 2 GiB could not be written.
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        options.add_session_config_entry("optimization.disable_specified_optimizers", "NchwcTransformer;NhwcTransformer")
        with provider("cpu"):
            Session(model, options=options)
        return files.read_nodes(path)


def measure(
    models: Sequence[Model], feeds: Sequence[Feed], *, threads: int = 1, rounds: int = 20, faithful: bool = False
) -> tuple[Latency, ...]:
    """Latency of one run of each model, all on the same feeds, in the same process and in turn: A B C A B C ...

    In every round each model goes through the feeds as often as 20 ms take. Raises ModelError for a model that cannot be
    loaded or run.
    """
    sessions = [Session(model, threads=threads, faithful=faithful) for model in models]
    fastest = [min(_time(session, feeds, 1) for _ in range(_WARM_PASSES)) * len(feeds) for session in sessions]
    passes = [max(1, round(_ROUND_SECONDS / once)) for once in fastest]
    seconds = np.empty((rounds, len(sessions)))
    for index in range(rounds):
        seconds[index] = [_time(session, feeds, count) for session, count in zip(sessions, passes, strict=True)]
    times = np.quantile(seconds * 1e3, (0.5, 0.1, 0.9), axis=0)
    ratios = np.quantile(seconds / seconds[:, :1], (0.5, 0.1, 0.9), axis=0)
    return tuple(Latency(*map(float, row)) for row in np.concatenate([times, ratios]).T)


def profile(model: Model, feed: Feed, threads: int = 1) -> tuple[tuple[str, float], ...]:
    """Milliseconds per run by the type of the executed operators, the costliest first; the first run is not counted."""
    with scratch.folder() as folder:
        options = _options(threads, faithful=False)
        options.enable_profiling = True
        options.profile_file_prefix = str(folder / "profile")
        session = Session(model, options=options)
        for _ in range(_PROFILED_RUNS + 1):
            session.run(feed)
        events = json.loads(Path(session.native.end_profiling()).read_text(encoding="utf-8"))
    counted = min(e["ts"] + e["dur"] for e in events if e["name"] == "model_run")
    total: dict[str, float] = defaultdict(float)
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time") and event["ts"] >= counted:
            total[event["args"]["op_name"]] += event["dur"] / 1e3 / _PROFILED_RUNS
    return tuple(sorted(total.items(), key=lambda item: (-item[1], item[0])))


def _options(threads: int, *, optimize: bool = True, faithful: bool = True) -> ort.SessionOptions:
    levels = ort.GraphOptimizationLevel
    options = ort.SessionOptions()
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads or _threads.get()
    options.inter_op_num_threads = 1
    options.use_deterministic_compute = True
    if faithful:
        options.add_session_config_entry("session.qdqisint8allowed", "1")
        options.add_session_config_entry("optimization.disable_specified_optimizers", "WeightBiasQuantization")
        # A weight in front of float is dequantized as it is written, where activations would get 8 bits here.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    # Errors are raised as well, and the warnings are about files that we write on purpose.
    options.log_severity_level = _FATAL
    return options


def _ports(nodes: Sequence[ort.NodeArg]) -> tuple[tuple[str, TensorType], ...]:
    return tuple((node.name, TensorType(element_type(node.type), tuple(node.shape))) for node in nodes)


def _sentence(error: BaseException) -> str:
    """The runtime's message in one line, without its error codes and source positions."""
    text = str(error).split("[ONNXRuntimeError] : ")[-1]
    text = re.sub(r"^\d+ : [A-Z_]+ : ", "", text)
    text = re.sub(r"\S+\.(cc|cpp|h):\d+\s+(onnxruntime::\S+\([^)]*\)\s*)?", "", text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    count = 2 if lines and lines[0].endswith("indices") else 1
    return f"{': '.join(lines[:count]).rstrip('.')}."


def _time(session: Session, feeds: Sequence[Feed], passes: int) -> float:
    """Seconds per run over `passes` passes through the feeds."""
    start = time.perf_counter()
    for _ in range(passes):
        for feed in feeds:
            session.run(feed)
    return (time.perf_counter() - start) / (passes * len(feeds))
