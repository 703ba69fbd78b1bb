"""What the tests show the tiny vision guard, and how they read its verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random

import torch
from PIL.Image import Image

from guard_api.v1 import guard_pb2, verdict_pb2
from tests.service.asking import asked, message
from tests.service.images.drawing import encoded
from tests.service.torch.reference import loaded
from tests.vision_guard.drawings import LOOKING, MAKING, Row, code_of, draw
from tests.vision_guard.learning import Lessons, logits_of, tokenizer

LOOK, MAKE = LOOKING[0], MAKING[0]
_SURE = 0.7


class Examples:
    """Drawings that transformers' own run of the checkpoint judges right and is sure of.

    Whoever reads one otherwise on the way through the service has a defect.
    """

    def __init__(self, folder: Path) -> None:
        self._model = loaded(folder)
        self._lessons = Lessons(tokenizer())

    def of(
        self, kind: str, count: int, seed: int = 100, ground: tuple[int, ...] | None = None
    ) -> list[Image]:
        """So many of a kind; on a ground of that colour, if any, in ink that shows on it."""
        random = Random(seed)
        drawn = [draw(kind, random, ground) for _ in range(4 * count + 20)]
        said = [LOOK] * len(drawn), [MAKE] * len(drawn)
        sure = zip(*(self._right(kind, drawn, texts) for texts in said), strict=True)
        found = [one for one, right in zip(drawn, sure, strict=True) if min(right) > _SURE]
        assert len(found) >= count, f"the guard is sure of {len(found)} of {len(drawn)} {kind}s"
        return found[:count]

    def _right(self, kind: str, drawn: Sequence[Image], texts: Sequence[str]) -> list[float]:
        """The probability of the right answer, of the first word and of the code."""
        rows = [
            Row((("user", text),), picture, kind, code_of(kind, text in MAKING))
            for picture, text in zip(drawn, texts, strict=True)
        ]
        lessons = [self._lessons.lesson(row) for row in rows]
        verdict = self._lessons.verdict
        with torch.inference_mode():
            logits = logits_of(self._model, lessons)
        said = logits[:, 0, [verdict.safe, verdict.unsafe]].softmax(1)
        codes = logits[:, 1].softmax(1)
        return [
            float(said[at, 1] * codes[at, one.code] if one.unsafe else said[at, 0])
            for at, one in enumerate(lessons)
        ]


def shown(
    *pictures: Image | bytes, said: str = LOOK, no_cache: bool = False
) -> guard_pb2.ClassifyRequest:
    """A question beside pictures, given as PNG unless they are files already."""
    turn = message(said)
    for picture in pictures:
        data = picture if isinstance(picture, bytes) else encoded(picture)
        turn.parts.add(image=guard_pb2.Image(data=data))
    return asked(turn, no_cache=no_cache)


def code_in(verdict: verdict_pb2.Verdict) -> str:
    """The code that a verdict blocks for; empty where it allows."""
    fired = [one.code for one in verdict.categories if one.fired]
    assert (verdict.action == verdict_pb2.ACTION_BLOCK) == bool(fired)
    return ",".join(fired)
