"""The one road from a conversation to a verdict."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from guard_policies.assessment import Assessment, Direction
from guard_policies.decide import Decision, decide
from guard_policies.schema import Policy, Unscannable
from guard_policies.taxonomy import LLAMA_GUARD_3
from guard_service.batcher import Batcher, Ran
from guard_service.cache import LruCache, SingleFlight, key_of
from guard_service.conversation import Conversation, Image, Message, Role, Text, ToolCall
from guard_service.engines import Assessed, Engine, ModelCard
from guard_service.errors import (
    ConversationTooLong,
    DeadlineExceeded,
    GuardServiceError,
    InvalidRequest,
    NotAssessed,
)
from guard_service.errors import Unscannable as UnscannableError
from guard_service.growing import Growing
from guard_service.images.reading import ImageReader
from guard_service.matching import asked_of, unknown_to
from guard_service.metrics import EngineMetrics
from guard_service.prompt import BuiltPrompt, InvalidConversation
from guard_service.security.whose import WHOSE
from guard_service.tracing import exemplar, step

LOG = logging.getLogger(__name__)
LANGUAGE_TAG = re.compile(r"[A-Za-z]{1,8}(-[A-Za-z0-9]{1,8}){0,7}")
INLINE_CHARS = 2_000  # a text this short is tokenized faster than a thread is woken for it
WARM_UP_S = 60.0
POLICY_IS_OFF = "POLICY_IS_OFF"  # why a part was not judged
BUILDERS = 2  # threads that assemble longer prompts


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a conversation is held to."""

    conversation_tokens: int
    conversation_chars: int
    prompts: int = 1_024  # each window beside each view of each image is one


@dataclass(frozen=True, slots=True)
class Judgement:
    """A verdict and all that is told about it. Times are in seconds."""

    id: str
    decision: Decision
    policy: Policy
    model: ModelCard
    built: BuiltPrompt
    window_scores: tuple[float, ...]
    from_cache: bool
    total_s: float
    tokenize_s: float
    queue_s: float
    inference_s: float
    computed_tokens: int
    cached_tokens: int
    unknown_categories: tuple[str, ...]  # of the policy, not of the model: it was not asked
    found: tuple[Decision, ...]  # of each window; `decision` is the gravest of them
    conversation: Conversation  # as it was judged: with its images fetched and decoded
    images_s: float = 0.0  # for that
    assessments: tuple[Assessment, ...] = ()  # that `found` was decided from
    tier: str = ""  # of a cascade, and why that tier decided
    tier_reason: str = ""


class Moderator:
    """Judges conversations with one engine. For one event loop."""

    def __init__(
        self,
        engine: Engine,
        batcher: Batcher,
        bounds: Bounds,
        cache_entries: int,
        metrics: EngineMetrics,
        images: ImageReader | None = None,
    ) -> None:
        """A model that judges images needs a reader of them; ValueError without."""
        if engine.card.judges_images and images is None:
            raise ValueError("a model that judges images needs a reader of images")
        self.card = engine.card
        self._images = images
        self._builder = engine.prompt_builder()
        self._session = engine.session
        self._batcher = batcher
        self._bounds = bounds
        self._cache: LruCache[tuple[Assessed, ...]] = LruCache(cache_entries)
        self._caches = cache_entries > 0
        self._flights: SingleFlight[Ran] = SingleFlight()
        self._metrics = metrics
        self._threads = ThreadPoolExecutor(BUILDERS, thread_name_prefix="guard-prompt")
        self._own = tuple(c for c in LLAMA_GUARD_3 if c.code in self.card.categories)

    @property
    def remembered(self) -> int:
        """Verdicts in the cache."""
        return len(self._cache)

    def growing(self) -> Growing:
        """For a conversation that is judged again and again while it grows; to be closed."""
        return Growing(self._batcher, self._session())

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

        `growing` holds what earlier calls for the same growing conversation computed. It changes
        what a verdict costs, not what it says.
        """
        direction = direction_of(conversation)
        try:
            async with asyncio.timeout(timeout_s):
                judgement = await self._judge(
                    conversation, policy, language, timeout_s, no_cache, growing
                )
        except TimeoutError:
            error: GuardServiceError = DeadlineExceeded(
                "the deadline passed before there was a verdict"
            )
            raise for_policy(error, policy, direction) from None
        except GuardServiceError as error:
            raise for_policy(error, policy, direction) from None
        self._count(judgement)
        return judgement

    async def cards(self) -> tuple[ModelCard, ...]:
        """The model that judges."""
        return (self.card,)

    async def warm_up(self, policy: Policy) -> None:
        """Judge a greeting in each direction, so that the first caller need not wait for it."""
        for role in (Role.USER, Role.ASSISTANT):
            greeting = Conversation((Message(role, (Text("Hello"),)),))
            built = await self._built(greeting, policy)
            await self._batcher.assess(built.prompts, WARM_UP_S)

    def close(self) -> None:
        """Stop the threads that assemble prompts."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _judge(
        self,
        conversation: Conversation,
        policy: Policy,
        language: str,
        timeout_s: float,
        no_cache: bool,
        growing: Growing | None,
    ) -> Judgement:
        arrived = time.perf_counter()
        if language and not LANGUAGE_TAG.fullmatch(language):
            raise InvalidRequest("language: must be a BCP 47 tag such as de or pt-BR, or empty")
        conversation = await self._with_pictures(conversation, policy)
        looked = time.perf_counter()
        with step("guard.tokenize"):
            built = await self._built(conversation, policy)
        assembled = time.perf_counter()
        unscannable = not all(part.judged for part in built.parts)
        if unscannable and policy.on_unscannable(built.direction) is Unscannable.ERROR:
            raise UnscannableError(_cannot_judge(built, self.card))
        unknown = unknown_to(policy, self.card, built.direction)
        if policy.judged(built.direction):
            patience_s = timeout_s - (assembled - arrived)
            ran, from_cache = await self._assessed(
                built, policy, language, patience_s, no_cache, growing
            )
            found = [_scored(result.assessment, unknown) for result in ran.results]
        else:
            built, ran, from_cache = _unasked(built), Ran((), 0.0, 0.0), False
            found = [Assessment(0.0, {})]
        try:
            decisions = [
                decide(policy, assessment, built.direction, language, unscannable)
                for assessment in found
            ]
        except ValueError as error:  # scores that are no probabilities
            LOG.exception("the engine's scores cannot be used")
            raise NotAssessed("the engine gave scores that cannot be used") from error
        return Judgement(
            id=uuid.uuid4().hex,
            decision=max(decisions, key=_gravity),
            policy=policy,
            model=self.card,
            built=built,
            window_scores=tuple(d.unsafe_score for d in decisions) if built.windows else (),
            from_cache=from_cache,
            total_s=time.perf_counter() - arrived,
            tokenize_s=assembled - looked,
            queue_s=ran.queue_s,
            inference_s=ran.inference_s,
            computed_tokens=0 if from_cache else sum(r.computed_tokens for r in ran.results),
            cached_tokens=0 if from_cache else sum(r.cached_tokens for r in ran.results),
            unknown_categories=unknown,
            found=tuple(decisions),
            assessments=tuple(found),
            conversation=conversation,
            images_s=looked - arrived,
        )

    async def _with_pictures(self, conversation: Conversation, policy: Policy) -> Conversation:
        """The conversation with its images decoded, where the model is going to see them."""
        if self._images is None or not policy.judged(direction_of(conversation)):
            return conversation
        with step("guard.images"):
            return await self._images.ready(conversation, policy.image_uris)

    async def _built(self, conversation: Conversation, policy: Policy) -> BuiltPrompt:
        """The prompts. A model with fixed categories gets all of them, whatever the policy judges:
        its policies then share their prefixes."""
        chars = sum(map(len, texts_of(conversation)))
        bounds = self._bounds
        if chars > bounds.conversation_chars:
            raise ConversationTooLong(
                f"the conversation has more than {bounds.conversation_chars} characters; send less"
            )
        direction = direction_of(conversation)
        asked = asked_of(policy, self.card, direction) if self.card.custom_categories else ()
        categories = asked or self._own
        try:
            if chars <= INLINE_CHARS:
                built = self._builder.build(conversation, categories)
            else:
                built = await asyncio.get_running_loop().run_in_executor(
                    self._threads, self._builder.build, conversation, categories
                )
        except InvalidConversation as error:
            raise InvalidRequest(str(error)) from None
        if built.conversation_tokens > bounds.conversation_tokens:
            raise ConversationTooLong(
                f"the conversation has {built.conversation_tokens} tokens, over the limit of "
                f"{bounds.conversation_tokens}; send less of it"
            )
        if len(built.prompts) > bounds.prompts:
            raise ConversationTooLong(
                f"the conversation takes {len(built.prompts)} runs of the model, over the limit of "
                f"{bounds.prompts}; send fewer images or less text"
            )
        return built

    async def _assessed(
        self,
        built: BuiltPrompt,
        policy: Policy,
        language: str,
        patience_s: float,
        no_cache: bool,
        growing: Growing | None,
    ) -> tuple[Ran, bool]:
        """What the engine finds, and whether another request had asked for it."""
        judge = growing or self._batcher
        if no_cache or not self._caches:
            return await judge.assess(built.prompts, patience_s), False
        key = key_of(
            self.card.digest,
            policy.digest,
            built.direction,
            language,
            built.prompts,
            WHOSE.get(),  # no tenant learns, by an answer or its time, what another asked
        )
        if (results := self._cache.get(key)) is not None:
            self._metrics.cache_hits.labels("hit").inc()
            return Ran(results, 0.0, 0.0), True

        async def compute() -> Ran:
            ran = await judge.assess(built.prompts, patience_s)
            self._cache.put(key, ran.results)
            return ran

        ran, joined = await self._flights.run(key, compute)
        self._metrics.cache_hits.labels("joined" if joined else "miss").inc()
        return (Ran(ran.results, 0.0, 0.0), True) if joined else (ran, False)

    def _count(self, judgement: Judgement) -> None:
        metrics = self._metrics
        metrics.tokenize_seconds.observe(judgement.tokenize_s, exemplar())
        if judgement.built.prompts and not judgement.from_cache:
            metrics.queue_seconds.observe(judgement.queue_s, exemplar())
            metrics.tokens.labels("computed").inc(judgement.computed_tokens)
            metrics.tokens.labels("prefix_cache").inc(judgement.cached_tokens)
            metrics.prefix_hits.labels("hit" if judgement.cached_tokens else "miss").inc()


def _scored(assessment: Assessment, unknown: tuple[str, ...]) -> Assessment:
    """With the score of what the model cannot name."""
    if not unknown:
        return assessment
    scores = {**dict.fromkeys(unknown, 0.0), **assessment.category_scores}
    return Assessment(assessment.unsafe_score, scores)


def _unasked(built: BuiltPrompt) -> BuiltPrompt:
    """The conversation under a policy that judges nothing in its direction."""
    parts = tuple(replace(part, judged=False, reason=POLICY_IS_OFF) for part in built.parts)
    return replace(built, prompts=(), windows=(), parts=parts)


def for_policy(
    error: GuardServiceError, policy: Policy, direction: Direction | None
) -> GuardServiceError:
    """The error with what the policy wants done then: the severer one of an unknown direction."""
    directions = (direction,) if direction else tuple(Direction)
    actions = [policy.on_unavailable(direction) for direction in directions]
    error.on_unavailable = max(actions, key=lambda action: action.severity).value
    return error


def direction_of(conversation: Conversation) -> Direction:
    """RESPONSE if the last message is the assistant's."""
    last = conversation.messages[-1:]
    return Direction.RESPONSE if last and last[0].is_response else Direction.PROMPT


def _gravity(decision: Decision) -> tuple[int, float]:
    action = decision.shadow_action or decision.action
    return action.severity, decision.unsafe_score


def _cannot_judge(built: BuiltPrompt, card: ModelCard) -> str:
    kinds = sorted({part.kind for part in built.parts if not part.judged})
    reasons = sorted({part.reason for part in built.parts if not part.judged})
    why = f": {', '.join(reasons)}" if card.judges_images else f": model {card.name} is text-only"
    return f"cannot judge {' or '.join(f'{kind}s' for kind in kinds)}{why}"


def texts_of(conversation: Conversation) -> Iterator[str]:
    """All that is read of a conversation: every text, and names and arguments of tool calls."""
    for message in conversation.messages:
        for part in message.parts:
            match part:
                case ToolCall():
                    yield part.name
                    yield part.arguments
                case Image():
                    pass
                case _:
                    yield part.text
