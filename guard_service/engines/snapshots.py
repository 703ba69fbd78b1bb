"""Keys and values of the first tokens of prompts, kept by last use within a bound of bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from guard_service.prompt import IMAGE_TOKEN_ID, Prompt

# Arrays, or tensors of torch, each [1, kv_heads, P, d], by the names that the engine gives them.
Past = Mapping[str, Any]


def ids_of(prompt: Prompt) -> tuple[int, ...]:
    """Prefix and body, where the image's token is the image: states of two images share nothing
    from there on."""
    ids = prompt.prefix + prompt.body
    if prompt.image is None or prompt.image.picture is None:
        return ids
    seen = -int.from_bytes(prompt.image.picture.digest.encode())
    return tuple(seen if token == IMAGE_TOKEN_ID else token for token in ids)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The model's state behind `ids`; never changed.

    `past` holds the first of them, `behind` the others, and may hold more. The two are put together
    when the next run is fed, and not before: a graph takes its past in one piece, so that is the
    one copy that cannot be saved, and it is small beside the run.
    """

    ids: tuple[int, ...]
    past: Past
    behind: Past | None = None

    @property
    def size(self) -> int:
        """Bytes held."""
        return sum(
            array.nbytes for piece in (self.past, self.behind or {}) for array in piece.values()
        )

    def shared(self, ids: tuple[int, ...]) -> int:
        """How many tokens the two have in common, from the first on."""
        pairs = enumerate(zip(self.ids, ids, strict=False))
        return next((at for at, (a, b) in pairs if a != b), min(len(self.ids), len(ids)))

    def first(self, count: int) -> Past:
        """The state behind the first `count` of the ids, in one piece."""
        if self.behind is None and count == len(self.ids):
            return self.past
        found = {}
        for name, array in self.past.items():
            pieces = [array[:, :, :count]]
            if self.behind is not None:
                pieces.append(self.behind[name][:, :, : max(count - array.shape[2], 0)])
            found[name] = self._joined(pieces)
        return found

    @staticmethod
    def _joined(pieces: Sequence[Any]) -> Any:
        return np.concatenate(pieces, axis=2)


class Sized(Protocol):
    """Whatever holds bytes."""

    @property
    def size(self) -> int:
        """Bytes held."""
        ...


Held = TypeVar("Held", bound=Sized)


class Snapshots(Generic[Held]):
    """Snapshots by any name. Safe to share between threads."""

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self._held: OrderedDict[Hashable, Held] = OrderedDict()
        self._bytes = 0
        self._crowded_out = 0
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        """Bytes held, never over the bound."""
        return self._bytes

    @property
    def crowded_out(self) -> int:
        """How many snapshots have been dropped, or were never kept, for want of room."""
        return self._crowded_out

    def get(self, name: Hashable) -> Held | None:
        """The snapshot of this name, which becomes the last used; None when there is none."""
        with self._lock:
            found = self._held.get(name)
            if found is not None:
                self._held.move_to_end(name)
            return found

    def put(self, name: Hashable, snapshot: Held) -> None:
        """Keep a snapshot unless it is too large; the longest unused make room for it."""
        with self._lock:
            self._forget(name)
            if snapshot.size > self._most:
                self._crowded_out += 1
                return
            while self._bytes + snapshot.size > self._most:
                self._forget(next(iter(self._held)))
                self._crowded_out += 1
            self._held[name] = snapshot
            self._bytes += snapshot.size

    def drop(self, name: Hashable) -> None:
        """Keep this one no longer, if it is there."""
        with self._lock:
            self._forget(name)

    def clear(self) -> None:
        """Drop all."""
        with self._lock:
            self._held.clear()
            self._bytes = 0

    def _forget(self, name: Hashable) -> None:
        known = self._held.pop(name, None)
        self._bytes -= known.size if known is not None else 0
