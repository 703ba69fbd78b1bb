"""Fair shares of the queue: a tenant's flood is its own affair."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import pytest

from guard_service.batcher import Batcher, Limits, Ran, tokens_of
from guard_service.errors import Overloaded
from guard_service.security.shares import Shares
from guard_service.security.whose import WHOSE
from tests.service.asking import until
from tests.service.test_batcher import PATIENCE_S, Gated

ONE_BY_ONE = Limits(10, 100_000, batch_items=1, batch_tokens=4_000, engine_timeout_s=60.0)


@dataclass(frozen=True, slots=True)
class Job:
    whose: str
    tokens: int = 10


def jobs(owners: str) -> list[Job]:
    return [Job(owner) for owner in owners]


def holding(waiting: Sequence[Job]) -> Shares:
    shares = Shares()
    shares.join(waiting)
    return shares


def served(shares: Shares, waiting: Sequence[Job]) -> str:
    """Whose turn it is, one after the other, until all have been served."""
    order = ""
    while waiting:
        first, *waiting = shares.in_turn(waiting)
        shares.leave(first)
        shares.serve([first])
        order += first.whose
    return order


def in_turn(owners: str) -> str:
    return served(holding(jobs(owners)), jobs(owners))


def test_who_waits_is_served_in_turn_however_much_others_ask() -> None:
    assert in_turn("aaaaaaab").index("b") <= 1
    assert {*in_turn("aaabbbccc")[:3]} == {"a", "b", "c"}
    assert {*in_turn("aaabbbccc")[3:6]} == {"a", "b", "c"}
    assert in_turn("") == "" and in_turn("aaa") == "aaa"


def test_a_pause_earns_nothing() -> None:
    shares = holding(jobs("aaaabbbb"))
    for _ in range(100):
        shares.serve([Job("a")])
    assert served(shares, jobs("aaaabbbb"))[:4].count("b") in (2, 3)


def test_costly_prompts_count_for_what_they_cost() -> None:
    waiting = [Job("a", 100)] * 3 + [Job("b", 10)] * 12
    order = served(holding(waiting), waiting)
    assert order.index("a", order.index("a") + 1) >= 10


def way(owners: str, whose: str, tokens: int, over_items: int) -> int | None:
    """How many give way."""
    waiting = jobs(owners)
    shares = holding(waiting)
    leaving = shares.giving_way(reversed(waiting), whose, tokens, over_items, 0)
    assert leaving is None or {job.whose for job in leaving} <= {"a"}
    return None if leaving is None else len(leaving)


def test_who_has_most_gives_way_and_never_more_than_is_fair() -> None:
    assert way("aaaaab", "c", 10, 1) == 1
    assert way("aaaaab", "b", 10, 2) == 2
    assert way("aaaaab", "b", 50, 5) is None
    assert way("aaaaab", "a", 10, 1) is None
    assert way("aabb", "a", 10, 1) is None
    assert way("aaaaab", "c", 10, 0) == 0


def test_what_is_ahead_is_as_much_of_others_as_of_ones_own() -> None:
    assert holding(jobs("aaaaaaaaab")).ahead("c") == 0
    assert holding(jobs("aaaaaaaaab")).ahead("b") == 20
    assert holding(jobs("aaa")).ahead("a") == 30


@pytest.fixture
async def engine() -> Gated:
    return Gated()


@pytest.fixture
async def batcher(engine: Gated) -> AsyncIterator[Batcher]:
    made = Batcher(engine, ONE_BY_ONE)
    made.start()
    yield made
    engine.gate.set()
    await made.close()


def ask(batcher: Batcher, engine: Gated, whose: str, text: str) -> asyncio.Task[Ran]:
    WHOSE.set(whose)
    return asyncio.create_task(batcher.assess([engine.prompt(text)], PATIENCE_S))


async def test_a_flood_does_not_keep_another_tenant_waiting(
    batcher: Batcher, engine: Gated
) -> None:
    flood = [ask(batcher, engine, "flood", f"flood {at}") for at in range(8)]
    await until(lambda: batcher.queued_items == 7)
    other = ask(batcher, engine, "other", "other")
    await until(lambda: batcher.queued_items == 8)
    engine.gate.set()
    await asyncio.gather(*flood, other)
    order = ["other" in texts[0] for texts in engine.batches]
    assert order.index(True) <= 2


async def test_a_full_queue_has_room_for_who_has_none_of_it(
    batcher: Batcher, engine: Gated
) -> None:
    flood = [ask(batcher, engine, "flood", "flood 00")]
    await until(lambda: len(engine.batches) == 1)
    flood += [ask(batcher, engine, "flood", f"flood {at:02}") for at in range(1, 11)]
    await until(lambda: batcher.queued_items == 10)
    held = batcher.queued_tokens
    with pytest.raises(Overloaded):
        await ask(batcher, engine, "flood", "flood 11")
    other = ask(batcher, engine, "other", "other 00")
    with pytest.raises(Overloaded) as caught:
        await flood[-1]  # the newest gives way
    assert caught.value.retry_after_s
    assert batcher.queued_items == 10
    assert batcher.queued_tokens == held
    assert tokens_of(engine.prompt("other 00")) == tokens_of(engine.prompt("flood 00"))
    engine.gate.set()
    results = await asyncio.gather(*flood[:-1], other)
    assert len(results) == 11
    assert batcher.queued_tokens == 0
