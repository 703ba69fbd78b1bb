"""The second guard is slow, overloaded, broken or away: the policy says what holds."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import grpc
import pytest
from prometheus_client import CollectorRegistry

from guard_api.v1 import verdict_pb2
from guard_policies.loader import parse_policy
from guard_service.conversation import Conversation
from guard_service.engines import EngineFailed, ModelCard
from guard_service.errors import (
    ConversationTooLong,
    DeadlineExceeded,
    GuardServiceError,
    NotAssessed,
    NotReady,
    Overloaded,
    ShuttingDown,
)
from guard_service.metrics import CascadeMetrics
from guard_service.moderation import Judgement
from guard_service.second import FAILURES, SHUT_S, SecondGuard
from tests.service.asking import PATIENCE_S, asked, fetched, refused, until
from tests.service.cascade.guards import LARGE, SMALL, Told, says, with_picture
from tests.service.conftest import RunGuard

POLICY = "name: {name}\nversion: '1'\n{more}cascade: {{band: [0.25, 0.75], {cascade}}}\n"
FIRST = POLICY.format(name="lenient", more="", cascade="when_unable: first, timeout_s: 0.05")
ERROR = POLICY.format(
    name="strict-one", more="on_unavailable: flag\n", cascade="when_unable: error, timeout_s: 0.05"
)
PATIENT = POLICY.format(name="patient", more="", cascade="when_unable: first, timeout_s: 30")


async def test_of_a_slow_second_the_first_s_verdict_holds_or_an_error(run_guard: RunGuard) -> None:
    large = Told(LARGE)
    guard = await run_guard(Told(SMALL), (FIRST, ERROR), second=large)
    large.gate.clear()
    try:
        verdict = (await guard.stub.Classify(asked(says(0.6, 0.1), policy="lenient"))).verdict
        assert verdict.action == verdict_pb2.ACTION_BLOCK
        assert verdict.model.name == SMALL
        assert (verdict.model.tier, verdict.model.tier_reason) == ("first", "SECOND_UNABLE")
        refusal = await refused(guard.stub.Classify(asked(says(0.6, 0.1), policy="strict-one")))
    finally:
        large.gate.set()
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INTERNAL, "SECOND_UNABLE")
    assert "DEADLINE_EXCEEDED" in refusal.message
    assert refusal.metadata["on_unavailable"] == "flag"


async def test_an_overloaded_second_costs_no_time(run_guard: RunGuard) -> None:
    small, large = Told(SMALL), Told(LARGE)
    guard = await run_guard(
        small, (PATIENT,), second=large, max_queue_items=1, metrics=True, metrics_port=0
    )
    texts = [says(0.3 + at / 100, 0.9) for at in range(6)]

    async def tier(text: str) -> str:
        verdict = (await guard.stub.Classify(asked(text, policy="patient"))).verdict
        return str(verdict.model.tier_reason)

    large.gate.clear()
    try:
        running = asyncio.create_task(tier(texts[0]))
        await until(lambda: large.saw(texts[0]) == 1)
        waiting = asyncio.create_task(tier(texts[1]))
        await until(lambda: small.saw(texts[1]) == 1)
        assert {await tier(text) for text in texts[2:]} == {"SECOND_UNABLE"}
        assert not running.done() and not waiting.done()
    finally:
        large.gate.set()
    async with asyncio.timeout(PATIENCE_S):
        assert (await running, await waiting) == ("IN_BAND", "IN_BAND")
    lines = (await fetched(guard, "/metrics"))[1].splitlines()
    assert 'guard_second_unable_total{reason="OVERLOADED"} 4.0' in lines
    assert 'guard_cascade_verdicts_total{reason="SECOND_UNABLE",tier="first"} 4.0' in lines
    assert not any(line.startswith("guard_judgement_errors_total{") for line in lines)


async def test_a_second_that_fails_is_one_that_cannot(run_guard: RunGuard) -> None:
    large = Told(LARGE)
    guard = await run_guard(Told(SMALL), (FIRST, ERROR), second=large)

    def fails(texts: Sequence[str]) -> None:
        raise EngineFailed("no memory")

    large.before_run = fails
    verdict = (await guard.stub.Classify(asked(says(0.3, 0.9), policy="lenient"))).verdict
    assert verdict.action == verdict_pb2.ACTION_ALLOW
    assert verdict.model.tier_reason == "SECOND_UNABLE"
    refusal = await refused(guard.stub.Classify(asked(says(0.3, 0.9), policy="strict-one")))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INTERNAL, "SECOND_UNABLE")
    assert "ENGINE_FAILED" in refusal.message


@pytest.mark.parametrize("on_unscannable", ["flag", "error"])
async def test_an_image_without_the_second_is_what_the_policy_does_with_unread_ones(
    run_guard: RunGuard, on_unscannable: str
) -> None:
    policy = f"on_unscannable: {on_unscannable}\n" + FIRST
    large = Told(LARGE, sees_images=True)
    guard = await run_guard(Told(SMALL), (policy,), second=large)
    call = asked(with_picture(says(0.1, 0.1)), policy="lenient")
    large.gate.clear()
    try:
        if on_unscannable == "error":
            assert (await refused(guard.stub.Classify(call))).reason == "SECOND_UNABLE"
            return
        verdict = (await guard.stub.Classify(call)).verdict
    finally:
        large.gate.set()
    assert verdict.action == verdict_pb2.ACTION_FLAG
    assert verdict.model.tier_reason == "SECOND_UNABLE" and not verdict.coverage.complete


async def test_the_first_guard_goes_on_when_the_second_is_wanted_for_nothing(
    run_guard: RunGuard,
) -> None:
    large = Told(LARGE)
    guard = await run_guard(Told(SMALL), (ERROR,), second=large)
    large.gate.clear()
    try:
        verdict = (await guard.stub.Classify(asked(says(0.9, 0.1), policy="strict-one"))).verdict
    finally:
        large.gate.set()
    assert verdict.model.tier_reason == "OUTSIDE_BAND"


class Failing:
    """A guard that has no verdict, but the errors that it is told."""

    card = None

    def __init__(self) -> None:
        self.error: GuardServiceError = NotReady("away")
        self.limits: list[float] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def cards(self) -> tuple[ModelCard, ...]:
        return ()

    async def judge(self, *asked: object) -> Judgement:
        self.limits.append(float(str(asked[3])))
        await self.gate.wait()
        raise self.error


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Breaker:
    """A second guard whose answers and time are made here."""

    def __init__(self) -> None:
        self.guard, self.clock = Failing(), Clock()
        self.registry = CollectorRegistry()
        self.second = SecondGuard(self.guard, CascadeMetrics(self.registry), self.clock)
        self.policy = parse_policy("name: a\nversion: '1'\ncascade: {timeout_s: 2}\n")

    async def ask(self, error: GuardServiceError, left_s: float = 60.0) -> bool:
        """Whether the guard was asked; it answers with the error."""
        self.guard.error = error
        before = len(self.guard.limits)
        with pytest.raises(type(error)):
            await self.second.judge(Conversation.of(("user", "x")), self.policy, "", left_s)
        return len(self.guard.limits) > before

    @property
    def answers(self) -> float | None:
        return self.registry.get_sample_value("guard_second_answers")


AWAY = NotReady("away")


async def test_the_second_has_its_share_of_the_time_and_never_all_of_it() -> None:
    breaker = Breaker()
    await breaker.ask(AWAY, left_s=60.0)
    await breaker.ask(AWAY, left_s=1.0)
    assert breaker.guard.limits == [2.0, pytest.approx(0.8)]


@pytest.mark.parametrize(
    "error", [AWAY, ShuttingDown(), DeadlineExceeded("late")], ids=lambda one: one.reason
)
async def test_a_dead_second_is_let_be_and_tried_again_later(error: GuardServiceError) -> None:
    breaker = Breaker()
    for _ in range(FAILURES):
        assert breaker.answers == 1.0
        assert await breaker.ask(error)
    assert breaker.answers == 0.0
    assert not await breaker.ask(AWAY)
    breaker.clock.now += SHUT_S - 0.1
    assert not await breaker.ask(AWAY)
    breaker.clock.now += 0.2
    assert await breaker.ask(error)  # one tries
    assert not await breaker.ask(AWAY)
    breaker.clock.now += SHUT_S
    assert await breaker.ask(NotAssessed("it answers"))
    assert breaker.answers == 1.0
    assert await breaker.ask(error)


async def test_while_one_tries_the_others_do_not_wait_for_it() -> None:
    breaker = Breaker()
    for _ in range(FAILURES):
        await breaker.ask(AWAY)
    breaker.clock.now += SHUT_S
    breaker.guard.gate.clear()
    trial = asyncio.create_task(breaker.ask(AWAY))
    await until(lambda: len(breaker.guard.limits) == FAILURES + 1)
    with pytest.raises(NotReady, match="was not asked"):
        async with asyncio.timeout(PATIENCE_S):
            await breaker.second.judge(Conversation.of(("user", "x")), breaker.policy, "", 60.0)
    breaker.guard.gate.set()
    assert await trial


@pytest.mark.parametrize(
    "error",
    [Overloaded("full", 1.0), NotAssessed("failed"), ConversationTooLong("too long")],
    ids=lambda one: one.reason,
)
async def test_errors_that_it_answers_with_do_not_close_the_way(error: GuardServiceError) -> None:
    breaker = Breaker()
    for _ in range(3 * FAILURES):
        assert await breaker.ask(error)


async def test_short_deadlines_of_callers_neither_close_the_way_nor_open_it() -> None:
    breaker = Breaker()
    late = DeadlineExceeded("late")
    for _ in range(3 * FAILURES):
        assert await breaker.ask(late, left_s=0.01)
    for _ in range(FAILURES - 1):
        assert await breaker.ask(late)
    assert await breaker.ask(late, left_s=0.01)
    assert await breaker.ask(late)
    assert not await breaker.ask(AWAY)
