"""More callers than the service can bear: each gets an answer, none hangs, the queue is bounded."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter

import grpc

from guard_service.engines.fake import FakeEngine
from tests.service.asking import Running, asked, piece, refusal_of, refused, start, until
from tests.service.conftest import RunGuard

QUEUE, BATCH = 16, 8
CALLERS = 10 * (QUEUE + BATCH)


async def _outcome(guard: Running, text: str) -> str:
    try:
        await guard.stub.Classify(asked(text), timeout=60)
    except grpc.aio.AioRpcError as error:
        refusal = refusal_of(error)
        if refusal.reason == "OVERLOADED":
            assert refusal.retry_s and 0 < refusal.retry_s <= 30
            assert refusal.metadata["on_unavailable"] == "block"
        return refusal.code.name
    return "OK"


async def test_every_caller_at_ten_times_capacity_gets_an_answer(run_guard: RunGuard) -> None:
    gate = threading.Event()
    engine = FakeEngine()
    guard = await run_guard(engine, max_queue_items=QUEUE, batch_items=BATCH)
    engine.before_run = lambda texts: (gate.wait(20), None)[1]
    tasks = [asyncio.create_task(_outcome(guard, f"caller {n}")) for n in range(CALLERS)]
    await until(lambda: sum(task.done() for task in tasks) >= CALLERS - QUEUE - BATCH)
    assert guard.server.batcher.queued_items == QUEUE
    gate.set()
    outcomes = Counter(await asyncio.gather(*tasks))
    assert set(outcomes) == {"OK", "RESOURCE_EXHAUSTED"}
    assert QUEUE < outcomes["OK"] <= QUEUE + BATCH
    assert guard.server.batcher.queued_items == guard.server.batcher.queued_tokens == 0
    assert await _outcome(guard, "afterwards") == "OK"


async def test_calls_and_bytes_in_progress_are_bounded(run_guard: RunGuard) -> None:
    gate = threading.Event()
    engine = FakeEngine(window_tokens=4_000)
    guard = await run_guard(engine, max_calls=3, max_call_bytes=2000)
    engine.before_run = lambda texts: (gate.wait(20), None)[1]
    done = len(engine.batches)
    big = guard.stub.Classify(asked("x" * 1500))
    await until(lambda: len(engine.batches) > done)
    refusal = await refused(guard.stub.Classify(asked("y" * 1500)))
    assert (refusal.reason, "bytes" in refusal.message) == ("OVERLOADED", True)
    small = [guard.stub.Classify(asked(f"small {n}")) for n in range(2)]
    await until(lambda: guard.server.batcher.queued_items == 2)
    refusal = await refused(guard.stub.Classify(asked("one more")))
    assert (refusal.reason, "calls" in refusal.message) == ("OVERLOADED", True)
    assert refusal.retry_s
    gate.set()
    await asyncio.gather(big, *small)


async def test_no_call_of_a_burst_is_cancelled_by_grpc_itself(run_guard: RunGuard) -> None:
    """gRPC cancels calls beyond a thousand that Python has not looked at; callers need a reason."""
    guard = await run_guard(FakeEngine())

    async def code(number: int) -> grpc.StatusCode:
        try:
            await guard.stub.Classify(asked(f"caller {number}"), timeout=240)
        except grpc.aio.AioRpcError as error:
            return error.code()
        return grpc.StatusCode.OK

    codes = Counter(await asyncio.gather(*(code(number) for number in range(3_000))))
    assert set(codes) <= {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}


async def test_streams_of_a_new_connection_are_told_why_there_is_no_room(
    run_guard: RunGuard,
) -> None:
    guard = await run_guard(max_calls=2)

    async def told() -> str:
        call = guard.stub.ClassifyStream(iter([start("hi"), piece("x", end=True)]))
        try:
            return "OK" if [reply async for reply in call][-1].final else "not to its end"
        except grpc.aio.AioRpcError as error:
            return refusal_of(error).reason

    outcomes = Counter(await asyncio.gather(*(told() for _ in range(200))))
    assert set(outcomes) == {"OK", "OVERLOADED"}
