"""Temporary folders. They go with the block that asked for them; those of a process that was killed go with the next process.

A folder holds a file that its process has locked, and that has its name only then. A folder whose lock is free is no one's.

Limits: of this user, in the same `$TMPDIR`. Where there are no such locks (Windows, some network disks) they stay.
"""

import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TextIO

NAME, LOCK = "onnxcomp-scratch-", "lock"


@contextmanager
def folder() -> Iterator[Path]:
    """A new one, in `$TMPDIR`."""
    _sweep(tempfile.gettempdir())
    with ExitStack() as here:
        path = Path(here.enter_context(tempfile.TemporaryDirectory(prefix=NAME, ignore_cleanup_errors=True)))
        with suppress(OSError):
            here.enter_context(lock(path / "new"))
            (path / "new").rename(path / LOCK)
        yield path


def lock(path: Path) -> TextIO:
    """The file, made where it is missing, locked until it is closed. Raises BlockingIOError where another process has it."""
    stream = path.open("a", encoding="utf-8")
    with suppress(ImportError):  # Windows has none
        import fcntl

        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            stream.close()
            raise
    return stream


@functools.cache
def _sweep(place: str) -> None:
    """Remove what killed processes have left, once."""
    for path in Path(place).glob(f"{NAME}*") if hasattr(os, "getuid") else ():
        with suppress(OSError):
            if path.lstat().st_uid == os.getuid() and (path / LOCK).is_file():
                with lock(path / LOCK):
                    shutil.rmtree(path, ignore_errors=True)
