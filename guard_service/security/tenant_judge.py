"""A judge as one tenant meets it: its own policies, its own quotas."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from guard_policies.assessment import Action
from guard_policies.schema import Policy
from guard_service.conversation import Conversation, Image
from guard_service.engines import ModelCard
from guard_service.errors import QuotaExceeded, UnknownPolicy
from guard_service.growing import Growing
from guard_service.judging import Judge, Judges
from guard_service.moderation import Judgement, for_policy, texts_of
from guard_service.security.tenants import Size, Usage


class TenantJudge:
    """Made for each call. What a tenant may not name is as if it did not exist.

    A verdict that is over a quota is refused with the time to come back. A growing reply is not cut
    off by it: its next verdict waits, and covers more.
    """

    def __init__(self, judge: Judge, usage: Usage) -> None:
        self._judge, self._usage = judge, usage
        self._charged = Size(0)  # of the growing reply

    @property
    def policies(self) -> Mapping[str, Policy]:
        """The tenant's, by name."""
        allowed = self._usage.tenant.policies
        policies = self._judge.policies
        if allowed is None:
            return policies
        return {name: policy for name, policy in policies.items() if name in allowed}

    @property
    def default_policy(self) -> str:
        """The name that an empty one means."""
        return self._usage.tenant.default_policy or self._judge.default_policy

    async def cards(self) -> Sequence[ModelCard]:
        """The models that judge."""
        return await self._judge.cards()

    def policy(self, name: str, as_second: bool = False) -> Policy:
        """The policy of that name; raises UnknownPolicy for another tenant's, as for none."""
        name = name or self.default_policy
        allowed = self._usage.tenant.policies
        if allowed is not None and name not in allowed:
            raise UnknownPolicy
        return self._judge.policy(name, as_second)

    def compared(self, policy: Policy) -> Mapping[tuple[Action | None, Action | None], int]:
        """Nothing: other tenants' verdicts would count too."""
        return {}

    def growing(self) -> Growing:
        """For a conversation that is judged again and again while it grows; to be closed."""
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
        """Judge the last turn. Raises GuardServiceError when there is no verdict."""
        size = size_of(conversation)
        try:
            if growing is None:
                self._usage.charge(size)
            else:
                timeout_s -= await self._patiently(size, timeout_s)
        except QuotaExceeded as error:
            raise for_policy(error, policy, None) from None
        return await self._judge.judge(conversation, policy, language, timeout_s, no_cache, growing)

    async def _patiently(self, whole: Size, timeout_s: float) -> float:
        """Charge what has grown, when there is room for it; seconds waited. Raises QuotaExceeded
        when that would take more time than there is."""
        grown = Size(
            max(whole.characters - self._charged.characters, 0),
            max(whole.images - self._charged.images, 0),
        )
        waited = 0.0
        while (wait_s := self._usage.wait_s(grown)[0]) > 0 and waited + wait_s < timeout_s:
            await asyncio.sleep(wait_s)
            waited += wait_s
        self._usage.charge(grown)
        self._charged = whole
        return waited


@dataclass(frozen=True, slots=True)
class TenantJudges:
    """Judges as one tenant meets them."""

    judges: Judges
    usage: Usage

    @contextmanager
    def held(self) -> Iterator[Judge]:
        """The judge of now, for one call."""
        with self.judges.held() as judge:
            yield TenantJudge(judge, self.usage)


def size_of(conversation: Conversation) -> Size:
    """What a conversation is charged: characters of all texts, and images."""
    parts = (part for message in conversation.messages for part in message.parts)
    images = sum(isinstance(part, Image) for part in parts)
    return Size(sum(map(len, texts_of(conversation))), images)
