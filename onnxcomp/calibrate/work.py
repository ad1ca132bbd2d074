"""A run that goes on where it was stopped: what was found out at every finished step, in a folder.

The walk is a function of what it finds out by looking at samples: ranges, codes, fits. These are kept, one file a step, and
the live tensors at the last cut. A run that is started again goes through the finished steps without looking at any sample,
and then on from that cut, so it ends with the same bytes. A step's file is moved into place in one piece when everything
that it speaks of is on the disk; whatever no such file speaks of is not there for the next run.

Limits: the folder is trusted, for its files are pickled. A step that was not finished is repeated.
"""

import pickle
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from onnxcomp.calibrate.room import Kept, Room, storing
from onnxcomp.graph.files import settle

T = TypeVar("T")


class Work:
    """The finished steps of one run, in the folder of `room`; without one nothing is kept."""

    def __init__(self, room: Room) -> None:
        self.room, self._values = room, list[Any]()
        self.live: Kept | None = None
        """The live tensors at the last cut; None where they are to be computed anew."""
        self.finished = 0
        self._recorded = deque[Any]()
        if room.folder is not None:
            for path in sorted(room.folder.glob("*.step")):
                values, names = pickle.loads(path.read_bytes())
                self.live = names and [(i, {k: room.folder / name for k, name in files.items()}) for i, files in names]
                self._recorded.extend(values)
                self.finished += 1
            room.adopt(self.live or [])
        self._left = self.finished

    @property
    def is_ahead(self) -> bool:
        """Whether the live tensors are those of a later step already."""
        return self._left > 0 and self.live is not None

    def once(self, compute: Callable[[], T]) -> T:
        """What `compute` found out, now or in a run before."""
        if self._left:
            return self._recorded.popleft()
        value = compute()
        if self.room.folder is not None:
            self._values.append(value)
        return value

    def finish(self, live: Kept | None) -> None:
        """Keep what the step found out, and which live tensors are those behind it."""
        if self._left:
            self._left -= 1
        elif self.room.folder is not None:
            with storing(self.room.folder, self.room.advice):
                path = self.room.folder / f"{self.finished:06}.step"
                names = live and [(i, {k: f.name for k, f in files.items() if isinstance(f, Path)}) for i, files in live]
                with path.with_suffix(".new").open("wb") as stream:
                    pickle.dump((self._values, names), stream)
                    settle(stream)
                path.with_suffix(".new").replace(path)
            self.finished, self._values = self.finished + 1, []
            self.room.settle()
