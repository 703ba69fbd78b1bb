"""Two guards of known behaviour: what each finds in a text stands in the text."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from guard_api.v1 import guard_pb2
from guard_policies.assessment import Assessment
from guard_service.engines import Assessed
from guard_service.engines.fake import CODES, FakeEngine
from guard_service.prompt import Prompt
from tests.service.images.drawing import drawn

SMALL, LARGE = "small", "large"


def says(small: float, large: float, small_code: str = "S1", large_code: str = "S1") -> str:
    """A text of which each guard finds P(unsafe), all of it in one category."""
    return f"{SMALL}={small}/{small_code} {LARGE}={large}/{large_code}"


class Told(FakeEngine):
    """Finds what the text says of it; without a word of it nothing. `gate` holds its runs back."""

    def __init__(self, name: str, **more: Any) -> None:
        super().__init__(**more)
        self.card = replace(self.card, name=name, digest=f"sha256:{name}")
        self.gate = threading.Event()
        self.gate.set()
        self.before_run = self._wait

    def saw(self, text: str) -> int:
        """In how many prompts a text was."""
        return sum(text in prompt for batch in self.batches for prompt in batch)

    def _wait(self, texts: Sequence[str]) -> None:
        self.gate.wait(20)

    def _assessed(self, prompt: Prompt, text: str) -> Assessed:
        found = re.findall(rf"{self.card.name}=([0-9.e-]+)/(S\d+)", text)
        score, code = (float(found[-1][0]), found[-1][1]) if found else (0.0, "S1")
        scores = dict.fromkeys(CODES, 0.0) | {code: score}
        return Assessed(Assessment(score, scores), len(prompt.body), 0)


def with_picture(text: str) -> guard_pb2.Message:
    """The user's text and a picture."""
    picture = guard_pb2.Image(data=drawn())
    return guard_pb2.Message(
        role=guard_pb2.ROLE_USER, parts=[guard_pb2.Part(text=text), guard_pb2.Part(image=picture)]
    )
