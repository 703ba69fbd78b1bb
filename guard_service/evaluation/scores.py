"""What a guard said of rows, in memory and in the files that `guardctl bulk` and `eval` write."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from guard_policies.taxonomy import LLAMA_GUARD_3
from guard_service.evaluation.figures import Bools, Floats
from guard_service.evaluation.rows import DataError, Labelled, read_lines

CODES = tuple(category.code for category in LLAMA_GUARD_3)
_JUDGE = ("model", "model_digest", "policy", "policy_digest")


@dataclass(frozen=True, slots=True)
class Scores:
    """Of rows, in their order. Rows in `failures` were not judged; their scores mean nothing."""

    unsafe: Floats  # P(unsafe) [rows]
    codes: Floats  # score of each code [rows, codes], on any scale: the highest is the first named
    fired: Bools | None = None  # what the guard itself did [rows]; None: P(unsafe) >= threshold
    columns: tuple[str, ...] = CODES
    failures: Mapping[int, str] = field(default_factory=dict)  # reason by position
    incomplete: int = 0  # rows of which a part was not judged
    judges: tuple[Mapping[str, str], ...] = ()  # model and policy; several in a cascade

    def verdicts(self, threshold: float | None) -> Bools:
        """Whether each row counts as unsafe: by the threshold, or without one by `fired`."""
        if threshold is None and self.fired is not None:
            return self.fired
        return self.unsafe >= (0.5 if threshold is None else threshold)

    def judged(self) -> list[int]:
        """Positions of the rows that were judged."""
        return [at for at in range(len(self.unsafe)) if at not in self.failures]

    def take(self, positions: Sequence[int]) -> Scores:
        """The scores of some rows, in that order; how many were judged in part is not known."""
        chosen = list(positions)
        failed = {at: self.failures[old] for at, old in enumerate(chosen) if old in self.failures}
        fired = None if self.fired is None else self.fired[chosen]
        unsafe, codes = self.unsafe[chosen], self.codes[chosen]
        return Scores(unsafe, codes, fired, self.columns, failed, judges=self.judges)


def read_scores(path: Path, rows: Sequence[Labelled]) -> Scores:
    """The scores in a file that holds one line for each of the rows, in their order.

    Raises DataError when its lines are not those of the rows, or not all are there yet.
    """
    lines: list[dict[str, Any]] = []
    for row, numbered in zip_longest(rows, read_lines(path)):
        if numbered is None:
            found = f"it holds {len(lines)} of {len(rows)} rows"
            raise DataError(f"{path}: {found}; run the same `guardctl eval` again to go on")
        number, raw = numbered
        if row is None:
            raise DataError(f"{path}: it has more lines than there are rows ({len(rows)})")
        lines.append(_line(raw, f"{path}:{number}"))
        if lines[-1].get("id") != row.id:
            raise DataError(f"{path}:{number}: belongs to other rows (the ids differ)")
    return _scores(lines)


def _line(raw: bytes, where: str) -> dict[str, Any]:
    try:
        line = json.loads(raw)
        if not isinstance(line, dict):
            raise TypeError
        if line["error"] is None:
            scores = (line["unsafe_score"], *line["scores"].values())
            if not all(0.0 <= score <= 1.0 for score in scores):
                raise ValueError
            if line["action"] not in ("allow", "flag", "block"):
                raise ValueError
        return line
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DataError(f"{where}: not a line that guardctl wrote") from None


def _scores(lines: Sequence[Mapping[str, Any]]) -> Scores:
    seen = {code for line in lines for code in line.get("scores") or ()}
    columns = (*CODES, *sorted(seen - {*CODES}))
    codes = np.zeros((len(lines), len(columns)))
    unsafe, fired = np.full(len(lines), np.nan), np.zeros(len(lines), bool)
    failures: dict[int, str] = {}
    judges: dict[str, Mapping[str, str]] = {}
    for at, line in enumerate(lines):
        if line["error"] is not None:
            failures[at] = str(line["error"]).partition(":")[0][:64]
            continue
        unsafe[at] = line["unsafe_score"]
        codes[at] = [line["scores"].get(code, 0.0) for code in columns]
        # A shadow policy lets everything pass; what it would have done is what is measured.
        fired[at] = (line.get("shadow_action") or line["action"]) != "allow"
        judge = {key: str(line.get(key, "")) for key in _JUDGE}
        judges[json.dumps(judge)] = judge
    incomplete = sum(line.get("complete") is False for line in lines)
    return Scores(unsafe, codes, fired, columns, failures, incomplete, tuple(judges.values()))
