"""The samples on the workers of a Dask cluster: the only module that imports dask (the extra `cluster`), when it runs.

Samples and live tensors stay where they are, in parts of 2^k neighbouring batches; functions travel, with the piece of the
model that they run, and sums come home. What is added up in which order does not depend on the parts (`samples.combine`), so
the bytes are those of a local run for any number of workers. When a worker dies, Dask computes anew, elsewhere, what it held.

Limits: processors must be of one kind, for others round float sums otherwise. The scheduler keeps the samples and every
stretch of the compressed model, to recompute from. Workers spill to their own disks what exceeds their memory, as Dask does.
"""

import asyncio
import os
import pickle
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

from onnxcomp import __version__, runtime
from onnxcomp.calibrate.samples import Compute, Cut, LiveBatch, Reads, S, Store, combine
from onnxcomp.calibrate.work import Work
from onnxcomp.errors import ResourceError, UsageError

Part = list[LiveBatch]
Future = Any
"""Dask's name of what a worker has, or will have."""
SECONDS = 60
"""That a cluster has to answer, and a worker to come."""


@contextmanager
def connect(where: str) -> Iterator[Any]:
    """The cluster at tcp://HOST:PORT, or `local:N`, processes here. Raises UsageError and ResourceError."""
    local = re.fullmatch(r"local:([1-9]\d*)", where)
    if local is None and not re.match(r"(tcp|tls)://.", where):
        raise UsageError(f"Cluster '{where}' is not understood. Write tcp://HOST:PORT, or local:N for N processes here.")
    try:
        import dask.config
        from distributed import Client, LocalCluster
        from distributed.scheduler import KilledWorker
    except ImportError:
        raise UsageError("--cluster needs Dask. Install it with pip install 'onnxcomp[cluster]'.") from None
    with ExitStack() as running:
        # What travels is known and wanted.
        running.enter_context(dask.config.set({"distributed.admin.large-graph-warning-threshold": "1PB"}))
        address = where
        if local is not None:
            count, cores = int(local[1]), os.cpu_count() or 1
            options = {"threads_per_worker": max(cores // count, 1), "dashboard_address": ":0", "silence_logs": 50}
            address = running.enter_context(LocalCluster(n_workers=count, **options))
        try:
            client: Any = running.enter_context(Client(address, timeout=SECONDS))
            client.wait_for_workers(1, timeout=SECONDS)
            for worker, theirs in client.run(_versions).items():
                if theirs != _versions():
                    raise UsageError(f"Worker {worker} has {theirs}, and here is {_versions()}. Install the same everywhere.")
            yield client
        except (OSError, asyncio.TimeoutError, ImportError, CancelledError, KilledWorker) as error:
            reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            text = f"The cluster {where} cannot go on: {reason}."
            raise ResourceError(f"{text} With --work, what is finished is kept.") from error


class Cluster(Store):
    """The live activations of every sample on the workers of a cluster."""

    def __init__(self, client: Any, feeds: Sequence[runtime.Feed], batchable: bool, size: int, work: Work) -> None:
        super().__init__(feeds, batchable, size, work)
        self._client, self._before = client, 0
        self.traffic: list[tuple[str, int, int]] = []
        """Of every step: its name, the bytes sent from here, and those that workers have sent to one another and home."""
        each = len(self._batches) // max(len(client.scheduler_info(n_workers=-1)["workers"]), 1)
        size, found = 1 << max(each.bit_length() - 1, 0), self._batches
        parts = [[replace(b, live=dict(b.live)) for b in found[start : start + size]] for start in range(0, len(found), size)]
        self._sent = sum(batch.__sizeof__() for part in parts for batch in part)
        self._parts = [client.submit(_same, part, pure=False) for part in parts]
        self._batches = [replace(batch, live=work.room.take({}, batch.live, ())) for batch in found]

    def cut(self, reads: Reads) -> Cut:
        return FarCut(self._batches, reads, self)

    def first(self, fn: Callable[[LiveBatch], S], count: int = 1) -> list[S]:
        parts = self._each(lambda part: pickle.dumps([fn(batch) for batch in part[:count]]), self._parts[:count])
        return [found for part in parts for found in pickle.loads(part.result())][:count]

    def reduce(self, fn: Callable[[LiveBatch], S], reads: Reads) -> S:
        """What `Cut.reduce` does, with the sum of every part made where it lies."""
        sums = self._each(lambda part: pickle.dumps(Cut(part, reads).reduce(fn)), self._parts)
        return pickle.loads(combine(sums, lambda a, b: self._client.submit(_add, a, b, pure=False)).result())

    def finish(self, name: str = "") -> None:
        self._work.finish(None)
        sent = self._client.run(lambda dask_worker: dask_worker.transfer_outgoing_bytes_total, on_error="ignore")
        self.traffic.append((name, self._sent, max(sum(sent.values()) - self._before, 0)))
        self._sent, self._before = 0, sum(sent.values())

    def _move(self, compute: Compute, needed: Collection[str] | None) -> None:
        self._parts = self._each(partial(_moved, compute=compute, needed=needed), self._parts)

    def _each(self, fn: Callable[[Part], Any], parts: Sequence[Future]) -> list[Future]:
        """What `fn` makes of every part: it travels once, and from worker to worker."""
        from cloudpickle import dumps

        data = dumps(partial(_computed, fn, runtime.current_provider()))
        self._sent += len(data)
        given = self._client.submit(_same, data, pure=False)
        return [self._client.submit(_call, given, part, pure=False) for part in parts]


@dataclass(frozen=True)
class FarCut(Cut):
    """The samples at one site, elsewhere."""

    store: Cluster

    def reduce(self, fn: Callable[[LiveBatch], S]) -> S:
        return self.store.reduce(fn, self.reads)


# --- what workers do -------------------------------------------------------------------------------------------------


def _versions() -> str:
    return f"onnxcomp {__version__} and onnxruntime {runtime.version()}"


def _same(value: S) -> S:
    return value


def _add(a: bytes, b: bytes) -> bytes:
    return pickle.dumps(pickle.loads(a) + pickle.loads(b))


_loaded = lru_cache(maxsize=4)(pickle.loads)
"""What has travelled, so that parts on one worker share its sessions."""


def _call(data: bytes, part: Part) -> Any:
    return _loaded(data)(part)


def _computed(fn: Callable[[Part], S], provider: str, part: Part) -> S:
    from distributed import get_worker

    with runtime.provider(provider), runtime.threads(get_worker().state.nthreads):
        return fn(part)


def _moved(part: Part, compute: Compute, needed: Collection[str] | None) -> Part:
    found = [{**batch.live, **compute(batch.live)} for batch in part]
    kept = [{name: array for name, array in live.items() if needed is None or name in needed} for live in found]
    return [replace(batch, live=live) for batch, live in zip(part, kept, strict=True)]
