"""What an engine found, before any policy has spoken, and the words both sides share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


class Direction(Enum):
    """Whether the judged message goes into the wrapped model or comes out of it."""

    PROMPT = "prompt"
    RESPONSE = "response"


class Action(Enum):
    """What is done with a message, from the mildest to the severest."""

    ALLOW = "allow"
    FLAG = "flag"
    BLOCK = "block"

    @property
    def severity(self) -> int:
        """0 for ALLOW, 1 for FLAG, 2 for BLOCK."""
        return ("allow", "flag", "block").index(self.value)


@dataclass(frozen=True, slots=True)
class Assessment:
    """Scores of one conversation (or one window of it).

    `unsafe_score` is P(unsafe) in [0, 1]. `category_scores` maps each code to P(unsafe) times the
    probability that the model names this category first; they sum to at most `unsafe_score`.
    """

    unsafe_score: float
    category_scores: Mapping[str, float]
