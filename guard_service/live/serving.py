"""What calls are judged by: exchanged as a whole for new ones, kept by those in progress."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property

from guard_policies.schema import Policy
from guard_service.cascade import Cascade
from guard_service.config import Settings
from guard_service.engines import Engine
from guard_service.hosted import Hosted
from guard_service.judging import Judge
from guard_service.live.candidates import Candidates
from guard_service.logs import FIELDS
from guard_service.metrics import CascadeMetrics, EngineMetrics, Metrics
from guard_service.remote import RemoteGuard
from guard_service.second import SecondGuard

LOG = logging.getLogger(__name__)


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
            await self.second.start(second_policies(judge.policies))

    def describe(self) -> None:
        """Show these models in the metrics."""
        for one in self.hosted:
            one.describe()

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


class Makers:
    """Makes guards of engines, all with the same metrics. `on_health` is told by any of them, and
    has to ask which one counts."""

    def __init__(self, settings: Settings, metrics: Metrics, on_health: Callable[[], None]) -> None:
        """Raises OSError for a CA of the second guard that cannot be read."""
        self._settings = settings
        self._metrics = metrics
        self.on_health = on_health
        self.remote: RemoteGuard | None = None
        if settings.second_guard:
            self.remote = RemoteGuard(
                settings.second_guard,
                settings.second_guard_ca,
                settings.second_guard_cert,
                settings.second_guard_key,
            )

    @cached_property
    def _cascade(self) -> CascadeMetrics:
        return CascadeMetrics(self._metrics.registry)

    @cached_property
    def _second(self) -> EngineMetrics:
        return EngineMetrics("guard_second", self._metrics.registry)

    def first(self, engine: Engine) -> Hosted:
        """The first guard's model."""
        return Hosted(engine, self._settings, self._metrics, lambda healthy: self.on_health())

    def second(self, engine: Engine) -> Hosted:
        """The second guard's, in this process."""
        return Hosted(engine, self._settings, self._second)

    def guards(self, first: Hosted, second: Hosted | None) -> Guards:
        """These together, or the first with a second guard of another server."""
        asked = None
        if second is not None:
            asked = SecondGuard(second.moderator, self._cascade)
        elif self.remote is not None:
            asked = SecondGuard(self.remote, self._cascade)
        return Guards(first, second, asked)


class Live:
    """Policies and models in use. New calls get those of now, and keep them to their end.

    For one event loop; an exchange is one step of it, so that no call sees half of one.
    """

    def __init__(
        self,
        guards: Guards,
        policies: Mapping[str, Policy],
        default_policy: str,
        metrics: Metrics,
        key: bytes = b"",
    ) -> None:
        """`key` is that of the choice between a policy and its candidates."""
        self.guards = guards
        self._default_policy = default_policy
        self._metrics = metrics
        self._key = key
        self._candidates: Candidates | None = None
        self._leaving: dict[Guards, asyncio.Task[None]] = {}
        metrics.draining.set_function(lambda: len(self._leaving))
        guards.prepare_for(policies)
        guards.describe()
        self._judge = self.judge_of(guards, policies)
        self._candidates = self._judge.candidates

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
        """What would judge with these. Raises PolicyNotSupported for a candidate that cannot be
        compared."""
        candidates = Candidates(
            policies, guards.first.card, self._metrics, self._key, self._candidates
        )
        return Cascade(
            guards.first.moderator,
            guards.asked,
            self._metrics,
            policies,
            self._default_policy,
            candidates,
        )

    def exchange(self, judge: Cascade, guards: Guards | None = None) -> None:
        """From now on new calls get these. Models that are not among them are closed when the last
        call that needs them has ended."""
        before, self._judge, self._candidates = self.guards, judge, judge.candidates
        if guards is None or guards is before:
            return
        self.guards = guards
        guards.describe()
        self._leaving[before] = asyncio.create_task(self._leave(before))

    async def close(self) -> None:
        """Fail what waits, end what runs, in models that are leaving too."""
        for task in self._leaving.values():
            task.cancel()
        await asyncio.gather(*self._leaving.values(), return_exceptions=True)
        for one in {one for guards in (self.guards, *self._leaving) for one in guards.hosted}:
            await one.close()
        self._leaving.clear()

    async def _leave(self, guards: Guards) -> None:
        """See guards off: their models that no other call can get, close, and give the memory
        back."""
        await guards.idle()
        others = (self.guards, *(one for one in self._leaving if one is not guards))
        needed = {one for other in others for one in other.hosted}
        try:
            for one in set(guards.hosted) - needed:
                await one.close()
                one.engine.close()
                LOG.info("a model was closed", extra={FIELDS: {"digest": one.card.digest}})
        except Exception:
            LOG.exception("a model could not be closed")
        del self._leaving[guards]
        asyncio.get_running_loop().call_soon(_give_back)  # when this frame holds nothing any more


def second_policies(policies: Mapping[str, Policy]) -> Iterator[Policy]:
    """What the second guard of cascades serves."""
    return (one.as_second() for one in policies.values() if one.cascade)


def _give_back() -> None:
    """Have freed memory go back to the system, where the C library can (glibc)."""
    gc.collect()
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
