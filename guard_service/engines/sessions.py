"""Sessions over snapshots: the state of a growing conversation, while there is room for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from guard_service.engines import Assessed
from guard_service.engines.snapshots import Snapshot, Snapshots, ids_of
from guard_service.prompt import Prompt

Grow = Callable[[Prompt, Snapshot | None], tuple[Assessed, Snapshot]]


class SnapshotSession:
    """A Session whose state is one snapshot, kept among those of other sessions under its own name.

    `grow` scores a prompt by what a snapshot holds of it, and gives the state behind its body: what
    stands between the body and the verdict is a branch that is never kept. The pool bounds all
    sessions together; the one that was unused for longest makes room and pays by computing anew.
    """

    def __init__(self, pool: Snapshots[Snapshot], grow: Grow) -> None:
        self._pool = pool
        self._grow = grow
        self._closed = False

    def assess(self, prompts: Sequence[Prompt]) -> list[Assessed]:
        """One result per prompt, in order; the state of the last one stays."""
        return [self._assess(prompt) for prompt in prompts]

    def held(self, prompt: Prompt) -> int:
        """Tokens of the body whose keys and values are there."""
        state = self._pool.get(self)
        shared = state.shared(ids_of(prompt)) if state is not None else 0
        return max(shared - len(prompt.prefix), 0)

    def close(self) -> None:
        """Drop the state, now and after a run in progress."""
        self._closed = True
        self._pool.drop(self)

    def _assess(self, prompt: Prompt) -> Assessed:
        assessed, state = self._grow(prompt, self._pool.get(self))
        self._pool.put(self, state)
        if self._closed:  # it may have been closed since the run began
            self._pool.drop(self)
        return assessed
