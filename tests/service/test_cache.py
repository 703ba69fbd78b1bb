"""The verdict cache and the one run for identical callers."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from guard_policies.assessment import Direction
from guard_service.cache import LruCache, SingleFlight, key_of
from guard_service.prompt import Prompt

PROMPT = Prompt(Direction.PROMPT, (1, 2), (3, 4), (5,))


def test_the_least_recently_used_entry_goes_first() -> None:
    cache: LruCache[int] = LruCache(2)
    cache.put(b"a", 1)
    cache.put(b"b", 2)
    assert cache.get(b"a") == 1
    cache.put(b"c", 3)
    assert (cache.get(b"a"), cache.get(b"b"), cache.get(b"c"), len(cache)) == (1, None, 3, 2)


def test_a_cache_of_no_entries_keeps_nothing() -> None:
    cache: LruCache[int] = LruCache(0)
    cache.put(b"a", 1)
    assert cache.get(b"a") is None


def test_everything_that_can_change_a_verdict_changes_the_key() -> None:
    keys = {
        key_of("m", "p", Direction.PROMPT, "", [PROMPT]),
        key_of("n", "p", Direction.PROMPT, "", [PROMPT]),
        key_of("m", "q", Direction.PROMPT, "", [PROMPT]),
        key_of("mp", "", Direction.PROMPT, "", [PROMPT]),
        key_of("m", "p", Direction.RESPONSE, "", [PROMPT]),
        key_of("m", "p", Direction.PROMPT, "de", [PROMPT]),
        key_of("m", "p", Direction.PROMPT, "", [PROMPT, PROMPT]),
        key_of("m", "p", Direction.PROMPT, "", [replace(PROMPT, prefix=(1,), body=(2, 3, 4))]),
        key_of("m", "p", Direction.PROMPT, "", [replace(PROMPT, body=(3,), closing=(4, 5))]),
        key_of("m", "p", Direction.PROMPT, "", [replace(PROMPT, body=(3, 128255))]),
    }
    assert len(keys) == 10


async def test_identical_callers_share_one_run() -> None:
    flights: SingleFlight[int] = SingleFlight()
    runs, gate = [], asyncio.Event()

    async def compute() -> int:
        runs.append(1)
        await gate.wait()
        return 7

    callers = [asyncio.create_task(flights.run(b"k", compute)) for _ in range(3)]
    await asyncio.sleep(0)
    gate.set()
    assert await asyncio.gather(*callers) == [(7, False), (7, True), (7, True)]
    assert await flights.run(b"k", compute) == (7, False)
    assert len(runs) == 2


async def test_a_run_goes_on_while_anyone_waits_and_stops_with_the_last() -> None:
    flights: SingleFlight[int] = SingleFlight()
    ended: list[str] = []
    gate = asyncio.Event()

    async def compute() -> int:
        try:
            await gate.wait()
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise
        return 7

    first, second = (asyncio.create_task(flights.run(b"k", compute)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.sleep(0)
    assert not ended
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    await asyncio.sleep(0)
    assert ended == ["cancelled"]


async def test_a_failure_reaches_every_caller_and_is_not_kept() -> None:
    flights: SingleFlight[int] = SingleFlight()

    async def fail() -> int:
        await asyncio.sleep(0)
        raise ValueError("no")

    async def succeed() -> int:
        return 1

    failed = await asyncio.gather(
        *(flights.run(b"k", fail) for _ in range(2)), return_exceptions=True
    )
    assert [type(error) for error in failed] == [ValueError, ValueError]
    assert await flights.run(b"k", succeed) == (1, False)
