"""What the contract's calls are answered by: one model's road to a verdict, or a cascade of two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from guard_policies.assessment import Action
from guard_policies.schema import Policy
from guard_service.conversation import Conversation
from guard_service.engines import ModelCard
from guard_service.growing import Growing
from guard_service.moderation import Judgement


class Judge(Protocol):
    """Judges conversations under named policies. For one event loop."""

    @property
    def policies(self) -> Mapping[str, Policy]:
        """By name."""
        ...

    @property
    def default_policy(self) -> str:
        """The name that an empty one means."""
        ...

    async def cards(self) -> Sequence[ModelCard]:
        """The models that judge, the first guard's first."""
        ...

    def policy(self, name: str, as_second: bool = False) -> Policy:
        """The policy of that name; raises UnknownPolicy or PolicyNotSupported."""
        ...

    def compared(self, policy: Policy) -> Mapping[tuple[Action | None, Action | None], int]:
        """How often the policy whose place this one may take wished what, and this one wished what;
        None is no decision."""
        ...

    def growing(self) -> Growing:
        """For a conversation that is judged again and again while it grows; to be closed."""
        ...

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
        ...


class Judges(Protocol):
    """Where a call gets its judge from. For one event loop."""

    def held(self) -> AbstractContextManager[Judge]:
        """The judge of now: policies and models, which stay the same as long as it is held."""
        ...


@dataclass(frozen=True, slots=True)
class Always:
    """One judge for all calls."""

    judge: Judge

    def held(self) -> AbstractContextManager[Judge]:
        """That one."""
        return nullcontext(self.judge)
