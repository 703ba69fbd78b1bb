"""A model's answer is a verdict in the exact form, or an error."""

from __future__ import annotations

import pytest

from guard_service.parse import Answer, MalformedAnswer, parse_answer

_CODES = [f"S{number}" for number in range(1, 14)]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("safe", Answer(False, ())),
        ("\n\nsafe", Answer(False, ())),
        ("safe\n", Answer(False, ())),
        ("unsafe\nS1", Answer(True, ("S1",))),
        ("\n\nunsafe\nS10", Answer(True, ("S10",))),
        ("unsafe\nS2,S10,S13", Answer(True, ("S2", "S10", "S13"))),
        ("unsafe\nS3, S1", Answer(True, ("S3", "S1"))),
        ("unsafe\nS1,\nS3", Answer(True, ("S1", "S3"))),
    ],
)
def test_a_verdict_is_read(text: str, answer: Answer) -> None:
    assert parse_answer(text, _CODES) == answer


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n\n",
        "Safe",
        "safe.",
        " safe",
        "safe\nS1",
        "safe\n\nunsafe\nS1",
        "unsafe",
        "unsafe\n",
        "unsafe S1",
        "unsafe\nS1,",
        "unsafe\nS1 S2",
        "unsafe\nS1,  S2",
        "unsafe\nS1,S1",
        "unsafe\nS14",
        "unsafe\nS0",
        "unsafe\nS01",
        "unsafe\nS١",
        "unsafe\nHate",
        "I cannot judge this.",
        "safe" * 10_000,
    ],
)
def test_anything_else_is_an_error_and_never_safe(text: str) -> None:
    with pytest.raises(MalformedAnswer) as caught:
        parse_answer(text, _CODES)
    assert text == "" or text not in str(caught.value)
