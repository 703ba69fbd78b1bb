"""What happened, told by those who saw it: one JSON line each, in files that outlive their writers.

A guard writes down what it judged before its answer leaves, the upstream what reached it before it
answers. A line is in the kernel's hands once it is written, so that SIGKILL takes none of it.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

CASE = re.compile(r"\(case (\d+)\)")
ALLOWED = ("allow", "flag")
NOWHERE = 0  # the case of a text that names none


@dataclass(frozen=True, slots=True)
class Judged:
    """A verdict that a guard gave. `chars` is how much of the reply it covers; 0 on prompts."""

    at: float  # of the clock that all processes of a machine share, in seconds
    case: int
    chars: int
    action: str
    policy: str
    version: str
    policy_digest: str
    model_digest: str
    verdict_id: str = ""


@dataclass(frozen=True, slots=True)
class Arrived:
    """A request that reached the upstream."""

    at: float
    case: int


class Writer:
    """Appends to a journal. Any thread."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def write(self, entry: Judged | Arrived) -> None:
        """One line, at once."""
        os.write(self._file, json.dumps(asdict(entry)).encode() + b"\n")


def now() -> float:
    """The time that journals tell."""
    return time.clock_gettime(time.CLOCK_MONOTONIC)


def case_of(text: str) -> int:
    """The case that a text names."""
    found = CASE.search(text)
    return int(found[1]) if found else NOWHERE


class Journals:
    """What all guards judged and what reached all upstreams, once everything is over."""

    def __init__(self, judged: Iterable[Judged], arrived: Iterable[Arrived]) -> None:
        self.judged = tuple(judged)
        self.arrived = tuple(arrived)
        self._allowed_at: dict[int, float] = {}
        self._covered: dict[int, int] = defaultdict(int)
        for one in self.judged:
            if one.action not in ALLOWED or not one.case:
                continue
            if one.chars:
                self._covered[one.case] = max(self._covered[one.case], one.chars)
            else:
                earlier = self._allowed_at.get(one.case, one.at)
                self._allowed_at[one.case] = min(earlier, one.at)

    @classmethod
    def read(cls, judged: Iterable[Path], arrived: Iterable[Path]) -> Journals:
        """From their files; those that were never begun are empty."""
        return cls(
            (Judged(**line) for path in judged for line in _lines(path)),
            (Arrived(**line) for path in arrived for line in _lines(path)),
        )

    def unscreened(self) -> list[Arrived]:
        """What reached an upstream before any guard had allowed it."""
        return [
            one for one in self.arrived if self._allowed_at.get(one.case, float("inf")) > one.at
        ]

    def covered(self, case: int) -> int:
        """How many characters of the reply to a case verdicts have allowed."""
        return self._covered.get(case, 0)


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_bytes().splitlines()]
