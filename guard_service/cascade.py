"""One guard, or two: the policy says when the second decides instead of the first."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

from guard_policies.assessment import Action
from guard_policies.cascade import Why, sent_up
from guard_policies.schema import Cascade as Terms
from guard_policies.schema import Policy, WhenUnable
from guard_service.conversation import Conversation, Image
from guard_service.engines import ModelCard
from guard_service.errors import (
    GuardServiceError,
    InvalidRequest,
    Overloaded,
    PolicyNotSupported,
    SecondUnable,
    UnknownPolicy,
    Unscannable,
)
from guard_service.growing import Growing
from guard_service.live.candidates import Candidates
from guard_service.matching import unsupported
from guard_service.metrics import Metrics
from guard_service.moderation import Judgement, Moderator, direction_of, for_policy
from guard_service.second import SecondGuard
from guard_service.tracing import step
from guard_service.tracing.noted import noted

FIRST, SECOND = "first", "second"


class Cascade:
    """Judges with the first guard, and with the second where a policy's `cascade` says so.

    For one event loop. What it answers is what is counted, whoever said it.
    """

    def __init__(
        self,
        first: Moderator,
        second: SecondGuard | None,
        metrics: Metrics,
        policies: Mapping[str, Policy],
        default_policy: str,
        candidates: Candidates | None = None,
    ) -> None:
        """`default_policy` is the name that an empty one means. Without `candidates` nothing is
        compared."""
        self.candidates = candidates
        self._first = first
        self._second = second
        self._metrics = metrics
        self.policies = policies
        self.default_policy = default_policy
        # What the second said last of a growing reply, which is asked for again when it ends.
        self._said: WeakKeyDictionary[Growing, Judgement] = WeakKeyDictionary()

    @property
    def card(self) -> ModelCard:
        """The first guard's model."""
        return self._first.card

    async def cards(self) -> Sequence[ModelCard]:
        """The first guard's model, and the second's as far as it can tell now."""
        others = await self._second.cards() if self._second else ()
        return (*await self._first.cards(), *others)

    def policy(self, name: str, as_second: bool = False) -> Policy:
        """The policy of that name, the default one for an empty name.

        `as_second`: as the second guard of its cascade serves it. Raises UnknownPolicy, and
        PolicyNotSupported when the models cannot serve it.
        """
        policy = self.policies.get(name or self.default_policy)
        if policy is None:
            raise UnknownPolicy
        if as_second:
            policy = policy.as_second()
        problem = unsupported(policy, self._first.card)
        if not problem and policy.cascade is not None:
            problem = self._unserved(policy)
        if problem:
            raise for_policy(PolicyNotSupported(problem), policy, None)
        return policy

    def growing(self) -> Growing:
        """For a conversation that is judged again and again while it grows; to be closed."""
        return self._first.growing()

    async def judge(
        self,
        conversation: Conversation,
        policy: Policy,
        language: str,
        timeout_s: float,
        no_cache: bool = False,
        growing: Growing | None = None,
    ) -> Judgement:
        """Judge the last turn. Raises GuardServiceError when there is no verdict.

        A candidate for the policy's place decides its share of conversations. The second guard has
        no state of a growing conversation and reads it whole.
        """
        if self.candidates is not None:
            policy = self.candidates.chosen(policy, conversation)
        asked = _Asked(
            conversation, policy, language, no_cache, growing, time.perf_counter() + timeout_s
        )
        try:
            with step("guard.judge") as spot:
                judgement = await self._judged(asked)
                if spot is not None:
                    spot.note(**noted(judgement))
        except GuardServiceError as error:
            self._metrics.errors.labels(error.reason).inc()
            raise
        self._count(judgement)
        if self.candidates is not None:
            self.candidates.compare(judgement, language)
        return judgement

    def compared(self, policy: Policy) -> Mapping[tuple[Action | None, Action | None], int]:
        """How often the policy whose place this one may take wished what, and this one."""
        return self.candidates.tally(policy) if self.candidates is not None else {}

    async def _judged(self, asked: _Asked) -> Judgement:
        policy, terms = asked.policy, asked.policy.cascade
        if terms is None:
            return await self._by_first(asked)
        if self._second is None:
            raise PolicyNotSupported(self._unserved(policy))
        if not policy.judged(direction_of(asked.conversation)):
            return _told(await self._by_first(asked), FIRST, Why.POLICY_IS_OFF)
        began = time.perf_counter()
        judgement = await self._by_either(asked, terms, self._second)
        return replace(judgement, total_s=time.perf_counter() - began)

    async def _by_either(self, asked: _Asked, terms: Terms, guard: SecondGuard) -> Judgement:
        first = None
        why = Why.IMAGE if terms.images and _has_image(asked.conversation) else None
        if why is None:
            first = await self._by_first(asked)
            why = sent_up(terms, first.found, first.built.direction)
            if why is None:
                return _told(first, FIRST, Why.OUTSIDE_BAND)
        try:
            second = await self._by_second(asked, guard)
        except InvalidRequest as error:  # which no other guard makes a better one
            raise for_policy(error, asked.policy, direction_of(asked.conversation)) from None
        except GuardServiceError as error:
            unable = _unable(error)
            for_policy(unable, asked.policy, direction_of(asked.conversation))
            if terms.when_unable is WhenUnable.ERROR:
                raise unable from None
            first = first or await self._instead(asked, unable)
            return _told(first, FIRST, Why.SECOND_UNABLE)
        return _told(_with_cost(second, first) if first else second, SECOND, why)

    async def _by_first(self, asked: _Asked) -> Judgement:
        return await self._first.judge(
            asked.conversation,
            asked.policy,
            asked.language,
            asked.until - time.perf_counter(),
            asked.no_cache,
            asked.growing,
        )

    async def _by_second(self, asked: _Asked, guard: SecondGuard) -> Judgement:
        said = self._said.get(asked.growing) if asked.growing else None
        if said is not None and said.conversation == asked.conversation:
            return _again(said)
        left_s = asked.until - time.perf_counter()
        judgement = await guard.judge(
            asked.conversation, asked.policy, asked.language, left_s, asked.no_cache
        )
        if asked.growing is not None:
            self._said[asked.growing] = judgement
        return judgement

    async def _instead(self, asked: _Asked, error: GuardServiceError) -> Judgement:
        """The first guard on an image, without the second. Raises `error` where it sees none."""
        try:
            return await self._by_first(asked)
        except Unscannable:
            raise error from None

    def _unserved(self, policy: Policy) -> str:
        """Why the cascade of a policy cannot be served here; empty when it can."""
        if self._second is None:
            return (
                f"policy {policy.name} has a cascade and this server no second guard; "
                "give it one with --second-model or --second-guard"
            )
        card = self._second.card
        return unsupported(policy.as_second(), card) if card is not None else ""

    def _count(self, judgement: Judgement) -> None:
        metrics, decision = self._metrics, judgement.decision
        direction = judgement.built.direction.value
        name = judgement.policy.name
        metrics.verdicts.labels(decision.action.value, direction, name).inc()
        if decision.shadow_action is not None:
            metrics.shadow_verdicts.labels(decision.shadow_action.value, name).inc()
        for outcome in decision.outcomes:
            if outcome.fired:
                metrics.fired.labels(outcome.category.code, direction).inc()
        if self._second is not None and judgement.tier:
            self._second.metrics.tiers.labels(judgement.tier, judgement.tier_reason).inc()


@dataclass(frozen=True, slots=True)
class _Asked:
    """One question, and until when (by `time.perf_counter`) it is to be answered."""

    conversation: Conversation
    policy: Policy
    language: str
    no_cache: bool
    growing: Growing | None
    until: float


def _unable(error: GuardServiceError) -> GuardServiceError:
    """What callers are told; an overload and an image that cannot be read are what they are."""
    if isinstance(error, Overloaded | Unscannable):
        return error
    return SecondUnable(f"the second guard could not judge ({error.reason}): {error}")


def _has_image(conversation: Conversation) -> bool:
    parts = (part for message in conversation.messages for part in message.parts)
    return any(isinstance(part, Image) for part in parts)


def _told(judgement: Judgement, tier: str, why: Why) -> Judgement:
    return replace(judgement, tier=tier, tier_reason=why.value)


def _with_cost(judgement: Judgement, other: Judgement) -> Judgement:
    """A verdict with what another cost on the way to it."""
    return replace(
        judgement,
        tokenize_s=judgement.tokenize_s + other.tokenize_s,
        queue_s=judgement.queue_s + other.queue_s,
        inference_s=judgement.inference_s + other.inference_s,
        computed_tokens=judgement.computed_tokens + other.computed_tokens,
        cached_tokens=judgement.cached_tokens + other.cached_tokens,
        images_s=judgement.images_s + other.images_s,
    )


def _again(judgement: Judgement) -> Judgement:
    """The same verdict, which this time costs nothing."""
    return replace(
        judgement,
        id=uuid.uuid4().hex,
        from_cache=True,
        tokenize_s=0.0,
        queue_s=0.0,
        inference_s=0.0,
        images_s=0.0,
        computed_tokens=0,
        cached_tokens=0,
    )
