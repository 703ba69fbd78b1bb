"""The asyncio client: the same behaviour, awaited."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from guard_middleware import (
    Action,
    AsyncGuardClient,
    GuardError,
    InvalidRequest,
    Piece,
    Retries,
    Terms,
    Unavailable,
    Unjudged,
    Verdict,
)
from tests.middleware.fake_service import FakeService, Refusal, socket_in, verdict

ONCE = Retries(attempts=1)
GONE = Refusal(grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
FULL = Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", retry_after_s=0.25)


async def test_verdict_arrives_and_retries_wait(service: FakeService, target: str) -> None:
    service.script = [FULL]
    pauses: list[float] = []

    async def sleep(pause_s: float) -> None:
        pauses.append(pause_s)

    async with AsyncGuardClient(target, Terms(draw=lambda: 0.5), sleep=sleep) as guard:
        found = await guard.classify("a")
    assert isinstance(found, Verdict) and found.allowed
    assert pauses == pytest.approx([0.30])


async def test_bad_request_is_raised_whatever_was_declared(
    service: FakeService, target: str
) -> None:
    service.script = [Refusal(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_CONVERSATION")]
    async with AsyncGuardClient(target, Terms(on_unavailable="allow")) as guard:
        with pytest.raises(InvalidRequest):
            await guard.classify("a")


async def test_policys_own_fallback_is_learnt_beforehand(service: FakeService, target: str) -> None:
    service.script = [GONE]
    async with AsyncGuardClient(target, Terms(retries=ONCE, on_unavailable="policy")) as guard:
        found = await guard.classify("a")
    assert isinstance(found, Unjudged) and found.action is Action.FLAG


async def test_a_server_s_cancellation_is_unavailable_and_tried_again(
    service: FakeService, target: str
) -> None:
    service.script = [Refusal(grpc.StatusCode.CANCELLED), verdict()]
    terms = Terms(on_unavailable="raise", draw=lambda: 0.0)
    async with AsyncGuardClient(target, terms) as guard:
        assert isinstance(await guard.classify("a"), Verdict)


async def test_batch_answers_item_by_item(service: FakeService, target: str) -> None:
    service.script = [verdict(), Refusal(grpc.StatusCode.INTERNAL)]
    async with AsyncGuardClient(target) as guard:
        first, second = await guard.classify_batch(["a", "b"])
    assert isinstance(first, Verdict)
    assert isinstance(second, GuardError) and not second.judged


async def test_items_that_failed_for_the_moment_are_asked_again(
    service: FakeService, target: str
) -> None:
    service.script = [Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED), verdict(), verdict(score=0.3)]
    async with AsyncGuardClient(target, Terms(draw=lambda: 0.0)) as guard:
        first, second = await guard.classify_batch(["a", "b"])
    assert isinstance(first, Verdict) and first.unsafe_score == pytest.approx(0.3)
    assert isinstance(second, Verdict) and service.batches == [["a", "b"], ["a"]]


async def growing(*pieces: Piece | str) -> AsyncIterator[Piece | str]:
    for piece in pieces:
        yield piece


async def test_stream_yields_verdicts_as_asked_and_a_final_one(target: str) -> None:
    async with AsyncGuardClient(target) as guard:
        stream = guard.classify_stream("hi", growing(Piece("ab", check=True), "cd"))
        found = [(one.covered_chars, one.final) async for one in stream]
    assert found == [(2, False), (4, True)]


async def test_broken_stream_ends_with_what_was_declared(service: FakeService, target: str) -> None:
    service.script = [GONE]
    async with AsyncGuardClient(target, Terms(on_unavailable="block")) as guard:
        found = [one async for one in guard.classify_stream("hi", growing("ab"))]
    assert [one.outcome.judged for one in found] == [False]
    assert found[0].outcome.blocked and found[0].final


async def test_a_write_does_not_hide_that_the_stream_was_refused(
    service: FakeService, target: str
) -> None:
    """Else content could choose to be "not judged", which may be declared to be allowed."""

    async def much() -> AsyncIterator[Piece | str]:
        for _ in range(50):
            yield Piece("x" * 200, check=True)
            await asyncio.sleep(0)

    terms = Terms(on_unavailable="allow")
    async with AsyncGuardClient(target, terms) as guard:
        for _ in range(100):
            service.script = [Refusal(grpc.StatusCode.INVALID_ARGUMENT, "CONVERSATION_TOO_LONG")]
            with pytest.raises(InvalidRequest, match="CONVERSATION_TOO_LONG"):
                async for _ in guard.classify_stream("hi", much()):
                    pass


async def test_error_of_the_pieces_is_the_streams_error(target: str) -> None:
    async def failing() -> AsyncIterator[Piece | str]:
        yield "ab"
        raise RuntimeError("upstream broke")

    async with AsyncGuardClient(target) as guard:
        with pytest.raises(RuntimeError, match="upstream broke"):
            async for _ in guard.classify_stream("hi", failing()):
                pass


async def test_leaving_a_stream_early_leaves_nothing_behind(target: str) -> None:
    async with AsyncGuardClient(target) as guard:
        stream = guard.classify_stream("hi", growing(Piece("ab", check=True), "cd"))
        async for _ in stream:
            break
        await stream.aclose()  # type: ignore[attr-defined]
        assert "guard-stream-sender" not in {task.get_name() for task in asyncio.all_tasks()}


async def test_info_policies_and_health_are_told(target: str) -> None:
    async with AsyncGuardClient(target) as guard:
        assert (await guard.info()).version == "9.9.9"
        assert (await guard.list_policies()).default_policy == "default"
        assert await guard.health()


async def test_nobody_listening_is_unavailable(tmp_path: Path) -> None:
    async with AsyncGuardClient(socket_in(tmp_path), Terms(retries=ONCE)) as guard:
        with pytest.raises(Unavailable):
            await guard.classify("a")
