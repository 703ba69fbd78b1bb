"""Fair shares of the queue before the engine: no tenant waits for another's flood."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar


class Waiting(Protocol):
    """A prompt in the queue: whose it is, and what it costs."""

    @property
    def whose(self) -> str: ...
    @property
    def tokens(self) -> int: ...


Job = TypeVar("Job", bound=Waiting)


class Shares:
    """Who waits with how much, and whose turn it is: who was served the least of those who wait.

    (Start-time fair queueing.) Who comes back after a pause begins where the others are: a pause
    earns nothing. Not for several threads at once.
    """

    def __init__(self) -> None:
        self._held: Counter[str] = Counter()  # tokens that wait, by owner
        self._served: dict[str, float] = {}  # tokens; of who was served more than `_least`
        self._least = 0.0

    def join(self, jobs: Iterable[Waiting]) -> None:
        """They wait from now on."""
        for job in jobs:
            self._held[job.whose] += job.tokens

    def leave(self, job: Waiting) -> None:
        """It does not wait any more."""
        self._held[job.whose] -= job.tokens
        if not self._held[job.whose]:
            del self._held[job.whose]

    def ahead(self, whose: str) -> int:
        """Tokens that are run, at most, before what someone adds now: as much of each of the
        others as of his own."""
        own = self._held[whose]
        others = (min(much, own) for who, much in self._held.items() if who != whose)
        return own + sum(others)

    def giving_way(
        self, queue: Iterable[Job], whose: str, tokens: int, over_items: int, over_tokens: int
    ) -> list[Job] | None:
        """What leaves a full queue for someone who has less of it: the newest of who has more.

        `queue` begins with the newest; `tokens` is what is to be added, the others by how much it
        is too much then. Nobody is left with less than who comes would have. None where there is
        no room to be made that way.
        """
        wanted, leaving = self._held[whose] + tokens, list[Job]()
        held = {who: much for who, much in self._held.items() if who != whose and much > wanted}
        for job in queue if held else ():
            if over_items <= 0 and over_tokens <= 0:
                break
            if held.get(job.whose, 0) - job.tokens >= wanted:
                leaving.append(job)
                held[job.whose] -= job.tokens
                over_items, over_tokens = over_items - 1, over_tokens - job.tokens
        return leaving if over_items <= 0 and over_tokens <= 0 else None

    def in_turn(self, ready: Sequence[Job]) -> Sequence[Job]:
        """In order of arrival, but that the oldest of whose turn it is comes first."""
        if len(self._held) < 2:
            return ready
        owners = {job.whose for job in ready}
        turn = min(owners, key=self._so_far)
        at = next(at for at, job in enumerate(ready) if job.whose == turn)
        return [ready[at], *ready[:at], *ready[at + 1 :]]

    def serve(self, batch: Sequence[Job]) -> None:
        """Account for what is run."""
        if not batch:
            return
        self._least = max(self._least, self._so_far(batch[0].whose))
        for job in batch:
            self._served[job.whose] = self._so_far(job.whose) + job.tokens
        self._served = {who: much for who, much in self._served.items() if much > self._least}

    def _so_far(self, whose: str) -> float:
        return max(self._served.get(whose, 0.0), self._least)
