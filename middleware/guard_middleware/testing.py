"""FakeGuard: a guard for tests, ours and yours, that needs no model and no socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Sequence
from itertools import takewhile

from guard_api.v1 import guard_pb2
from guard_middleware.calls import Piece
from guard_middleware.guards import Conversation
from guard_middleware.service_info import PolicySummary
from guard_middleware.turns import direction_of
from guard_middleware.verdict import (
    Coverage,
    ModelRef,
    Outcome,
    PolicyRef,
    StreamOutcome,
    Timing,
    Verdict,
)
from guard_policies.assessment import Action, Direction

Judge = Callable[[str], Action]


def forbids(*words: str) -> Judge:
    """BLOCK for a text that holds one of the words, else ALLOW."""
    return lambda text: Action.BLOCK if any(word in text for word in words) else Action.ALLOW


class FakeGuard:
    """Judges the text of the last turn with `judge`, messages of one role in a row being one turn,
    and remembers: conversations that were `asked` about, texts of streams that came to their end,
    texts that were `allowed`.

    A stream is judged at every piece whose sender wants a verdict, every `every_chars`, and at its
    end. `gate`, when given, is awaited before each verdict.
    """

    def __init__(
        self,
        judge: Judge = lambda text: Action.ALLOW,
        every_chars: int = 200,
        gate: Callable[[], asyncio.Future[None]] | None = None,
    ) -> None:
        self.asked: list[Conversation] = []
        self.streamed: list[str] = []
        self.allowed: list[str] = []
        self.open_streams = 0
        self._judge = judge
        self._every_chars = every_chars
        self._gate = gate
        self._verdicts = 0

    async def judge(self, conversations: Sequence[Conversation]) -> Sequence[Outcome]:
        """One outcome for each conversation, in order, and as many."""
        return [await self._outcome(one) for one in conversations]

    async def growing(
        self, conversation: Conversation, pieces: AsyncIterable[Piece]
    ) -> AsyncGenerator[StreamOutcome]:
        """Outcomes on a growing reply to the conversation; the last one has `final`."""
        said, covered = "", 0
        self.open_streams += 1
        try:
            async for piece in pieces:
                said += piece.text
                if piece.check or len(said) - covered >= self._every_chars:
                    covered = len(said)
                    yield StreamOutcome(
                        await self._verdict(said, Direction.RESPONSE), covered, False
                    )
            self.streamed.append(said)
            yield StreamOutcome(await self._verdict(said, Direction.RESPONSE), len(said), True)
        finally:
            self.open_streams -= 1

    async def policy(self) -> PolicySummary | None:
        """It has none."""
        return None

    async def ready(self) -> bool:
        """It always is."""
        return True

    async def close(self) -> None:
        """There is nothing to let go of."""

    async def _outcome(self, conversation: Conversation) -> Outcome:
        self.asked.append(conversation)
        role = conversation.messages[-1].role
        run = takewhile(lambda message: message.role == role, reversed(conversation.messages))
        parts = (part for message in reversed(list(run)) for part in message.parts)
        text = "\n".join(map(text_of, parts))
        return await self._verdict(text, direction_of(conversation))

    async def _verdict(self, text: str, direction: Direction) -> Verdict:
        if self._gate is not None:
            await self._gate()
        self._verdicts += 1
        action = self._judge(text)
        if action is not Action.BLOCK:
            self.allowed.append(text)
        return fake_verdict(action, direction, f"fake-{self._verdicts}")


def fake_verdict(action: Action, direction: Direction, verdict_id: str = "fake") -> Verdict:
    """A verdict without categories."""
    return Verdict(
        action=action,
        unsafe_score=0.95 if action is Action.BLOCK else 0.02,
        categories=(),
        direction=direction,
        shadow_action=None,
        model=ModelRef("fake", "sha256:00"),
        policy=PolicyRef("fake", "1", "sha256:11"),
        coverage=Coverage(True, (), (), 0),
        timing=Timing(0.0, 0.0, 0.0, 0.0, 0, 0),
        verdict_id=verdict_id,
        from_cache=False,
        joint=False,
    )


def text_of(part: guard_pb2.Part) -> str:
    """A part as a guard reads it; nothing for an image."""
    match part.WhichOneof("content"):
        case "text":
            return part.text
        case "tool_call":
            return f"{part.tool_call.name}({part.tool_call.arguments})"
        case "tool_result":
            return part.tool_result.text
        case _:
            return ""
