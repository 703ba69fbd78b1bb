"""The queue in front of the engine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest

from guard_policies.assessment import Direction
from guard_service.batcher import Batcher, Limits, Ran, tokens_of
from guard_service.conversation import Conversation
from guard_service.engines import Assessed
from guard_service.engines.fake import FakeEngine
from guard_service.errors import NotAssessed, NotReady, Overloaded, ShuttingDown
from guard_service.prompt import Prompt
from tests.service.asking import until

LIMITS = Limits(
    queue_items=100,
    queue_tokens=100_000,
    batch_items=8,
    batch_tokens=4_000,
    engine_timeout_s=20.0,
)
PATIENCE_S = 30.0
MakeBatcher = Callable[..., Batcher]


class Gated(FakeEngine):
    """Runs only while the gate is open; `entered` counts runs that began."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.before_run = self._wait
        self.culprit = ""

    def _wait(self, texts: Sequence[str]) -> None:
        self.gate.wait(20)
        if self.culprit and any(self.culprit in text for text in texts):
            raise RuntimeError("poisoned")

    def prompt(self, text: str) -> Prompt:
        """The prompt of a user's text."""
        built = self.prompt_builder().build(Conversation.of(("user", text)), (), Direction.PROMPT)
        return built.prompts[0]


@pytest.fixture
async def make() -> AsyncIterator[MakeBatcher]:
    """Makes started batchers and closes them."""
    made: list[tuple[Batcher, Gated]] = []

    def start(engine: Gated, limits: Limits = LIMITS, **hooks: Any) -> Batcher:
        batcher = Batcher(engine, limits, **hooks)
        batcher.start()
        made.append((batcher, engine))
        return batcher

    yield start
    for batcher, engine in made:
        engine.gate.set()
        await batcher.close()


def _ask(batcher: Batcher, engine: Gated, *texts: str) -> asyncio.Task[Ran]:
    prompts = [engine.prompt(text) for text in texts]
    return asyncio.create_task(batcher.assess(prompts, PATIENCE_S))


async def _occupy(batcher: Batcher, engine: Gated) -> asyncio.Task[Ran]:
    """Let a first run begin, so that what follows queues."""
    task = _ask(batcher, engine, "first")
    await until(lambda: len(engine.batches) == 1)
    return task


async def test_results_come_back_in_order_with_their_times(make: MakeBatcher) -> None:
    engine = Gated()
    batcher = make(engine)
    engine.gate.set()
    ran = await _ask(batcher, engine, "a", "fake-bomb", "b")
    assert [result.assessment.unsafe_score > 0.5 for result in ran.results] == [False, True, False]
    assert ran.queue_s >= 0 and ran.inference_s > 0


async def test_what_queues_is_run_together_within_the_padded_budget(make: MakeBatcher) -> None:
    engine = Gated()
    budget = 3 * tokens_of(engine.prompt("x" * 50))
    limits = Limits(100, 100_000, batch_items=8, batch_tokens=budget, engine_timeout_s=20.0)
    batcher = make(engine, limits)
    first = await _occupy(batcher, engine)
    tasks = [_ask(batcher, engine, "x" * 50) for _ in range(7)]
    await until(lambda: batcher.queued_items == 7)
    engine.gate.set()
    await asyncio.gather(first, *tasks)
    assert [len(texts) for texts in engine.batches] == [1, 3, 3, 1]


async def test_the_oldest_is_never_passed_over_and_alike_lengths_meet(make: MakeBatcher) -> None:
    engine = Gated()
    budget = 2 * tokens_of(engine.prompt("x" * 400))
    limits = Limits(100, 100_000, batch_items=8, batch_tokens=budget, engine_timeout_s=20.0)
    batcher = make(engine, limits)
    first = await _occupy(batcher, engine)
    lengths = (400, 10, 10, 400, 10)
    tasks = [_ask(batcher, engine, "x" * length) for length in lengths]
    await until(lambda: batcher.queued_items == 5)
    engine.gate.set()
    await asyncio.gather(first, *tasks)
    runs = [[text.count("x") for text in texts] for texts in engine.batches]
    assert runs[1:] == [[400, 400], [10, 10, 10]]


async def test_a_full_queue_refuses_at_once_and_says_when_to_retry(make: MakeBatcher) -> None:
    engine = Gated()
    batcher = make(engine, Limits(3, 100_000, 8, 4_000, 20.0))
    first = await _occupy(batcher, engine)
    waiting = [_ask(batcher, engine, "x") for _ in range(3)]
    await until(lambda: batcher.queued_items == 3)
    with pytest.raises(Overloaded) as caught:
        await batcher.assess([engine.prompt("x")], PATIENCE_S)
    assert caught.value.retry_after_s and 0 < caught.value.retry_after_s <= 30
    engine.gate.set()
    await asyncio.gather(first, *waiting)
    assert (batcher.queued_items, batcher.queued_tokens) == (0, 0)


async def test_queued_tokens_are_bounded_and_one_long_request_still_fits(
    make: MakeBatcher,
) -> None:
    engine = Gated()
    batcher = make(engine, Limits(100, 200, 8, 4_000, 20.0))
    first = await _occupy(batcher, engine)
    long = _ask(batcher, engine, "x" * 300)
    await until(lambda: batcher.queued_items == 1)
    with pytest.raises(Overloaded):
        await batcher.assess([engine.prompt("x")], PATIENCE_S)
    engine.gate.set()
    await asyncio.gather(first, long)


async def test_a_wait_longer_than_the_deadline_is_refused_at_once(make: MakeBatcher) -> None:
    engine = Gated()
    ticks = iter(range(10**6))
    batcher = make(engine, clock=lambda: float(next(ticks)))  # each look at the clock: a second
    engine.gate.set()
    await _ask(batcher, engine, "x" * 100)
    engine.gate.clear()
    first = _ask(batcher, engine, "first")
    await until(lambda: len(engine.batches) == 2)
    waiting = _ask(batcher, engine, "x" * 300)
    await until(lambda: batcher.queued_items == 1)
    with pytest.raises(Overloaded, match="deadline"):
        await batcher.assess([engine.prompt("x")], 0.5)
    engine.gate.set()
    await asyncio.gather(first, waiting)


async def test_work_whose_caller_is_gone_never_reaches_the_engine(make: MakeBatcher) -> None:
    engine = Gated()
    batcher = make(engine)
    first = await _occupy(batcher, engine)
    gone, stays = _ask(batcher, engine, "gone", "gone too"), _ask(batcher, engine, "stays")
    await until(lambda: batcher.queued_items == 3)
    gone.cancel()
    await until(lambda: batcher.queued_items == 1)
    engine.gate.set()
    await asyncio.gather(first, stays)
    assert engine.batches[1:] == [("User: stays\n\n",)]


async def test_a_prompt_that_fails_the_engine_fails_alone(make: MakeBatcher) -> None:
    engine = Gated()
    batcher = make(engine)
    first = await _occupy(batcher, engine)
    engine.culprit = "poison"
    tasks = [_ask(batcher, engine, text) for text in ("a", "poison", "b")]
    await until(lambda: batcher.queued_items == 3)
    engine.gate.set()
    await first
    a, poison, b = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(a, Ran) and isinstance(b, Ran)
    assert isinstance(poison, NotAssessed) and "poison" not in str(poison)


class Resumed:
    """A session that holds a number of tokens of whatever comes."""

    def __init__(self, engine: Gated, held: int) -> None:
        self._engine = engine
        self._held = held

    def assess(self, prompts: Sequence[Prompt]) -> list[Assessed]:
        """As the engine."""
        return self._engine.assess(prompts)

    def held(self, prompt: Prompt) -> int:
        """The same for all."""
        return self._held

    def close(self) -> None:
        """There is nothing to free."""


async def test_a_sessions_prompts_run_by_themselves_and_count_for_what_is_new(
    make: MakeBatcher,
) -> None:
    engine = Gated()
    batcher = make(engine)
    first = await _occupy(batcher, engine)
    grown = [engine.prompt("y" * 50), engine.prompt("y" * 60)]
    asked = batcher.assess(grown, PATIENCE_S, Resumed(engine, held=40))
    tasks = [asyncio.create_task(asked), *(_ask(batcher, engine, "x") for _ in range(2))]
    await until(lambda: batcher.queued_items == 4)
    whole = sum(map(tokens_of, [*grown, *[engine.prompt("x")] * 2]))
    assert batcher.queued_tokens == whole - 2 * 40
    engine.culprit = "y" * 60
    engine.gate.set()
    failed, *others = await asyncio.gather(*tasks, return_exceptions=True)
    await first
    assert isinstance(failed, NotAssessed) and all(isinstance(one, Ran) for one in others)
    runs = [[text.count("y") for text in texts] for texts in engine.batches]
    assert runs == [[0], [50], [60], [0, 0]]


async def test_a_dead_worker_is_told_and_nothing_hangs(make: MakeBatcher) -> None:
    engine = Gated()
    health: list[bool] = []
    batcher = make(engine, Limits(100, 10_000, 8, 4_000, 0.2), on_health=health.append)

    def die(texts: Sequence[str]) -> None:
        raise SystemExit

    engine.before_run = die
    with pytest.raises(NotReady):
        await _ask(batcher, engine, "x")
    assert health == [False] and not batcher.healthy
    with pytest.raises(NotReady):
        await batcher.assess([engine.prompt("x")], PATIENCE_S)


async def test_a_hanging_worker_is_told_and_may_come_back(make: MakeBatcher) -> None:
    engine = Gated()
    health: list[bool] = []
    batcher = make(engine, Limits(100, 10_000, 8, 4_000, 0.2), on_health=health.append)
    first, waiting = await _occupy(batcher, engine), _ask(batcher, engine, "x")
    for task in (first, waiting):
        with pytest.raises(NotReady):
            await task
    assert health == [False]
    engine.gate.set()
    await until(lambda: health == [False, True])
    assert (await _ask(batcher, engine, "x")).results


async def test_closing_fails_what_waits_and_finishes_what_runs(make: MakeBatcher) -> None:
    engine = Gated()
    batcher = make(engine)
    running, waiting = await _occupy(batcher, engine), _ask(batcher, engine, "x")
    await until(lambda: batcher.queued_items == 1)
    closing = asyncio.create_task(batcher.close())
    with pytest.raises(ShuttingDown):
        await waiting
    engine.gate.set()
    await closing
    assert (await running).results
    with pytest.raises(ShuttingDown):
        await batcher.assess([engine.prompt("x")], PATIENCE_S)
