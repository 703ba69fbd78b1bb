"""Rows as a Llama Guard is asked about them: which categories are listed, in which order.

A guard that takes categories must read the list in front of it: they are shuffled and renumbered,
and some are left out; when it is the violated ones, the answer is safe (Llama Guard, Inan et al.,
2023, section 3; the model cards of Llama Guard 3 do the same).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from guard_policies.taxonomy import Category
from guard_quantization.data import Row


@dataclass(frozen=True, slots=True)
class Asked:
    """A row, the categories listed for it, and the right answer to that."""

    row: Row
    weight: float
    categories: tuple[Category, ...]
    unsafe: bool
    violated: tuple[str, ...]  # codes as listed; empty when safe, or unsafe without a known code


@dataclass(frozen=True, slots=True)
class Draw:
    """How lists are drawn: the chance that one is shuffled and renumbered, and is shortened."""

    shuffle: float = 0.0
    drop: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.shuffle <= 1 and 0 <= self.drop <= 1):
            raise ValueError("shuffle and drop are chances between 0 and 1")


def asked(
    row: Row, weight: float, known: Sequence[Category], draw: Draw, rng: random.Random
) -> Asked:
    """The row with a list of the `known` categories.

    A row whose category is not known keeps the whole list: nobody can say whether it is left out.
    A row of a category that the guard does not know is asked with the whole list and is safe to it.
    """
    codes = [category.code for category in known]
    violated = set(row.categories or ()) if row.unsafe else set()
    kept = list(codes)
    if rng.random() < draw.drop and not (row.unsafe and row.categories is None):
        kept = _shortened(codes, violated, rng)
    if shuffled := rng.random() < draw.shuffle:
        rng.shuffle(kept)
    by_code = {category.code: category for category in known}
    listed, answer = [], []
    for number, code in enumerate(kept, 1):
        category = by_code[code]
        listed.append(replace(category, code=f"S{number}") if shuffled else category)
        if code in violated:
            answer.append(listed[-1].code)
    unsafe = row.unsafe and (row.categories is None or bool(answer))
    return Asked(row, weight, tuple(listed), unsafe, tuple(answer))


def _shortened(codes: Sequence[str], violated: set[str], rng: random.Random) -> list[str]:
    """Half the time without the violated categories, otherwise without some of the others."""
    others = [code for code in codes if code not in violated]
    if violated and others and rng.random() < 0.5:
        return others
    gone = set(rng.sample(others, rng.randint(0, max(0, len(others) - 1))))
    return [code for code in codes if code not in gone]
