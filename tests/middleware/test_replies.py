"""What applications send back, well-formed or not, and what clients get of it."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from collections.abc import AsyncGenerator, AsyncIterable, Iterator
from contextlib import aclosing, suppress
from typing import Any

import pytest

from guard_middleware.calls import Piece
from guard_middleware.guards import Conversation
from guard_middleware.messages import Message, Receive, Scope, Send
from guard_middleware.testing import FakeGuard, forbids
from guard_middleware.verdict import StreamOutcome
from tests.middleware.asgi_calls import EVENTS, JSON, Backend, body_of, call, each, sse
from tests.middleware.formats.openai_replies import PATH, asking, chunk, chunks, reply
from tests.middleware.wrapped import BAD, SAFE, Wrapped, fits

WHOLE = json.dumps(reply("Hello there.")).encode()
START: Message = {"type": "http.response.start", "status": 200, "headers": []}


def packed(data: bytes, coding: str) -> bytes:
    return gzip.compress(data) if coding == "gzip" else zlib.compress(data)


def coding(name: str) -> tuple[tuple[bytes, bytes], ...]:
    return ((b"content-encoding", name.encode()),)


@pytest.mark.parametrize("name", ["gzip", "deflate", "GZIP", "x-gzip"])
async def test_packed_reply_is_unpacked_and_judged(name: str) -> None:
    kind = "deflate" if name == "deflate" else "gzip"
    for said in ("Hello there.", BAD):
        body = packed(json.dumps(reply(said)).encode(), kind)
        app = Wrapped(Backend([body], headers=coding(name)))
        got = await call(app, PATH, asking("Hi"))
        assert "content-encoding" not in got.headers
        assert (got.json == reply(said)) == (said != BAD)
        assert BAD not in got.body.decode()


@pytest.mark.parametrize("size", [1, 7, 40])
async def test_packed_stream_is_unpacked_and_judged(size: int) -> None:
    for said in (SAFE, SAFE + BAD):
        body = gzip.compress(b"".join(each(chunks(said))))
        cut = [body[at : at + size] for at in range(0, len(body), size)]
        app = Wrapped(Backend(cut, EVENTS, headers=coding("gzip")))
        got = await call(app, PATH, asking("Hi", stream=True))
        assert fits(got.text(), said, "I can't help with that.") and got.text()


BROKEN_PACKINGS = {
    "another coding": (WHOLE, "br"),
    "two codings": (gzip.compress(gzip.compress(WHOLE)), "gzip, gzip"),
    "no gzip at all": (WHOLE, "gzip"),
    "cut": (gzip.compress(WHOLE)[:-9], "gzip"),
    "two members": (gzip.compress(WHOLE) + gzip.compress(b" "), "gzip"),
    "bytes behind": (gzip.compress(WHOLE) + b"x", "gzip"),
    "a bomb": (gzip.compress(bytes(200_000)), "gzip"),
}


@pytest.mark.parametrize("name", BROKEN_PACKINGS)
@pytest.mark.parametrize("kind", [JSON, EVENTS])
async def test_reply_that_cannot_be_unpacked_is_refused(name: str, kind: str) -> None:
    body, header = BROKEN_PACKINGS[name]
    app = Wrapped(Backend([body], kind, headers=coding(header)), max_reply_bytes=100_000)
    got = await call(app, PATH, asking("Hi", stream=kind == EVENTS))
    assert got.ended and b"Hello" not in got.body and b"content_filter" in got.body
    assert app.results == {"blocked_response": 1}


@pytest.mark.parametrize(
    "body",
    [
        b"Hello there.",
        b"\xff\xfe",
        b'{"choices": [], "choices": []}',
        b'{"choices": 7}',
        b'"Hello there."',
        b"[1, 2]",
        b"{" * 100_000,
        b'{"choices":[{"message":{"content":"Hello \\ud800"}}]}',
        b"\xef\xbb\xbf" + WHOLE,
        WHOLE + b"\n" + WHOLE,
    ],
    ids=lambda one: one[:12].decode("latin-1"),
)
@pytest.mark.parametrize("kind", [JSON, "text/plain", "application/octet-stream", ""])
async def test_whole_reply_that_cannot_be_read_is_refused(body: bytes, kind: str) -> None:
    got = await call(Wrapped(Backend([body], kind)), PATH, asking("Hi"))
    assert got.json["choices"][0]["finish_reason"] == "content_filter"
    assert b"Hello" not in got.body


@pytest.mark.parametrize(
    "data",
    [
        b"data: Hello there.\n\n",
        b"data: [1, 2]\n\n",
        b'data: {"choices": 1}\n\n',
        b'data: {"choices":[{"delta":{"content":"Hello"}, "delta": {}}]}\n\n',
        b"event: Hello there\ndata: {}\n\n",
        b"data: \xff\n\n",
        b"data: " + b"x" * 5_000_000,
    ],
    ids=lambda one: one[:24].decode("latin-1").strip(),
)
async def test_stream_that_cannot_be_read_ends_filtered(data: bytes) -> None:
    sent = [*each(chunks(SAFE))[:-2], data, *each(chunks("more"))]
    app = Wrapped(Backend(sent, EVENTS))
    got = await call(app, PATH, asking("Hi", stream=True))
    assert SAFE.startswith(got.text()) or got.text() == "I can't help with that."
    assert b"Hello" not in got.body and b"more" not in got.body
    assert got.events[-1]["choices"][0]["finish_reason"] == "content_filter"


async def test_texts_that_are_not_the_protocols_are_left_out_of_a_stream() -> None:
    noise = b": " + BAD.encode() + b"\n\nid: " + BAD.encode() + b"\nunknown: x\n\n"
    sent = b"".join(each(chunks(SAFE)))
    got = await call(Wrapped(Backend([noise + sent], EVENTS)), PATH, asking("Hi", stream=True))
    assert BAD.encode() not in got.body and got.text() == SAFE


async def test_larger_reply_than_may_be_is_refused() -> None:
    app = Wrapped(Backend([b" " * 60, b" " * 60]), max_reply_bytes=100)
    assert b"content_filter" in (await call(app, PATH, asking("Hi"))).body


@pytest.mark.parametrize("status", [400, 429, 500, 503])
async def test_error_of_the_backend_passes_with_its_status_and_headers(status: int) -> None:
    body = json.dumps({"error": {"message": "Too many.", "code": None}}).encode()
    app = Wrapped(Backend([body], status=status, headers=((b"retry-after", b"7"),)))
    got = await call(app, PATH, asking("Hi", stream=True))
    assert (got.status, got.body, got.headers["retry-after"]) == (status, body, "7")


@pytest.mark.parametrize("body", [json.dumps({"error": {BAD: 1}}).encode(), b"<html>", b"\xff"])
async def test_error_that_is_not_allowed_keeps_its_status_and_loses_its_words(body: bytes) -> None:
    app = Wrapped(Backend([body], status=500))
    got = await call(app, PATH, asking("Hi"))
    assert (got.status, got.json["error"]["code"]) == (500, "upstream_error")


async def test_reply_without_a_body_passes() -> None:
    got = await call(Wrapped(Backend([], status=204)), PATH, asking("Hi"))
    assert (got.status, got.body, got.ended) == (204, b"", True)


async def test_headers_that_no_longer_hold_are_left_out() -> None:
    headers = (
        *((b"etag", b"x"), (b"content-md5", b"x"), (b"trailer", b"x"), (b"x-own", b"1")),
        *((b"x-guard-verdict-id", b"forged"), (b"content-length", b"7")),
    )
    got = await call(Wrapped(Backend([WHOLE], headers=headers)), PATH, asking("Hi"))
    assert got.headers["x-own"] == "1" and got.headers["content-length"] == str(len(WHOLE))
    assert not {"etag", "content-md5", "trailer"} & set(got.headers)
    assert len(got.headers["x-guard-verdict-id"]) == 32


async def test_stream_that_breaks_off_ends_with_the_protocols_error() -> None:
    backend = Backend(each(chunks(SAFE))[:-4], EVENTS, breaks=True)
    app = Wrapped(backend)
    got = await call(app, PATH, asking("Hi", stream=True))
    assert got.ended and got.events[-1]["error"]["code"] == "upstream_failed"
    said = "".join(e["choices"][0]["delta"].get("content", "") for e in got.events[:-1])
    assert said and SAFE.startswith(said)
    assert app.results == {"aborted": 1}


async def test_whole_reply_that_breaks_off_is_an_error() -> None:
    app = Wrapped(Backend([WHOLE[:20]], breaks=True))
    got = await call(app, PATH, asking("Hi"))
    assert got.status == 502 and b"Hello" not in got.body
    assert app.results == {"aborted": 1}


async def test_blocked_stream_that_breaks_off_ends_filtered() -> None:
    app = Wrapped(Backend([sse(*chunks(SAFE + BAD), done=False)], EVENTS, breaks=True))
    got = await call(app, PATH, asking("Hi", stream=True))
    assert BAD not in got.text() and b"content_filter" in got.body


async def test_failure_before_the_reply_is_the_applications_own() -> None:
    async def failing(scope: Scope, receive: Receive, send: Send) -> None:
        raise KeyError("own")

    app = Wrapped(failing)
    with pytest.raises(KeyError, match="own"):
        await call(app, PATH, asking("Hi"))
    assert app.results == {"aborted": 1}


async def test_application_that_never_answers_is_an_error() -> None:
    async def mute(scope: Scope, receive: Receive, send: Send) -> None:
        await body_of(receive)

    assert (await call(Wrapped(mute), PATH, asking("Hi"))).status == 502


async def test_messages_out_of_place_change_nothing() -> None:
    late = {"type": "http.response.body", "body": json.dumps(reply(BAD)).encode()}

    async def odd(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.body", "body": b"early", "more_body": True})
        await send({"type": "http.response.debug", "info": BAD})
        await send(START)
        await send({**START, "status": 500})
        await send({"type": "http.response.body", "body": WHOLE})
        await send(late)
        await send({"type": "http.response.trailers", "headers": [(b"x", BAD.encode())]})

    got = await call(Wrapped(odd), PATH, asking("Hi"))
    assert (got.status, got.body) == (200, WHOLE)


async def test_ways_round_send_are_not_offered() -> None:
    backend = Backend([WHOLE])
    await call(Wrapped(backend), PATH, asking("Hi"))
    assert backend.scopes[0]["extensions"] == {}


async def test_background_work_goes_on_behind_the_reply() -> None:
    """Starlette runs an endpoint's background tasks in the call that answered."""
    done: list[str] = []
    sent = asyncio.Event()

    async def busy(scope: Scope, receive: Receive, send: Send) -> None:
        await body_of(receive)
        await send(START)
        await send({"type": "http.response.body", "body": WHOLE})
        await sent.wait()
        for _ in range(20):
            await asyncio.sleep(0)
        done.append("background")

    sent.set()
    leaves = asyncio.Event()
    leaves.set()
    for said in ("Hi", "Hi"):
        await call(Wrapped(busy), PATH, asking(said))
    assert done == ["background"] * 2


class LettingGo(FakeGuard):
    """Takes a moment to let go of a stream, as one at the other end of a connection does."""

    async def growing(
        self, conversation: Conversation, pieces: AsyncIterable[Piece]
    ) -> AsyncGenerator[StreamOutcome]:
        try:
            async with aclosing(super().growing(conversation, pieces)) as outcomes:
                async for outcome in outcomes:
                    yield outcome
        finally:
            for _ in range(9):
                with suppress(asyncio.CancelledError):
                    await asyncio.sleep(0)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_reply_that_was_given_whole_counts_as_passed_with_all_its_verdicts(
    stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "guard_middleware")
    backend = Backend(each(chunks(SAFE)), EVENTS) if stream else Backend([WHOLE])
    guard = LettingGo(forbids(BAD))
    app = Wrapped(backend, guard)
    assert (await call(app, PATH, asking("Hi", stream=stream))).ended
    assert app.results == {"passed": 1}
    (line,) = (one.getMessage() for one in caplog.records if "verdicts" in one.getMessage())
    told = line.partition("verdicts ")[2].split()
    assert told == [f"fake-{number}" for number in range(1, len(guard.allowed) + 1)]
    assert len(told) >= 2  # the prompt's and the reply's


async def test_application_is_told_when_the_client_has_left() -> None:
    leaves = asyncio.Event()
    told: list[str] = []

    async def listening(scope: Scope, receive: Receive, send: Send) -> None:
        await body_of(receive)
        leaves.set()
        try:
            told.append((await receive())["type"])
        except asyncio.CancelledError:
            told.append("cancelled")
            raise

    app = Wrapped(listening)
    await call(app, PATH, asking("Hi"), leaves=leaves)
    assert told and set(told) <= {"http.disconnect", "cancelled"}
    assert app.results == {"gone": 1}


async def test_backend_is_not_read_further_than_may_be_held() -> None:
    never: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    leaves = asyncio.Event()
    sent, read = 0, list[int]()

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while True:
            sent += 1
            yield sse(chunk({"content": "four"}), done=False)

    verdicts = 0

    def gate() -> asyncio.Future[None]:
        nonlocal verdicts
        verdicts += 1
        if verdicts == 1:
            never_done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            never_done.set_result(None)
            return never_done
        asyncio.get_running_loop().call_later(0.05, leave)
        return asyncio.shield(never)

    def leave() -> None:
        read.append(sent)
        leaves.set()

    app = Wrapped(Backend(endless(), EVENTS), FakeGuard(gate=gate), hold_chars=400)
    got = await call(app, PATH, asking("Hi", stream=True), leaves=leaves)
    assert read[0] <= 101 and b"four" not in got.body


async def test_stream_that_is_held_back_sends_signs_of_life() -> None:
    """And they come before anything that was not allowed, for as long as it takes."""
    loop = asyncio.get_running_loop()
    late: asyncio.Future[None] = loop.create_future()
    verdicts = 0

    def gate() -> Any:
        nonlocal verdicts
        verdicts += 1
        if verdicts == 1:
            return asyncio.sleep(0)
        return asyncio.shield(late)

    app = Wrapped(
        Backend(each(chunks(SAFE)), EVENTS),
        FakeGuard(gate=gate),
        idle_check_s=0.001,
        keep_alive_s=0.001,
    )

    async def until_alive(scope: Scope, receive: Receive, send: Send) -> None:
        async def heard(message: Message) -> None:
            if message.get("body") == b":\n\n" and not late.done():
                late.set_result(None)
            await send(message)

        await app(scope, receive, heard)

    got = await call(until_alive, PATH, asking("Hi", stream=True))
    assert late.done() and got.text() == SAFE


async def test_stream_that_pauses_is_given_out_so_far() -> None:
    goes_on = asyncio.Event()

    async def pausing(scope: Scope, receive: Receive, send: Send) -> None:
        await send({**START, "headers": [(b"content-type", EVENTS.encode())]})
        first, rest = each(chunks("Only this. "))[1:2], each(chunks("And that."))
        for data in first:
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await goes_on.wait()
        for data in rest:
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body"})

    seen: list[bytes] = []

    async def send(message: Message) -> None:
        seen.append(message.get("body", b""))
        if b"Only" in seen[-1]:
            goes_on.set()

    requests = [{"type": "http.request", "body": json.dumps(asking("Hi", stream=True)).encode()}]

    async def receive() -> Message:
        if requests:
            return requests.pop()
        await asyncio.Event().wait()
        raise AssertionError

    app = Wrapped(pausing, idle_check_s=0.001)
    scope = {"type": "http", "method": "POST", "path": PATH, "headers": []}
    async with asyncio.timeout(30):
        await app(scope, receive, send)
    assert b"And " in b"".join(seen)


@pytest.mark.parametrize(("back", "begins"), [(0, True), (len(BAD) - 1, False)])
async def test_what_is_held_back_is_the_beginning_of_what_is_blocked_later(
    back: int, begins: bool
) -> None:
    """Wherever it stands: checks fall within it too, and find its beginning harmless."""
    begun = 0
    for at in range(100, 130):
        backend = Backend(each(chunks(SAFE[:at] + BAD + SAFE)), EVENTS)
        guard = FakeGuard(forbids(BAD), every_chars=7)
        app = Wrapped(backend, guard, piece_chars=7, hold_back_chars=back)
        got = (await call(app, PATH, asking("Hi", stream=True))).text()
        assert got and fits(got, SAFE[:at] + BAD)
        begun += len(got) > at
    assert bool(begun) is begins


@pytest.mark.parametrize("hold_back", [30, 5000])
async def test_what_is_held_back_is_given_in_the_end_and_never_stops_the_backend(
    hold_back: int,
) -> None:
    app = Wrapped(Backend(each(chunks(SAFE)), EVENTS), hold_back_chars=hold_back, hold_chars=100)
    got = await call(app, PATH, asking("Hi", stream=True))
    assert got.ended and got.body == b"".join(each(chunks(SAFE)))


async def test_the_last_words_of_a_channel_do_not_hold_up_the_next() -> None:
    """Reasoning is over once the answer begins: nothing can make its last words bad any more."""
    goes_on = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", EVENTS.encode())]
        await send({**START, "headers": headers})
        thinks = [
            sse(chunk({"reasoning": SAFE[at : at + 4]}), done=False) for at in range(0, 80, 4)
        ]
        for data in (*thinks, sse(chunk({"content": "And "}), done=False)):
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await goes_on.wait()
        await send({"type": "http.response.body", "body": sse(), "more_body": False})

    seen: list[bytes] = []

    async def watched(scope: Scope, receive: Receive, send: Send) -> None:
        async def heard(message: Message) -> None:
            seen.append(message.get("body", b""))
            if SAFE[76:80].encode() in b"".join(seen):
                goes_on.set()
            await send(message)

        await Wrapped(app, hold_back_chars=20, idle_check_s=0.01)(scope, receive, heard)

    async with asyncio.timeout(60):
        got = await call(watched, PATH, asking("Hi", stream=True))
    assert got.text(key="reasoning") == SAFE[:80] and got.text() == "And "


async def test_only_what_was_released_is_measured() -> None:
    app = Wrapped(Backend(each(chunks(SAFE)), EVENTS))
    await call(app, PATH, asking("Hi", stream=True))
    await call(app, PATH, asking(BAD, stream=True))
    assert app.counted("prompt_seconds_count") == 2
    assert app.counted("first_text_delay_seconds_count") == 1
    assert app.counted("end_delay_seconds_count") == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("place", ["prompt", "reply"])
@pytest.mark.parametrize("turns", [0, 100])
async def test_blocks_can_be_told_as_errors(place: str, stream: bool, turns: int) -> None:
    """Also where the reply has ended long before its verdict comes."""

    async def slow() -> None:
        for _ in range(turns):
            await asyncio.sleep(0)

    said = "Hi" if place == "reply" else BAD
    sent = each(chunks(BAD)) if stream else [json.dumps(reply(BAD)).encode()]
    guard = FakeGuard(forbids(BAD), gate=lambda: asyncio.ensure_future(slow()))
    app = Wrapped(Backend(sent, EVENTS if stream else JSON), guard, refuse_with="error")
    got = await call(app, PATH, asking(said, stream=stream))
    assert (got.status, got.json["error"]["code"]) == (400, "content_filter")


async def test_stream_that_had_begun_ends_filtered_where_blocks_are_errors() -> None:
    app = Wrapped(Backend(each(chunks(SAFE + BAD)), EVENTS), refuse_with="error")
    got = await call(app, PATH, asking("Hi", stream=True))
    assert got.status == 200
    assert got.events[-1]["choices"][0]["finish_reason"] == "content_filter"


async def test_more_channels_than_may_be_block_the_stream() -> None:
    events = [
        sse(chunk({"tool_calls": [{"index": at, "function": {"name": "f"}}]}), done=False)
        for at in range(5)
    ]
    app = Wrapped(Backend([*events, sse()], EVENTS), FakeGuard(forbids(BAD)), max_channels=4)
    got = await call(app, PATH, asking("Hi", stream=True))
    assert b"content_filter" in got.body and got.body.count(b"tool_calls") <= 4
