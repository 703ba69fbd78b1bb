"""Our engine, measured like the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from guard_policies.assessment import Direction
from guard_service.cli.peers import Answer, PeerUnavailable, Question
from guard_service.config import Settings
from guard_service.engines import Assessed, open_engine
from guard_service.prompt import Prompt


class Ours:
    """A model in the engine that serves it; the self-test is part of its start.

    `dtype` is of a checkpoint in torch, which runs on the CPU, as its peers do.
    """

    def __init__(self, model: Path, threads: int, dtype: str = "auto") -> None:
        start = time.perf_counter()
        settings = Settings()
        self._engine = open_engine(
            str(model),
            threads,
            plan=settings.kernel_plan,
            prepared=settings.prepared_folder,
            device="auto" if dtype == "auto" else "cpu",
            dtype=dtype,
        )
        self.load_s = time.perf_counter() - start
        self._engine.self_test()

    def verdict(self, question: Question, decode: int) -> Answer:
        """One pass gives every score, so `decode` changes nothing."""
        (found,) = self._engine.assess([_prompt(question)])
        return Answer(found.computed_tokens)

    def stream(self, questions: Sequence[Question]) -> dict[str, Any]:
        """A growing reply: each question as the next check of one session, and scanned anew.

        Seconds and computed tokens of both ways, and how far their P(unsafe) are apart at most.
        """
        session = self._engine.session()
        if session is None:
            raise PeerUnavailable("this engine has no sessions")
        self._engine.assess([_prompt(questions[0])])  # the prefix is there before
        grown, anew, apart = _Ran(), _Ran(), 0.0
        for question in questions:
            first = grown.timed(session.assess, _prompt(question))
            second = anew.timed(self._engine.assess, _prompt(question))
            scores = [one.assessment.unsafe_score for one in (first, second)]
            apart = max(apart, abs(scores[0] - scores[1]))
        session.close()
        return {
            "seconds": grown.seconds,
            "tokens": grown.tokens,
            "rescan_seconds": anew.seconds,
            "rescan_tokens": anew.tokens,
            "score_difference": apart,
        }


class _Ran:
    def __init__(self) -> None:
        self.seconds, self.tokens = 0.0, 0

    def timed(
        self, judge: Callable[[Sequence[Prompt]], list[Assessed]], prompt: Prompt
    ) -> Assessed:
        start = time.perf_counter()
        (found,) = judge([prompt])
        self.seconds += time.perf_counter() - start
        self.tokens += found.computed_tokens
        return found


def _prompt(question: Question) -> Prompt:
    way = Direction.RESPONSE if question.of_response else Direction.PROMPT
    return Prompt(
        way, question.prefix, question.body, question.closing, categories=question.categories
    )
