"""Labelled rows and what a guard said of them, made in view."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from guard_policies.assessment import Direction
from guard_service.evaluation.rows import LabelledRow
from guard_service.evaluation.scores import CODES, Scores


def row(
    number: int,
    unsafe: bool,
    categories: tuple[str, ...] | None = (),
    language: str = "en",
    file: str = "f",
    group: str = "",
    direction: Direction = Direction.PROMPT,
) -> LabelledRow:
    """A row of source "s"."""
    return LabelledRow(f"r{number}", unsafe, categories, language, "s", file, group, direction)


def scores(unsafe: Sequence[float], first: Sequence[str] = ()) -> Scores:
    """Scores; `first` is the code that is named first in each row."""
    codes = np.zeros((len(unsafe), len(CODES)))
    for at, code in enumerate(first):
        codes[at, CODES.index(code)] = unsafe[at]
    return Scores(np.array(unsafe, float), codes)


def noisy(count: int, seed: int = 0, shift: float = 1.5) -> tuple[list[LabelledRow], Scores]:
    """Every other row unsafe, with S1 or S10; scores overlap."""
    rng = np.random.default_rng(seed)
    rows = [
        row(
            n,
            n % 2 == 0,
            (("S1", "S10")[n // 2 % 2],) if n % 2 == 0 else (),
            ("en", "de")[n // 4 % 2],
            ("a", "b")[n // 8 % 2],
        )
        for n in range(count)
    ]
    logits = rng.normal(np.where([one.unsafe for one in rows], shift, -shift), 1.5)
    named = [one.categories[0] if one.categories else "S5" for one in rows]
    return rows, scores(list(1 / (1 + np.exp(-logits))), named)
