"""What a model wrote, read strictly: safe, or unsafe with the categories it names."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

# "safe", or "unsafe" and a line of codes; the model may write the two newlines of the prompt's
# end first, and a space or a newline behind a comma.
_ANSWER = re.compile(r"\n{0,2}(?:safe|unsafe\n(S[1-9][0-9]?(?:,[ \n]?S[1-9][0-9]?)*))\n?", re.ASCII)


class MalformedAnswer(ValueError):
    """The model's words are no verdict, so the conversation is not judged. Names no content."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A model's verdict in its own words."""

    unsafe: bool
    codes: tuple[str, ...]  # in the order written; empty if and only if safe


def parse_answer(text: str, codes: Collection[str]) -> Answer:
    """Read what follows the assistant's header, without its end-of-turn token.

    Raises MalformedAnswer for anything but a verdict over `codes`, each named once.
    """
    match = _ANSWER.fullmatch(text)
    if match is None:
        raise MalformedAnswer("the model's answer is not a verdict")
    named = tuple(re.split(r",[ \n]?", match[1])) if match[1] else ()
    if len(set(named)) != len(named) or not set(named) <= set(codes):
        raise MalformedAnswer("the model's answer names a category twice, or one it was not given")
    return Answer(bool(named), named)
