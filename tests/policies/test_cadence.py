"""When a growing reply is due for a verdict: early at first, then by length or by sentence."""

from __future__ import annotations

import pytest

from guard_policies.cadence import Cadence
from guard_policies.schema import Stream


def checks(stream: Stream, text: str, size: int = 1) -> list[int]:
    """After how many characters verdicts are due, of a text that comes in pieces of a size."""
    cadence, found = Cadence(stream), []
    for at in range(0, len(text), size):
        if cadence.grow(text[at : at + size]):
            found.append(min(at + size, len(text)))
            cadence.judged()
    return found


def test_the_first_verdict_is_early_and_the_others_are_as_often_as_was_set() -> None:
    assert checks(Stream(100, 40), "x" * 350) == [40, 140, 240, 340]
    assert checks(Stream(100, 40), "x" * 350, size=30) == [60, 180, 300]


def test_the_first_is_never_later_than_the_others() -> None:
    assert checks(Stream(20), "x" * 70) == [20, 40, 60]


@pytest.mark.parametrize(
    "end",
    [". ", "! ", "?\n", '." ', ".) ", ".’ ", "… ", "\n", "。", "！", "। ", "؟ ", ".\u00a0"],
)
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_sentences_end_in_many_scripts_however_they_are_cut(end: str, size: int) -> None:
    stream = Stream(1000, 10, sentence_ends=True)
    text = "x" * 30 + end + "y" * 30
    assert checks(stream, "z" * 10 + text, size)[1:] != []
    assert all(at >= 40 for at in checks(stream, "z" * 10 + text, size)[1:])


@pytest.mark.parametrize("text", ["3.14", "e.g.x", "a.b.c", "www.example.org", "...", "x" * 30])
def test_not_every_full_stop_ends_a_sentence(text: str) -> None:
    stream = Stream(1000, 10, sentence_ends=True)
    assert checks(stream, "z" * 10 + text * 3) == [10]


def test_short_sentences_do_not_each_ask_for_a_verdict() -> None:
    found = checks(Stream(1000, 40, sentence_ends=True), "No. " * 50)
    assert found == [40, 80, 120, 160, 200]


def test_sentences_that_do_not_end_are_judged_by_their_length() -> None:
    assert checks(Stream(100, 40, sentence_ends=True), "x" * 250) == [40, 140, 240]


def test_ends_of_sentences_count_only_where_that_was_set() -> None:
    assert checks(Stream(100, 40), "A sentence. " * 20) == [40, 140, 240]
