"""What an upstream is to say to one request, which carries it in a header: known beforehand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

HEADER = "x-chaos"
UNSAFE_WORD = "fake-bomb"  # what the fake engine is sure of; see guard_service.engines.fake
_WORDS = ("a", "calm", "and", "moderate", "answer", "of", "a", "model", "that", "goes", "on")
NEVER = -1


@dataclass(frozen=True, slots=True)
class Script:
    """A reply piece by piece, 13 bytes or so each."""

    case: int
    pieces: int
    unsafe_at: int = NEVER  # the piece that is the unsafe word
    dies_at: int = NEVER  # the piece instead of which the connection breaks
    pause_s: float = 0.0  # between pieces
    unsafe_prompt: bool = False  # then it must never get here

    def header(self) -> str:
        """As the request carries it."""
        return json.dumps(asdict(self))

    @classmethod
    def of(cls, header: str) -> Script:
        """From the header of a request."""
        return cls(**json.loads(header))

    def said(self) -> Iterator[str]:
        """The pieces, also those behind the place where it dies."""
        for at in range(self.pieces):
            words = UNSAFE_WORD if at == self.unsafe_at else _WORDS[at % len(_WORDS)]
            yield f"{words} {self.case + at} "

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.said())

    @property
    def unsafe(self) -> bool:
        """Whether the reply is, as a whole."""
        return 0 <= self.unsafe_at < self.pieces
