"""Between the calls and those who judge: nothing leaves before the audit log has it."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol
from weakref import WeakKeyDictionary

from guard_policies.assessment import Action
from guard_policies.schema import Policy
from guard_service.audit import entries
from guard_service.audit.chain import Entry
from guard_service.audit.entries import Asker, Question
from guard_service.audit.writer import Writer
from guard_service.conversation import Conversation
from guard_service.engines import ModelCard
from guard_service.errors import GuardServiceError, NotRecorded
from guard_service.growing import Growing
from guard_service.judging import Judge, Judges
from guard_service.moderation import Judgement, direction_of, for_policy
from guard_service.wire import request_of

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey


class Recorder(Protocol):
    """Records the calls that get no verdict."""

    async def refused(self, error: GuardServiceError) -> None:
        """The call, or an item of it, ends with an error."""
        ...

    def gone(self, code: str) -> None:
        """The caller does not wait any more."""
        ...


@dataclass(slots=True)
class Audit:
    """Makes lines of what happens. `asker` tells of the call in progress.

    An error that has its line is marked (`recorded`), so that it gets no second one on its way out.
    """

    writer: Writer
    prints: bytes
    asker: Callable[[], Asker]
    payload_key: X25519PublicKey | None = None

    async def judged(self, question: Question, judgement: Judgement) -> None:
        """Raises NotRecorded where the answer must not be given."""
        asker = self.asker()

        def make() -> Entry:
            entry = entries.verdict(asker, question, judgement, self.prints)
            return self._with_payload(entry, question, judgement.id)

        await self.writer.write(make, question.weight)

    async def unjudged(self, question: Question, error: GuardServiceError) -> None:
        """Raises nothing: there is no answer that could be kept back."""
        error.recorded = True
        asker = self.asker()

        def make() -> Entry:
            entry = entries.unjudged(asker, question, error, self.prints)
            return self._with_payload(entry, question, asker.request_id)

        await self._told(make, question.weight)

    async def refused(self, error: GuardServiceError) -> None:
        """Raises nothing, and records nothing twice."""
        if not error.recorded:
            error.recorded = True
            await self._told(partial(entries.refused, self.asker(), error))

    def gone(self, code: str) -> None:
        """The caller does not wait any more."""
        self.writer.soon(partial(entries.gone, self.asker(), code))

    async def _told(self, make: Callable[[], Entry], weight: int = 0) -> None:
        with suppress(NotRecorded):  # counted; an error stays the error that it is
            await self.writer.write(make, weight)

    def _with_payload(self, entry: Entry, question: Question, of: str) -> Entry:
        if self.payload_key is None:
            return entry
        from guard_service.audit.payload import seal

        request = request_of(
            question.conversation,
            question.policy.name,
            question.language,
            question.no_cache,
            question.as_second,
        )
        return {**entry, "payload": seal(request.SerializeToString(), self.payload_key, of)}


class Audited:
    """Judges whose answers are recorded before they are given."""

    def __init__(self, judges: Judges, audit: Audit) -> None:
        self._judges = judges
        self._audit = audit

    @contextmanager
    def held(self) -> Iterator[Judge]:
        """As theirs."""
        with self._judges.held() as judge:
            yield _AuditedJudge(judge, self._audit)


class _AuditedJudge(Judge):
    def __init__(self, judge: Judge, audit: Audit) -> None:
        self._judge = judge
        self._audit = audit
        self._streams: WeakKeyDictionary[Growing, tuple[str, int]] = WeakKeyDictionary()

    @property
    def policies(self) -> Mapping[str, Policy]:
        return self._judge.policies

    @property
    def default_policy(self) -> str:
        return self._judge.default_policy

    def compared(self, policy: Policy) -> Mapping[tuple[Action | None, Action | None], int]:
        return self._judge.compared(policy)

    async def cards(self) -> Sequence[ModelCard]:
        return await self._judge.cards()

    def policy(self, name: str, as_second: bool = False) -> Policy:
        return self._judge.policy(name, as_second)

    def growing(self) -> Growing:
        return self._judge.growing()

    async def judge(
        self,
        conversation: Conversation,
        policy: Policy,
        language: str,
        timeout_s: float,
        no_cache: bool = False,
        growing: Growing | None = None,
    ) -> Judgement:
        """Judge and record. Raises NotRecorded, too, where the verdict must not be given."""
        as_second = self._judge.policies.get(policy.name) != policy
        stream, step = self._step(growing)
        question = Question(conversation, policy, language, no_cache, as_second, stream, step)
        try:
            judgement = await self._judge.judge(
                conversation, policy, language, timeout_s, no_cache, growing
            )
        except GuardServiceError as error:
            await self._audit.unjudged(question, error)
            raise
        # What decided may be a candidate for the policy's place, and is what a replay has to name.
        decided, seen = judgement.policy, judgement.conversation
        question = Question(seen, decided, language, no_cache, as_second, stream, step)
        try:
            await self._audit.judged(question, judgement)
        except NotRecorded as error:
            error.recorded = True
            raise for_policy(error, policy, direction_of(conversation)) from None
        return judgement

    def _step(self, growing: Growing | None) -> tuple[str, int]:
        """The name of a stream, and the number of its next verdict."""
        if growing is None:
            return "", 0
        stream, step = self._streams.get(growing, (uuid.uuid4().hex, 0))
        self._streams[growing] = stream, step + 1
        return stream, step + 1
