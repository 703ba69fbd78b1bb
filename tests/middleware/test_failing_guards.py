"""A guard that fails in any way: nothing that was not allowed is given out, and nobody can tell."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Sequence

import grpc
import pytest

from guard_api.v1 import verdict_pb2
from guard_middleware.calls import Piece
from guard_middleware.errors import Unavailable
from guard_middleware.guards import Conversation, RemoteGuard
from guard_middleware.retry import Retries
from guard_middleware.settings import Settings
from guard_middleware.terms import Terms
from guard_middleware.testing import FakeGuard, fake_verdict, forbids
from guard_middleware.verdict import Outcome, StreamOutcome, Unjudged
from guard_policies.assessment import Action, Direction
from tests.middleware.asgi_calls import EVENTS, Backend, Reply, call, each
from tests.middleware.fake_service import FakeService, Refusal, verdict
from tests.middleware.formats.openai_replies import PATH, asking, chunks, reply
from tests.middleware.wrapped import BAD, SAFE, Wrapped, fits

Growing = AsyncGenerator[StreamOutcome]


def allowed(covered: int, final: bool = False) -> StreamOutcome:
    return StreamOutcome(fake_verdict(Action.ALLOW, Direction.RESPONSE), covered, final)


def unjudged(action: Action) -> Unjudged:
    return Unjudged(action, "UNAVAILABLE", Unavailable("away"))


class StreamsBadly(FakeGuard):
    """Allows every request; of a growing reply it says what a test wants."""

    def __init__(self, grow: Callable[[AsyncIterable[Piece]], Growing]) -> None:
        super().__init__()
        self._grow = grow

    def growing(self, conversation: Conversation, pieces: AsyncIterable[Piece]) -> Growing:
        return self._grow(pieces)


async def raises_at_once(pieces: AsyncIterable[Piece]) -> Growing:
    raise RuntimeError("out of order")
    yield allowed(0)


async def dies_in_the_middle(pieces: AsyncIterable[Piece]) -> Growing:
    said = 0
    async for piece in pieces:
        said += len(piece.text)
        if said > 200:
            raise RuntimeError("out of order")
        yield allowed(said)


async def ends_without_a_last_word(pieces: AsyncIterable[Piece]) -> Growing:
    async for piece in pieces:
        yield allowed(len(piece.text))
        return


async def covers_more_than_it_was_given(pieces: AsyncIterable[Piece]) -> Growing:
    async for _ in pieces:
        yield allowed(10_000)


async def has_its_last_word_too_early(pieces: AsyncIterable[Piece]) -> Growing:
    async for piece in pieces:
        yield allowed(len(piece.text), final=True)


async def says_nothing(pieces: AsyncIterable[Piece]) -> Growing:
    async for _ in pieces:
        pass
    return
    yield allowed(0)


async def goes_backwards(pieces: AsyncIterable[Piece]) -> Growing:
    said = 0
    async for piece in pieces:
        said += len(piece.text)
        yield allowed(min(said, 40))
        yield allowed(0)
    yield StreamOutcome(unjudged(Action.BLOCK), 0, final=True)


BADLY = (
    raises_at_once,
    dies_in_the_middle,
    ends_without_a_last_word,
    covers_more_than_it_was_given,
    has_its_last_word_too_early,
    says_nothing,
    goes_backwards,
)


@pytest.mark.parametrize("grow", BADLY, ids=lambda one: one.__name__)
async def test_stream_ends_filtered_where_its_guard_fails(
    grow: Callable[[AsyncIterable[Piece]], Growing],
) -> None:
    app = Wrapped(Backend(each(chunks(SAFE + BAD)), EVENTS), StreamsBadly(grow))
    got = await call(app, PATH, asking("Hi", stream=True))
    assert got.ended
    assert fits(got.text(), SAFE + BAD, "I can't help with that.")
    assert len(got.text()) <= 240
    assert got.events[-1]["choices"][0]["finish_reason"] == "content_filter"
    assert app.results == {"blocked_response": 1}


class Judges(FakeGuard):
    """Answers about whole conversations what a test wants."""

    def __init__(self, *answers: Sequence[Outcome] | Exception) -> None:
        super().__init__()
        self._answers = list(answers)

    async def judge(self, conversations: Sequence[Conversation]) -> Sequence[Outcome]:
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


ALLOWED = fake_verdict(Action.ALLOW, Direction.PROMPT)
PROMISES_BROKEN: tuple[Sequence[Outcome] | Exception, ...] = (
    RuntimeError("out of order"),
    (),
    (ALLOWED, ALLOWED),
    (unjudged(Action.BLOCK),),
)


@pytest.mark.parametrize("answer", PROMISES_BROKEN, ids=("raises", "none", "too many", "unjudged"))
async def test_request_that_was_not_judged_is_refused(
    answer: Sequence[Outcome] | Exception,
) -> None:
    backend = Backend([json.dumps(reply("Hello.")).encode()])
    got = await call(Wrapped(backend, Judges(answer)), PATH, asking("Hi"))
    assert backend.bodies == []
    assert got.json["choices"][0]["finish_reason"] == "content_filter"


@pytest.mark.parametrize("answer", PROMISES_BROKEN, ids=("raises", "none", "too many", "unjudged"))
async def test_reply_that_was_not_judged_is_refused(answer: Sequence[Outcome] | Exception) -> None:
    backend = Backend([json.dumps(reply("Hello.")).encode()])
    got = await call(Wrapped(backend, Judges((ALLOWED,), answer)), PATH, asking("Hi"))
    assert len(backend.bodies) == 1 and b"Hello" not in got.body
    assert got.json["choices"][0]["finish_reason"] == "content_filter"


async def test_what_may_pass_unjudged_passes_and_is_counted() -> None:
    backend = Backend([json.dumps(reply("Hello.")).encode()])
    app = Wrapped(backend, Judges((unjudged(Action.ALLOW),), (unjudged(Action.ALLOW),)))
    assert (await call(app, PATH, asking("Hi"))).json == reply("Hello.")
    for direction in ("prompt", "response"):
        why = {"direction": direction, "reason": "Unavailable"}
        assert app.counted("unjudged_total", **why, became="passed") == 1
        assert app.counted("unjudged_total", **why, became="refused") == 0


async def test_stream_that_may_pass_unjudged_passes_to_its_end() -> None:
    async def fails_open(pieces: AsyncIterable[Piece]) -> Growing:
        async for piece in pieces:
            yield allowed(len(piece.text))
            break
        yield StreamOutcome(unjudged(Action.ALLOW), 0, final=True)

    app = Wrapped(Backend(each(chunks(SAFE)), EVENTS), StreamsBadly(fails_open))
    got = await call(app, PATH, asking("Hi", stream=True))
    assert got.text() == SAFE and app.results == {"passed": 1}


async def test_hung_guard_gives_nothing_out_until_the_client_leaves() -> None:
    never: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    leaves = asyncio.Event()
    asked = 0

    def gate() -> asyncio.Future[None]:
        nonlocal asked
        asked += 1
        if asked > 1:  # the request's verdict comes, the reply's does not
            leaves.set()
            return asyncio.shield(never)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done

    guard = FakeGuard(gate=gate)
    app = Wrapped(Backend(each(chunks(SAFE)), EVENTS), guard)
    got = await call(app, PATH, asking("Hi", stream=True), leaves=leaves)
    assert b"weather" not in got.body
    assert app.results == {"gone": 1} and guard.open_streams == 0


# A guard on a socket, as services answer.

NOT_JUDGED = (
    Refusal(grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN"),
    Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED"),
    Refusal(grpc.StatusCode.DEADLINE_EXCEEDED),
    Refusal(grpc.StatusCode.INTERNAL, "ENGINE_FAILED"),
    Refusal(grpc.StatusCode.CANCELLED),
    verdict(verdict_pb2.ACTION_UNSPECIFIED),
    verdict(score=float("nan")),
)
CALLERS_FAULT = (
    Refusal(grpc.StatusCode.INVALID_ARGUMENT, "CONVERSATION_TOO_LONG"),
    Refusal(grpc.StatusCode.NOT_FOUND, "UNKNOWN_POLICY"),
    Refusal(grpc.StatusCode.FAILED_PRECONDITION, "UNSCANNABLE"),
    Refusal(grpc.StatusCode.UNIMPLEMENTED),
    Refusal(grpc.StatusCode.UNAUTHENTICATED),
    Refusal(grpc.StatusCode.PERMISSION_DENIED),
)


def remote(target: str, **settings: str) -> RemoteGuard:
    terms = Terms(timeout_s=30.0, retries=Retries(attempts=1), on_unavailable="policy")
    return RemoteGuard(Settings(guard=target, **settings), terms)  # type: ignore[arg-type]


async def outcome_of(guard: RemoteGuard, app_of: Callable[[RemoteGuard], Wrapped]) -> Reply:
    try:
        return await call(app_of(guard), PATH, asking("Hi"))
    finally:
        await guard.close()


@pytest.mark.parametrize("answer", (*NOT_JUDGED, *CALLERS_FAULT), ids=str)
async def test_refusal_looks_the_same_whatever_the_guard_said(
    service: FakeService, target: str, answer: object
) -> None:
    service.answer = lambda request: answer  # type: ignore[assignment,return-value]
    settings = {"on_unavailable_prompt": "block"}
    backend = Backend([b"{}"])
    got = await outcome_of(remote(target, **settings), lambda guard: Wrapped(backend, guard))
    said_no = await call(Wrapped(backend), PATH, asking(f"Make a {BAD}"))
    assert backend.bodies == []
    assert without_ids(got) == without_ids(said_no)


def without_ids(got: Reply) -> object:
    headers = {key: value for key, value in got.headers.items() if key != "x-guard-verdict-id"}
    body = re.sub(rb'"created":\d+', b'"created":0', re.sub(rb"[0-9a-f]{32}", b"id", got.body))
    return got.status, headers, body


@pytest.mark.parametrize("answer", NOT_JUDGED, ids=str)
async def test_request_passes_unjudged_only_where_that_was_set(
    service: FakeService, target: str, answer: object
) -> None:
    service.script = [answer, verdict()]  # type: ignore[list-item]
    backend = Backend([json.dumps(reply("Hello.")).encode()])
    guard = remote(target, on_unavailable_prompt="allow")
    got = await outcome_of(guard, lambda guard: Wrapped(backend, guard))
    assert got.json == reply("Hello.")


@pytest.mark.parametrize("answer", CALLERS_FAULT, ids=str)
async def test_request_cannot_choose_to_pass_unjudged(
    service: FakeService, target: str, answer: Refusal
) -> None:
    service.answer = lambda request: answer
    backend = Backend([b"{}"])
    guard = remote(target, on_unavailable_prompt="allow", on_unavailable_response="allow")
    got = await outcome_of(guard, lambda guard: Wrapped(backend, guard))
    assert backend.bodies == []
    assert got.json["choices"][0]["finish_reason"] == "content_filter"


async def test_guard_that_is_not_there_blocks() -> None:
    guard = remote("unix:/nonexistent/guard.sock")
    backend = Backend([b"{}"])
    got = await outcome_of(guard, lambda guard: Wrapped(backend, guard))
    assert backend.bodies == [] and got.json["choices"][0]["finish_reason"] == "content_filter"


@pytest.mark.parametrize("answer", (*NOT_JUDGED, *CALLERS_FAULT), ids=str)
async def test_stream_ends_filtered_where_the_service_fails_in_its_middle(
    service: FakeService, target: str, answer: object
) -> None:
    service.script = [verdict(), verdict(), answer]  # type: ignore[list-item]
    guard = remote(target, on_unavailable_response="block")
    app = Wrapped(Backend(each(chunks(SAFE)), EVENTS), guard)
    try:
        got = await call(app, PATH, asking("Hi", stream=True))
    finally:
        await guard.close()
    assert got.text() != SAFE
    assert SAFE.startswith(got.text()) or got.text() == "I can't help with that."
    assert got.events[-1]["choices"][0]["finish_reason"] == "content_filter"


async def test_blocked_words_do_not_come_out_late() -> None:
    """A verdict that comes after the block changes nothing any more."""
    guard = FakeGuard(forbids(BAD), every_chars=1)
    app = Wrapped(Backend(each(chunks(BAD + SAFE, size=3)), EVENTS), guard)
    got = await call(app, PATH, asking("Hi", stream=True))
    assert got.text() == "I can't help with that."
