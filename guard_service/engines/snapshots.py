"""Keys and values of prompt prefixes, kept by last use within a bound of bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Past = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The model's state behind a prefix, by the names of the graph's inputs."""

    tokens: int
    past: Past

    @property
    def size(self) -> int:
        """Bytes held."""
        return sum(array.nbytes for array in self.past.values())


class Snapshots:
    """Snapshots by prefix. Safe to share between threads."""

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self._held: OrderedDict[tuple[int, ...], Snapshot] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, prefix: tuple[int, ...]) -> Snapshot | None:
        """The snapshot of this prefix, which becomes the last used; None when there is none."""
        with self._lock:
            found = self._held.get(prefix)
            if found is not None:
                self._held.move_to_end(prefix)
            return found

    def put(self, prefix: tuple[int, ...], snapshot: Snapshot) -> None:
        """Keep a snapshot unless it is too large; the longest unused make room for it."""
        with self._lock:
            known = self._held.pop(prefix, None)
            self._bytes -= known.size if known is not None else 0
            if snapshot.size > self._most:
                return
            self._held[prefix] = snapshot
            self._bytes += snapshot.size
            while self._bytes > self._most:
                _, dropped = self._held.popitem(last=False)
                self._bytes -= dropped.size

    def clear(self) -> None:
        """Drop all."""
        with self._lock:
            self._held.clear()
            self._bytes = 0
