"""The second guard of a cascade: asked within its share of the time, let be while it is away."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from guard_policies.schema import Policy
from guard_service.conversation import Conversation
from guard_service.engines import ModelCard
from guard_service.errors import DeadlineExceeded, GuardServiceError, NotReady, ShuttingDown
from guard_service.metrics import CascadeMetrics
from guard_service.moderation import Judgement
from guard_service.tracing import step

SHARE = 0.8  # of the time that is left; the rest is for what the policy wants without an answer
FAILURES = 5  # in a row, until the guard is not asked any more
SHUT_S = 5.0  # until it is tried again


class Guard(Protocol):
    """A guard that can be a cascade's second: a Moderator, or a guard of another server."""

    @property
    def card(self) -> ModelCard | None:
        """Its model; None where that is another server's affair."""
        ...

    async def cards(self) -> Sequence[ModelCard]:
        """Its models, as far as it can tell now."""
        ...

    async def judge(
        self,
        conversation: Conversation,
        policy: Policy,
        language: str,
        timeout_s: float,
        no_cache: bool = False,
    ) -> Judgement:
        """Judge the last turn. Raises GuardServiceError when there is no verdict."""
        ...


class SecondGuard:
    """Asks a guard, and after FAILURES questions in a row without an answer lets it be for SHUT_S.

    Only a guard that is away, or does not answer in the time that the policy gives, counts as
    failing. Errors that it answers with may depend on what it was asked and count as answers; an
    answer that is late by a caller's own short deadline says nothing.
    """

    def __init__(
        self,
        guard: Guard,
        metrics: CascadeMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._guard = guard
        self.metrics = metrics
        self._clock = clock
        self._failed = 0
        self._shut_until = 0.0
        metrics.second_answers.set_function(lambda: float(self._failed < FAILURES))

    @property
    def card(self) -> ModelCard | None:
        """The guard's model, where it is in this process."""
        return self._guard.card

    async def cards(self) -> Sequence[ModelCard]:
        """The guard's models, as far as it can tell now."""
        return await self._guard.cards()

    async def judge(
        self,
        conversation: Conversation,
        policy: Policy,
        language: str,
        left_s: float,
        no_cache: bool = False,
    ) -> Judgement:
        """Judge the last turn as the second guard of the policy's cascade, which it must have.

        `left_s` is what is left of the call's time. Raises GuardServiceError without a verdict.
        """
        assert policy.cascade is not None
        limit_s = min(policy.cascade.timeout_s, SHARE * left_s)
        try:
            self._enter()
            judgement = await self._ask(conversation, policy, language, limit_s, no_cache)
        except GuardServiceError as error:
            self.metrics.second_unable.labels(error.reason).inc()
            raise
        return judgement

    async def _ask(
        self,
        conversation: Conversation,
        policy: Policy,
        language: str,
        limit_s: float,
        no_cache: bool,
    ) -> Judgement:
        assert policy.cascade is not None
        began = self._clock()
        try:
            with step("guard.second"):
                judgement = await self._guard.judge(
                    conversation, policy, language, limit_s, no_cache
                )
        except (NotReady, ShuttingDown):
            self._did_not_answer()
            raise
        except DeadlineExceeded:
            if limit_s >= policy.cascade.timeout_s:
                self._did_not_answer()
            raise
        except GuardServiceError:
            self._failed = 0
            raise
        finally:
            self.metrics.second_seconds.observe(self._clock() - began)
        self._failed = 0
        return judgement

    def _enter(self) -> None:
        """Raise NotReady while the guard is let be; after that, one call at a time tries."""
        if self._failed < FAILURES:
            return
        if self._clock() < self._shut_until:
            raise NotReady("the second guard has not answered lately and was not asked")
        self._shut_until = self._clock() + SHUT_S

    def _did_not_answer(self) -> None:
        self._failed += 1
        self._shut_until = self._clock() + SHUT_S
