"""Lists of categories for training: shuffled, renumbered, shortened, and their answers."""

from __future__ import annotations

import random

import pytest

from guard_policies.taxonomy import LLAMA_GUARD_3
from guard_quantization.checkpoint.asking import Asked, Draw, asked
from guard_quantization.data import Row

KNOWN = LLAMA_GUARD_3[:13]
NAME = {category.code: category.name for category in KNOWN}


def row(unsafe: bool, categories: tuple[str, ...] | None) -> Row:
    return Row("r", (("user", "x"),), unsafe, categories, "en", "s", "f", "train")


def many(made: Row, draw: Draw) -> list[Asked]:
    rng = random.Random(0)
    return [asked(made, 1.0, KNOWN, draw, rng) for _ in range(300)]


def test_without_a_draw_the_list_is_the_guard_s_own() -> None:
    one = asked(row(True, ("S2", "S9")), 0.5, KNOWN, Draw(), random.Random(0))
    assert one.categories == KNOWN and one.unsafe and one.violated == ("S2", "S9")
    assert one.weight == 0.5


def test_a_shuffled_list_is_numbered_from_one_and_the_answer_follows_the_name() -> None:
    found = many(row(True, ("S9",)), Draw(shuffle=1.0))
    for one in found:
        assert [category.code for category in one.categories] == [f"S{n}" for n in range(1, 14)]
        (code,) = one.violated
        named = {category.code: category.name for category in one.categories}
        assert named[code] == NAME["S9"]
    assert len({one.violated for one in found}) == 13


def test_without_the_violated_category_the_row_is_safe() -> None:
    found = many(row(True, ("S9",)), Draw(drop=1.0, shuffle=0.5))
    gone = [one for one in found if NAME["S9"] not in {c.name for c in one.categories}]
    assert 100 < len(gone) < 200
    assert all(not one.unsafe and not one.violated for one in gone)
    assert all(one.unsafe and one.violated for one in found if one not in gone)


def test_of_two_violated_categories_either_both_are_listed_or_none() -> None:
    for one in many(row(True, ("S1", "S9")), Draw(drop=1.0)):
        assert one.violated in ((), ("S1", "S9")) and one.unsafe == bool(one.violated)


def test_a_safe_row_is_asked_with_fewer_categories_but_some() -> None:
    lengths = {len(one.categories) for one in many(row(False, ()), Draw(drop=1.0))}
    assert min(lengths) >= 1 and max(lengths) == 13 and len(lengths) > 8


def test_an_unsafe_row_of_unknown_category_keeps_the_whole_list() -> None:
    for one in many(row(True, None), Draw(drop=1.0, shuffle=1.0)):
        assert len(one.categories) == 13 and one.unsafe and one.violated == ()


def test_a_category_that_the_guard_does_not_know_is_safe_to_it() -> None:
    one = asked(row(True, ("S14",)), 1.0, KNOWN, Draw(), random.Random(0))
    assert not one.unsafe and one.violated == ()


def test_chances_are_checked() -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        Draw(shuffle=1.5)
