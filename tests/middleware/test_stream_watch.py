"""A verdict of a stream that was asked for comes in time, or is an error: with both clients."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from guard_api.v1 import guard_pb2
from guard_middleware import AsyncGuardClient, GuardClient, GuardError, Piece, StreamOutcome, Terms
from guard_middleware.stream_watch import Owed
from tests.middleware.fake_service import FakeService, serving, socket_in, verdict

TERMS = Terms(timeout_s=0.05, on_unavailable="block")


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def piece(text: str, check: bool = False, end: bool = False) -> guard_pb2.StreamPiece:
    return guard_pb2.StreamPiece(text=text, check=check, end=end)


def covers(chars: int, final: bool = False) -> guard_pb2.ClassifyStreamResponse:
    return guard_pb2.ClassifyStreamResponse(covered_chars=chars, final=final)


def test_a_verdict_is_owed_from_when_it_was_asked_for_until_it_covers_that() -> None:
    clock = Clock()
    owed = Owed(5.0, clock)
    owed.waits()
    owed.sends(piece("abc"))
    assert owed.due is None
    clock.now_s = 101.0
    owed.sends(piece("d", check=True))
    clock.now_s = 102.0
    owed.sends(piece("e", check=True))
    assert owed.due == 106.0  # the first that is owed counts
    clock.now_s = 103.0
    owed.hears(covers(4))
    owed.waits()
    assert owed.due == 108.0  # each answer shows that the guard lives
    owed.hears(covers(5))
    owed.waits()
    assert owed.due is None


def test_a_guard_is_not_late_while_nobody_waits_for_it() -> None:
    clock = Clock()
    owed = Owed(5.0, clock)
    owed.sends(piece("abc", check=True))
    clock.now_s = 120.0
    assert owed.due is None
    owed.waits()
    assert owed.due == 125.0


def test_the_last_verdict_is_owed_even_where_nothing_was_said_since() -> None:
    clock = Clock()
    owed = Owed(5.0, clock)
    owed.sends(piece("abc", check=True))
    owed.hears(covers(3))
    owed.waits()
    assert owed.due is None
    owed.sends(piece("", end=True))
    assert owed.due == 105.0
    owed.hears(covers(3, final=True))
    assert owed.due is None


class Hangs(FakeService):
    """Reads streams, gives some verdicts, and then says nothing any more."""

    def __init__(self, verdicts: int = 0) -> None:
        super().__init__()
        self._left = verdicts
        self.cancelled = threading.Event()

    def ClassifyStream(
        self, request_iterator: Iterator[Any], context: grpc.ServicerContext
    ) -> Iterator[guard_pb2.ClassifyStreamResponse]:
        context.add_callback(self.cancelled.set)
        covered = 0
        for step in request_iterator:
            covered += len(step.piece.text)
            if self._left and step.piece.check:
                self._left -= 1
                yield guard_pb2.ClassifyStreamResponse(verdict=verdict(), covered_chars=covered)
        self.cancelled.wait(60)


Pieces = list[Piece | str]


def blocking(target: str, pieces: Pieces) -> list[StreamOutcome]:
    with GuardClient(target, TERMS) as guard:
        return list(guard.classify_stream("hi", pieces))


def awaited(target: str, pieces: Pieces) -> list[StreamOutcome]:
    async def outcomes() -> list[StreamOutcome]:
        async def growing() -> AsyncIterator[Piece | str]:
            for one in pieces:
                yield one

        async with AsyncGuardClient(target, TERMS) as guard:
            return [one async for one in guard.classify_stream("hi", growing())]

    return asyncio.run(outcomes())


@pytest.mark.parametrize("read", [blocking, awaited])
@pytest.mark.parametrize(
    "pieces",
    [[Piece("ab", check=True)], [Piece("ab", check=True), Piece("cd", check=True)], ["ab"]],
)
def test_verdict_that_does_not_come_ends_the_stream_and_the_call(
    read: Callable[[str, Pieces], list[StreamOutcome]], pieces: Pieces, tmp_path: Path
) -> None:
    service = Hangs(verdicts=len(pieces) - 1)
    with serving(service, socket_in(tmp_path)) as target:
        *judged, last = read(target, pieces)
        assert service.cancelled.wait(60)
    assert [one.covered_chars for one in judged] == [2] * (len(pieces) - 1)
    assert last.final and last.outcome.blocked and not last.outcome.judged
    assert last.outcome.reason == "DEADLINE_EXCEEDED"


def test_error_of_the_pieces_is_the_blocking_streams_error(target: str) -> None:
    def failing() -> Iterator[Piece | str]:
        yield "ab"
        raise RuntimeError("upstream broke")

    with (
        GuardClient(target, Terms(on_unavailable="allow")) as guard,
        pytest.raises(RuntimeError, match="upstream broke"),
    ):
        list(guard.classify_stream("hi", failing()))


def test_no_thread_is_left_behind_by_a_stream_that_is_left(target: str) -> None:
    with GuardClient(target, Terms()) as guard:
        stream = guard.classify_stream("hi", [Piece("ab", check=True), "cd"])
        assert next(stream).covered_chars == 2
        stream.close()  # type: ignore[attr-defined]
    assert "guard-stream-watch" not in {thread.name for thread in threading.enumerate()}


def test_error_that_was_declared_to_be_raised_is_raised(tmp_path: Path) -> None:
    with (
        serving(Hangs(), socket_in(tmp_path)) as target,
        GuardClient(target, Terms(timeout_s=0.05)) as guard,
        pytest.raises(GuardError, match="in time"),
    ):
        list(guard.classify_stream("hi", ["ab"]))
