"""What calls are judged by: exchanged as a whole for new ones, kept by those in progress."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from guard_policies.schema import Policy
from guard_service.cascade import Cascade
from guard_service.hosted import Hosted
from guard_service.judging import Judge
from guard_service.metrics import Metrics
from guard_service.second import SecondGuard


class Guards:
    """The models that judge together, and how many calls still need them."""

    def __init__(self, first: Hosted, second: Hosted | None, asked: SecondGuard | None) -> None:
        """`asked` asks the second guard of cascades, which is `second` or of another server."""
        self.first = first
        self.second = second
        self.asked = asked
        self._calls = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def hosted(self) -> tuple[Hosted, ...]:
        """The models in this process."""
        return (self.first, self.second) if self.second is not None else (self.first,)

    def prepare_for(self, policies: Mapping[str, Policy]) -> None:
        """Make ready what the policies need; raises PolicyNotSupported."""
        for one in self.hosted:
            one.prepare_for(policies.values())

    async def start(self, judge: Cascade) -> None:
        """Check the models against their golden prompts and let each judge a greeting. Raises
        EngineFailed and NotAssessed, as `Hosted.start`."""
        await self.first.start((judge.policy(""),))
        if self.second is not None:
            policies = judge.policies.values()
            await self.second.start(one.as_second() for one in policies if one.cascade)

    def describe(self) -> None:
        """Show these models in the metrics."""
        for one in self.hosted:
            one.describe()

    async def close(self) -> None:
        """Fail what waits, end what runs."""
        for one in self.hosted:
            await one.close()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """While a call may need them."""
        self._calls += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._calls -= 1
            if not self._calls:
                self._idle.set()

    async def idle(self) -> None:
        """Until no call needs them. Meant for guards that no new call gets."""
        await self._idle.wait()


class Live:
    """Policies and models in use. New calls get those of now, and keep them to their end.

    For one event loop; an exchange is one step of it, so that no call sees half of one.
    """

    def __init__(
        self, guards: Guards, policies: Mapping[str, Policy], default_policy: str, metrics: Metrics
    ) -> None:
        self.guards = guards
        self._default_policy = default_policy
        self._metrics = metrics
        guards.prepare_for(policies)
        guards.describe()
        self._judge = self.judge_of(guards, policies)

    @property
    def judge(self) -> Cascade:
        """What a new call would get."""
        return self._judge

    @contextmanager
    def held(self) -> Iterator[Judge]:
        """The judge of a call, its policies and models, which stay the same for the block."""
        with self.guards.in_use():
            yield self._judge

    def judge_of(self, guards: Guards, policies: Mapping[str, Policy]) -> Cascade:
        """What would judge with these."""
        return Cascade(
            guards.first.moderator, guards.asked, self._metrics, policies, self._default_policy
        )

    def exchange(self, guards: Guards, judge: Cascade) -> None:
        """From now on new calls get these."""
        self.guards, self._judge = guards, judge
