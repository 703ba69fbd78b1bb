"""A growing reply: steps of a ClassifyStream in, verdicts out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass

from guard_api.v1 import guard_pb2
from guard_policies.cadence import Cadence
from guard_service.conversation import Conversation, Message, Role, Text
from guard_service.errors import (
    ConversationTooLong,
    DeadlineExceeded,
    GuardServiceError,
    InvalidStream,
)
from guard_service.judging import Judge, Judges
from guard_service.moderation import Judgement
from guard_service.wire import Sizes, conversation_of

PIECES_AHEAD = 64  # pieces read while a verdict is being made; then the caller has to wait

Steps = AsyncIterator[guard_pb2.ClassifyStreamRequest]


@dataclass(frozen=True, slots=True)
class StreamBounds:
    """What a stream is held to."""

    sizes: Sizes
    reply_chars: int
    idle_s: float


@dataclass(frozen=True, slots=True)
class Covered:
    """A verdict on the first `chars` code points of the reply."""

    judgement: Judgement
    chars: int
    final: bool


async def judged(
    steps: Steps, judges: Judges, bounds: StreamBounds, timeout_s: Callable[[], float]
) -> AsyncGenerator[Covered]:
    """Verdicts at the policy's cadence, where a piece asks for one, and on the whole reply.

    Pieces that arrive while a verdict is being made are judged together, up to one that asks for a
    check. Policy and model are those that were loaded at the start. Raises GuardServiceError; steps
    out of order are InvalidStream, and so is a stream that closes before its end.
    """
    start = await _started(steps, bounds.idle_s)
    with judges.held() as judge:
        async with aclosing(_judged(start, steps, judge, bounds, timeout_s)) as verdicts:
            async for covered in verdicts:
                yield covered


async def _judged(
    start: guard_pb2.StreamStart,
    steps: Steps,
    judge: Judge,
    bounds: StreamBounds,
    timeout_s: Callable[[], float],
) -> AsyncGenerator[Covered]:
    policy = judge.policy(start.policy)
    conversation = conversation_of(start.conversation, bounds.sizes)
    queue: asyncio.Queue[guard_pb2.StreamPiece | GuardServiceError] = asyncio.Queue(PIECES_AHEAD)
    reader = asyncio.create_task(_read(steps, queue))
    growing = judge.growing()
    reply: list[str] = []
    cadence, chars = Cadence(policy.stream), 0
    try:
        while True:
            last = await _take(queue, reply, bounds.idle_s)
            reply[:] = ["".join(reply)]
            due = cadence.grow(reply[0][chars:])
            chars = len(reply[0])
            if chars > bounds.reply_chars:
                raise ConversationTooLong(f"the reply is over {bounds.reply_chars} characters")
            if last.check or last.end or due:
                judgement = await judge.judge(
                    with_reply(conversation, reply[0]),
                    policy,
                    start.language,
                    timeout_s(),
                    no_cache=not last.end,  # a reply half-way is not asked for again
                    growing=growing,
                )
                # The images stay as they were judged: what is fetched twice may not be the same.
                conversation = Conversation(judgement.conversation.messages[:-1])
                cadence.judged()
                yield Covered(judgement, chars, last.end)
            if last.end:
                return
    finally:
        reader.cancel()
        growing.close()


def with_reply(conversation: Conversation, reply: str) -> Conversation:
    """The conversation with the wrapped model's reply so far as its last turn."""
    return Conversation((*conversation.messages, Message(Role.ASSISTANT, (Text(reply),))))


async def _started(steps: Steps, idle_s: float) -> guard_pb2.StreamStart:
    try:
        async with asyncio.timeout(idle_s):
            first = await anext(steps, None)
    except TimeoutError:
        raise DeadlineExceeded(f"the stream did not start within {idle_s:g} s") from None
    if first is None or first.WhichOneof("step") != "start":
        raise InvalidStream("the first step must be a start")
    return first.start


async def _take(
    queue: asyncio.Queue[guard_pb2.StreamPiece | GuardServiceError], reply: list[str], idle_s: float
) -> guard_pb2.StreamPiece:
    """Add what has arrived to the reply, at least one piece; the last of them."""
    try:
        async with asyncio.timeout(idle_s):
            piece = await queue.get()
    except TimeoutError:
        raise DeadlineExceeded(f"the stream sent nothing for {idle_s:g} s") from None
    while True:
        if isinstance(piece, GuardServiceError):
            raise piece
        reply.append(piece.text)
        if piece.check or piece.end or queue.empty():
            return piece
        piece = queue.get_nowait()


async def _read(
    steps: Steps, queue: asyncio.Queue[guard_pb2.StreamPiece | GuardServiceError]
) -> None:
    """Feed the queue up to the end of the reply, or the first mistake."""
    try:
        async for step in steps:
            if step.WhichOneof("step") != "piece":
                raise InvalidStream("after the start, every step must be a piece")
            await queue.put(step.piece)
            if step.piece.end:
                return
        raise InvalidStream("the stream closed before a piece with end = true")
    except GuardServiceError as error:
        await queue.put(error)
