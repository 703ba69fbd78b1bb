"""What was asked and what became of it. Everything that must not happen is kept with its words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, get_args

from tests.chaos.journal import Journals, now

Wrong = Literal[
    "lost",  # a call without an answer or an end within its deadline
    "leaked",  # unsafe text that reached a client
    "unscreened",  # content that reached upstream or client without a verdict that allowed it
    "wrong",  # a verdict, a status or a text that is not the known one
    "unrecorded",  # a verdict that was given and is not in the audit log, or a log that is broken
    "mixed",  # a verdict whose digests do not belong together
    "unexplained",  # no verdict, and nothing had been broken that would explain it
    "grown",  # memory or files of a process beyond the bound
    "tracebacks",  # in the logs of guards and sidecar
]
WRONGS: tuple[Wrong, ...] = get_args(Wrong)
_KEPT = 20  # of each kind, with their words


@dataclass
class Ledger:
    """Counts of one run."""

    asked: Counter[str] = field(default_factory=Counter)  # by kind
    ended: Counter[tuple[str, str]] = field(default_factory=Counter)  # by kind and result
    wrongs: Counter[Wrong] = field(default_factory=Counter)
    told: list[str] = field(default_factory=list)
    verdicts: int = 0
    received: dict[int, int] = field(default_factory=dict)  # characters of replies, by case

    @property
    def requests(self) -> int:
        """So far."""
        return self.asked.total()

    @property
    def well(self) -> bool:
        """Whether nothing happened that must not."""
        return not self.wrongs.total()

    def wrong(self, what: Wrong, words: str) -> None:
        """Something that must not happen did."""
        self.wrongs[what] += 1
        if self.wrongs[what] <= _KEPT:
            self.told.append(f"{what}: {words}")

    def settle(self, journals: Journals, digests: Iterable[tuple[str, str, str]]) -> None:
        """Hold the guards' and the upstreams' journals against what clients got; `digests` are the
        policies that were written: name, version, digest."""
        for one in journals.unscreened():
            self.wrong("unscreened", f"case {one.case} reached the upstream without a verdict")
        for case, chars in self.received.items():
            if chars > (covered := journals.covered(case)):
                words = f"case {case}: the client got {chars} characters, {covered} were allowed"
                self.wrong("unscreened", words)
        known = set(digests)
        for given in journals.judged:
            if (given.policy, given.version, given.policy_digest) not in known:
                self.wrong("mixed", f"{given.policy} {given.version} has another's digest")


@dataclass
class Faults:
    """When what was broken, on purpose, by name; times of `journal.now`."""

    grace_s: float  # callers need a while to find out that something is back
    counts: Counter[str] = field(default_factory=Counter)
    _spans: dict[str, list[list[float]]] = field(default_factory=dict)

    def begin(self, name: str) -> None:
        """It is broken from now on."""
        self._spans.setdefault(name, []).append([now(), float("inf")])

    def end(self, name: str) -> None:
        """It is whole again."""
        self._spans[name][-1][1] = now() + self.grace_s

    def explain_all(self, names: Iterable[str], since: float) -> bool:
        """Whether each of these was broken at some time since then."""
        return all(self.explain((name,), since) for name in names)

    def explain(self, names: Iterable[str], since: float) -> bool:
        """Whether one of these was broken at any time since then."""
        return any(end >= since for name in names for _, end in self._spans.get(name, ()))
