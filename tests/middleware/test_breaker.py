"""A guard that does not answer is left alone for a while, and nothing passes meanwhile."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from guard_api.v1 import guard_pb2
from guard_middleware import GuardClient
from guard_middleware.breaker import Breaker, Breaking, CircuitOpen
from guard_middleware.calls import Piece
from guard_middleware.client import AsyncGuardClient
from guard_middleware.errors import (
    BadReply,
    DeadlineExceeded,
    EngineFailed,
    GuardError,
    InvalidRequest,
    Overloaded,
    Unavailable,
)
from guard_middleware.guards import RemoteGuard
from guard_middleware.retry import Retries
from guard_middleware.settings import Settings
from guard_middleware.terms import Terms
from tests.middleware.asgi_calls import Backend, call
from tests.middleware.fake_service import FakeService, Refusal, serving, socket_in, verdict
from tests.middleware.formats.openai_replies import PATH, asking
from tests.middleware.wrapped import Wrapped

GONE = Refusal(grpc.StatusCode.UNAVAILABLE)


@dataclass
class Clock:
    now_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s


def failing(breaker: Breaker, error: GuardError, times: int) -> None:
    for _ in range(times):
        breaker.enter()
        breaker.settle(error)


@pytest.mark.parametrize("error", [Unavailable("gone"), DeadlineExceeded("late")])
def test_circuit_opens_after_failures_in_a_row_and_one_call_tries_again(error: GuardError) -> None:
    clock = Clock()
    breaker = Breaker(Breaking(3, 2.0), clock)
    failing(breaker, error, 2)
    breaker.enter()
    breaker.settle(None)
    failing(breaker, error, 3)
    with pytest.raises(CircuitOpen):
        breaker.enter()
    clock.now_s += 2.0
    breaker.enter()
    with pytest.raises(CircuitOpen):  # one tries, the others do not
        breaker.enter()
    breaker.settle(error)
    with pytest.raises(CircuitOpen):
        breaker.enter()
    clock.now_s += 2.0
    breaker.enter()
    breaker.settle(None)
    breaker.enter()
    breaker.enter()


def test_call_that_tried_and_was_left_keeps_nobody_out_for_longer() -> None:
    clock = Clock()
    breaker = Breaker(Breaking(1, 2.0), clock)
    failing(breaker, Unavailable("gone"), 1)
    for _ in range(3):
        clock.now_s += 2.0
        breaker.enter()


@pytest.mark.parametrize(
    "error", [Overloaded("full"), EngineFailed("own"), BadReply("odd"), InvalidRequest("long")]
)
def test_what_depends_on_the_request_opens_nothing(error: GuardError) -> None:
    breaker = Breaker(Breaking(1), Clock())
    failing(breaker, error, 9)


def test_there_is_no_breaker_unless_one_is_wanted() -> None:
    failing(Terms().breaker(), Unavailable("gone"), 99)
    with pytest.raises(ValueError, match="neither negative"):
        Breaking(-1)


ONCE = Retries(attempts=1)


async def test_guard_that_is_down_is_not_asked_again_by_any_kind_of_call(
    service: FakeService, target: str
) -> None:
    service.script = [GONE]
    clock = Clock()
    terms = Terms(retries=ONCE, breaking=Breaking(1, 5.0), clock=clock)
    async with AsyncGuardClient(target, terms) as guard:
        with pytest.raises(Unavailable):
            await guard.classify("a")
        with pytest.raises(CircuitOpen):
            await guard.classify("b")
        with pytest.raises(CircuitOpen):
            await guard.classify_batch(["c"])
        with pytest.raises(CircuitOpen):
            async for _ in guard.classify_stream("d", pieces("e")):
                pass
        assert len(service.asked) == 1
        clock.now_s += 5.0
        assert (await guard.classify("f")).judged
        assert (await guard.classify("g")).judged


def test_blocking_client_has_one_too(service: FakeService, target: str) -> None:
    service.script = [GONE]
    with GuardClient(target, Terms(retries=ONCE, breaking=Breaking(1), clock=Clock())) as guard:
        with pytest.raises(Unavailable):
            guard.classify("a")
        with pytest.raises(CircuitOpen):
            guard.classify("b")
        with pytest.raises(CircuitOpen):
            list(guard.classify_stream("d", ["e"]))
        assert len(service.asked) == 1


async def test_streams_that_break_open_the_circuit(service: FakeService, target: str) -> None:
    service.script = [GONE]
    terms = Terms(retries=ONCE, breaking=Breaking(1), clock=Clock(), on_unavailable="block")
    async with AsyncGuardClient(target, terms) as guard:
        outcomes = [one async for one in guard.classify_stream("d", pieces("e"))]
        assert outcomes[-1].outcome.blocked
        outcome = await guard.classify("b")
        assert not outcome.judged and outcome.reason == "CIRCUIT_OPEN" and outcome.blocked


@pytest.mark.parametrize(("choice", "bodies"), [("block", 0), ("allow", 1)])
async def test_what_is_set_for_a_guard_that_cannot_be_asked_holds_while_the_circuit_is_open(
    service: FakeService, target: str, choice: str, bodies: int
) -> None:
    service.batches_refused = [GONE]
    terms = Terms(retries=ONCE, breaking=Breaking(1), clock=Clock(), on_unavailable="policy")
    settings = Settings(guard=target, on_unavailable_prompt=choice)
    guard = RemoteGuard(settings, terms)
    backend = Backend([b'{"choices": []}'])
    app = Wrapped(backend, guard)
    try:
        for _ in range(2):
            await call(app, PATH, asking("Hi"))
    finally:
        await guard.close()
    assert len(service.batches) == 1 and len(backend.bodies) == bodies * 2


class Hangs(FakeService):
    """Reads streams and says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.over = threading.Event()

    def ClassifyStream(
        self,
        request_iterator: Iterator[guard_pb2.ClassifyStreamRequest],
        context: grpc.ServicerContext,
    ) -> Iterator[guard_pb2.ClassifyStreamResponse]:
        for step in request_iterator:
            if step.piece.text == "ab":
                yield guard_pb2.ClassifyStreamResponse(verdict=verdict(), covered_chars=2)
        self.over.wait()


async def pieces(*texts: Piece | str) -> AsyncIterator[Piece | str]:
    for text in texts:
        yield text


@pytest.mark.parametrize("said", [(Piece("cd", check=True),), ("cd",), (Piece("ab", True), "cd")])
async def test_verdict_of_a_stream_that_does_not_come_is_not_waited_for_forever(
    tmp_path: Path, said: tuple[Piece | str, ...]
) -> None:
    service = Hangs()
    with serving(service, socket_in(tmp_path)) as target:
        terms = Terms(timeout_s=0.2, retries=ONCE, on_unavailable="block")
        async with AsyncGuardClient(target, terms) as guard:
            outcomes = [one async for one in guard.classify_stream("hi", pieces(*said))]
        service.over.set()
    last = outcomes[-1]
    assert last.final and last.outcome.blocked
    assert not last.outcome.judged and last.outcome.reason == "DEADLINE_EXCEEDED"
    assert all(one.outcome.judged for one in outcomes[:-1])
