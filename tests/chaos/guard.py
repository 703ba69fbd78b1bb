"""guard-service, which also writes down each verdict before it leaves.

`python -m tests.chaos.guard JOURNAL FLAGS...`, the flags of guard-service.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

from guard_api.v1 import guard_pb2, verdict_pb2
from guard_service import __main__ as service
from guard_service.engines import Assessed, fake
from guard_service.prompt import Prompt
from guard_service.servicer import Servicer
from tests.chaos.journal import Judged, Writer, case_of, now


class Forgetful(fake.FakeEngine):
    """The fake engine without its records, which grow with every run."""

    def assess(self, prompts: Sequence[Prompt]) -> list[Assessed]:
        """One result per prompt, in order."""
        try:
            return super().assess(prompts)
        finally:
            self.batches.clear()
            self.pictures.clear()


class Journaling(Servicer):
    """GuardService, with a journal of what it says."""

    journal: Writer

    async def Classify(
        self, request: guard_pb2.ClassifyRequest, context: Any
    ) -> guard_pb2.ClassifyResponse:
        """Judge, write down, answer."""
        reply = await super().Classify(request, context)
        self._note(request.conversation, reply.verdict)
        return reply

    async def ClassifyBatch(
        self, request: guard_pb2.ClassifyBatchRequest, context: Any
    ) -> guard_pb2.ClassifyBatchResponse:
        """Judge, write down, answer."""
        reply = await super().ClassifyBatch(request, context)
        for asked, result in zip(request.requests, reply.results, strict=True):
            if result.HasField("verdict"):
                self._note(asked.conversation, result.verdict)
        return reply

    async def ClassifyStream(
        self, request_iterator: AsyncIterator[guard_pb2.ClassifyStreamRequest], context: Any
    ) -> AsyncIterator[guard_pb2.ClassifyStreamResponse]:
        """Judge, write down, answer, as the reply grows."""
        started: list[guard_pb2.Conversation] = []

        async def steps() -> AsyncIterator[guard_pb2.ClassifyStreamRequest]:
            async for step in request_iterator:
                if step.HasField("start"):
                    started.append(step.start.conversation)
                yield step

        replies = super().ClassifyStream(steps(), context)
        async with aclosing(replies):  # type: ignore[type-var]
            async for reply in replies:
                self._note(started[0], reply.verdict, reply.covered_chars)
                yield reply

    def _note(
        self, conversation: guard_pb2.Conversation, verdict: verdict_pb2.Verdict, chars: int = -1
    ) -> None:
        users = [one for one in conversation.messages if one.role == guard_pb2.ROLE_USER]
        text = "".join(part.text for part in users[-1].parts) if users else ""
        last = conversation.messages[-1]
        if chars < 0:
            is_reply = last.role == guard_pb2.ROLE_ASSISTANT
            chars = sum(len(part.text) for part in last.parts) if is_reply else 0
        self.journal.write(
            Judged(
                at=now(),
                case=case_of(text),
                chars=chars,
                action=verdict_pb2.Action.Name(verdict.action).removeprefix("ACTION_").lower(),
                policy=verdict.policy.name,
                version=verdict.policy.version,
                policy_digest=verdict.policy.digest,
                model_digest=verdict.model.digest,
                verdict_id=verdict.verdict_id,
            )
        )


def main() -> int:
    """Serve until a signal."""
    from guard_service import server

    Journaling.journal = Writer(Path(sys.argv[1]))
    fake.FakeEngine = Forgetful  # type: ignore[misc]
    server.Servicer = Journaling  # type: ignore[attr-defined]
    return service.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
