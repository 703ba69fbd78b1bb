"""What of a request and of a whole reply is put before the guard, and what its answers mean."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from guard_api.v1 import guard_pb2
from guard_middleware.errors import BadReply
from guard_middleware.failures import log_failure
from guard_middleware.formats.contract import Asked, Piece, Turn
from guard_middleware.guards import Conversation, Guard
from guard_middleware.settings import Settings
from guard_middleware.turns import read_turns
from guard_middleware.verdict import Outcome, Unjudged
from guard_policies.assessment import Action

LOG = logging.getLogger(__name__)

BATCH_BYTES = 1_000_000  # a guard takes messages of 4 MiB
BATCH_ITEMS = 64
MOST_DROPPED = 16  # exchanges of one request

_OPERATORS = ("system", "developer")


@dataclass(frozen=True, slots=True)
class Question:
    """A conversation whose last turn is to be judged.

    `drop` are the places of the exchange that it belongs to, if the request can do without it.
    """

    conversation: Conversation
    drop: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Ruling:
    """What became of a request: blocked, or to be forwarded without `drop`, as `asked` now is."""

    blocked: bool
    outcomes: tuple[Outcome, ...]
    asked: Asked
    drop: frozenset[int] = frozenset()


def questions(asked: Asked, settings: Settings) -> Iterator[Question]:
    """One for each turn, in the light of those before it: whoever sends a conversation may have
    made up all of it. Raises ValueError, which names the place, for what is no turn.
    """
    for prompt in asked.prompts:
        if len(prompt) > settings.max_messages:
            raise ValueError(f"there are more than {settings.max_messages} turns")
        yield from _questions(prompt, settings)


async def rule(guard: Guard, asked: Asked, settings: Settings) -> Ruling:
    """Ask the guard about a request. Raises ValueError for what is no turn.

    What is forwarded is what was judged: when an old exchange is left out, the turns behind it are
    judged again without it.
    """
    drop: frozenset[int] = frozenset()
    outcomes: tuple[Outcome, ...] = ()
    for _ in range(MOST_DROPPED):
        blocked = None
        async for question, outcome in judged(guard, questions(asked, settings)):
            outcomes += (outcome,)
            if outcome.blocked:
                blocked = question
                break
        if blocked is None:
            return Ruling(False, outcomes, asked, drop)
        if not blocked.drop:
            break
        drop |= blocked.drop
        asked = _without(asked, blocked.drop)
    return Ruling(True, outcomes, asked, drop)


async def judged(
    guard: Guard, asked: Iterator[Question]
) -> AsyncIterator[tuple[Question, Outcome]]:
    """Questions and outcomes in order, asked in batches of a bounded size."""
    pending = next(asked, None)
    while pending is not None:
        some: list[Question] = []
        size = 0
        while pending is not None and (not some or size < BATCH_BYTES and len(some) < BATCH_ITEMS):
            some.append(pending)
            size += pending.conversation.ByteSize()
            pending = next(asked, None)
        outcomes = await _outcomes(guard, [question.conversation for question in some])
        for pair in zip(some, outcomes, strict=True):
            yield pair


async def reply_outcomes(
    guard: Guard, prompt_of: Callable[[int], Conversation], pieces: Iterable[Piece]
) -> AsyncIterator[Outcome]:
    """Outcomes on a whole reply: one for each choice, in the light of what it answers."""
    by_choice: dict[int, list[Piece]] = {}
    for piece in pieces:
        by_choice.setdefault(piece.channel.choice, []).append(piece)
    questions = (Question(answered(prompt_of(choice), said)) for choice, said in by_choice.items())
    async for _, outcome in judged(guard, questions):
        yield outcome


async def _outcomes(guard: Guard, asked: Sequence[Conversation]) -> Sequence[Outcome]:
    """As many as were asked for; a guard that breaks its promises has judged none."""
    try:
        outcomes = await guard.judge(asked)
    except Exception as failure:
        log_failure(LOG, "the guard failed", failure)
        outcomes = ()
    if len(outcomes) == len(asked):
        return outcomes
    error = BadReply("the guard did not answer what it was asked")
    return [Unjudged(Action.BLOCK, error.reason, error)] * len(asked)


def _without(asked: Asked, places: frozenset[int]) -> Asked:
    prompts = tuple(
        tuple(turn for turn in prompt if turn.place is None or turn.place not in places)
        for prompt in asked.prompts
    )
    return replace(asked, prompts=prompts)


def conversation_of(turns: Iterable[Turn]) -> Conversation:
    """The turns on the wire."""
    return read_turns([turn.content for turn in turns])


def answered(prompt: Conversation, pieces: Sequence[Piece]) -> Conversation:
    """The conversation with a whole reply as its last turn, each channel a part of it."""
    channels: dict[object, list[str]] = {}
    for piece in pieces:
        channels.setdefault(piece.channel, []).append(piece.text)
    parts = [guard_pb2.Part(text="".join(texts)) for texts in channels.values()]
    reply = guard_pb2.Message(role=guard_pb2.ROLE_ASSISTANT, parts=parts)
    return guard_pb2.Conversation(messages=[*prompt.messages, reply])


def _questions(prompt: Sequence[Turn], settings: Settings) -> Iterator[Question]:
    conversation = conversation_of(prompt)
    ends, at = [], 0
    for _, run in groupby(conversation.messages, key=lambda message: message.role):
        at += len(list(run))
        ends.append(at)
    newest = _newest(prompt)
    for end in ends:
        last = prompt[end - 1]
        if settings.system_turns == "trust" and last.role in _OPERATORS:
            continue
        old = end <= newest and last.role not in _OPERATORS
        if old and settings.old_turns == "pass":
            continue
        drop = _exchange(prompt, end - 1) if old and settings.old_turns == "drop" else frozenset()
        yield Question(guard_pb2.Conversation(messages=conversation.messages[:end]), drop)


def _newest(prompt: Sequence[Turn]) -> int:
    """Where the newest turns begin: behind the last reply that was answered by more turns."""
    end = len(prompt)
    while end and prompt[end - 1].role == "assistant":  # the beginning of the reply to come
        end -= 1
    while end and prompt[end - 1].role != "assistant":
        end -= 1
    return end


def _exchange(prompt: Sequence[Turn], at: int) -> frozenset[int]:
    """Places from the user's turns that lead to this one, to the end of the replies to them."""
    start = at
    while start and not (prompt[start].role == "user" and prompt[start - 1].role != "user"):
        start -= 1
    end = at + 1
    while end < len(prompt) and not (prompt[end].role == "user" and prompt[end - 1].role != "user"):
        end += 1
    turns = [turn for turn in prompt[start:end] if turn.role not in _OPERATORS]
    return frozenset(turn.place for turn in turns if turn.place is not None)
