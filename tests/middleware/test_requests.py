"""What clients send: read whole, judged turn by turn, forwarded as it was judged."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from typing import Any

import pytest

from guard_middleware.messages import Message
from guard_middleware.testing import FakeGuard, forbids, text_of
from tests.middleware.asgi_calls import EVENTS, Backend, call, each
from tests.middleware.formats.openai_replies import PATH, asking, chunks, reply
from tests.middleware.wrapped import BAD, SAFE, Wrapped

WHOLE = json.dumps(reply("Hello there.")).encode()


def backend() -> Backend:
    return Backend([WHOLE])


@pytest.mark.parametrize("name", ["gzip", "deflate"])
async def test_packed_request_is_judged_and_forwarded_unpacked(name: str) -> None:
    for said in ("Hi", BAD):
        raw = json.dumps(asking(said)).encode()
        body = gzip.compress(raw) if name == "gzip" else zlib.compress(raw)
        behind = backend()
        app = Wrapped(behind)
        await call(app, PATH, body, headers=[(b"content-encoding", name.encode())])
        if said == BAD:
            assert behind.bodies == []
        else:
            headers = dict(behind.scopes[0]["headers"])
            assert behind.asked == asking(said) and b"content-encoding" not in headers
            assert headers[b"content-length"] == str(len(behind.bodies[0])).encode()


RAW = json.dumps(asking("Hi")).encode()
UNREADABLE: dict[str, tuple[int, bytes, tuple[tuple[bytes, bytes], ...]]] = {
    "another coding": (415, RAW, ((b"content-encoding", b"br"),)),
    "coded twice": (415, RAW, ((b"content-encoding", b"gzip, gzip"),)),
    "two coding headers": (
        415,
        gzip.compress(RAW),
        ((b"content-encoding", b"gzip"), (b"content-encoding", b"br")),
    ),
    "not what it says": (415, RAW, ((b"content-encoding", b"gzip"),)),
    "cut": (415, gzip.compress(RAW)[:-5], ((b"content-encoding", b"gzip"),)),
    "two members": (415, gzip.compress(RAW) * 2, ((b"content-encoding", b"gzip"),)),
    "a bomb": (413, gzip.compress(bytes(10_000)), ((b"content-encoding", b"gzip"),)),
    "too large": (413, b" " * 1001, ()),
    "too large by its header": (413, RAW, ((b"content-length", b"1001"),)),
    "no JSON": (400, b"Hi", ()),
    "nothing": (400, b"", ()),
    "a form": (400, b"messages=Hi", ()),
    "a key twice": (400, b'{"messages":[],' + RAW[1:], ()),
    "a key in another case": (400, b'{"Messages":[],' + RAW[1:], ()),
    "a byte order mark": (400, b"\xef\xbb\xbf" + RAW, ()),
    "UTF-16": (400, RAW.decode().encode("utf-16"), ()),
    "UTF-7": (400, b"{+AG0-essages: []}", ()),
    "a lone surrogate": (400, RAW.replace(b"Hi", b"\\ud800"), ()),
    "NaN": (400, RAW[:-1] + b',"temperature":NaN}', ()),
    "a number beyond a double": (400, RAW[:-1] + b',"temperature":1e999}', ()),
    "a number without end": (400, RAW[:-1] + b',"seed":' + b"9" * 600 + b"e9}", ()),
    "nested deep": (400, b"[" * 500 + b"]" * 500, ()),
    "a list": (400, b"[" + RAW + b"]", ()),
    "something behind it": (400, RAW + b"{}", ()),
    "no messages": (400, b'{"messages":[]}', ()),
    "messages that are none": (400, b'{"messages":"Hi"}', ()),
}


@pytest.mark.parametrize("name", UNREADABLE)
async def test_request_that_cannot_be_read_is_an_error_and_goes_nowhere(name: str) -> None:
    status, body, headers = UNREADABLE[name]
    behind = backend()
    app = Wrapped(behind, max_body_bytes=1000)
    got = await call(app, PATH, body, headers=headers)
    assert (got.status, got.json["error"]["type"]) == (status, "invalid_request_error")
    assert behind.bodies == [] and app.results == {"invalid": 1}


async def test_headers_that_no_longer_hold_are_left_out() -> None:
    behind = backend()
    gone = ("content-md5", "digest", "range", "te", "expect", "transfer-encoding", "trailer")
    sent = [(name.encode(), b"x") for name in (*gone, "x-own")]
    sent += [(b"Accept-Encoding", b"br"), (b"Content-Type", b"application/json; charset=utf-7")]
    await call(Wrapped(behind), PATH, asking("Hi"), headers=sent)
    headers = dict(behind.scopes[0]["headers"])
    assert headers[b"accept-encoding"] == b"identity" and headers[b"x-own"] == b"x"
    assert headers[b"content-type"] == b"application/json"
    assert not {name.encode() for name in gone} & {key.lower() for key in headers}


def pieces_of(body: bytes, size: int) -> list[Message]:
    cut = [body[at : at + size] for at in range(0, len(body), size)]
    last = len(cut) - 1
    return [
        {"type": "http.request", "body": one, "more_body": at < last} for at, one in enumerate(cut)
    ]


async def served(app: Wrapped, messages: list[Message]) -> list[Message]:
    """A request of these messages, then silence."""
    sent: list[Message] = []

    async def receive() -> Message:
        if messages:
            return messages.pop(0)
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    await app({"type": "http", "method": "POST", "path": PATH, "headers": []}, receive, send)
    return sent


@pytest.mark.parametrize("size", [1, 7, 1000])
async def test_request_in_pieces_is_read_whole(size: int) -> None:
    behind = backend()
    sent = await served(Wrapped(behind), pieces_of(json.dumps(asking("Hi")).encode(), size))
    assert behind.asked == asking("Hi") and sent[0]["status"] == 200


async def test_client_that_leaves_before_its_request_is_complete_gets_nothing() -> None:
    behind = backend()
    app = Wrapped(behind)
    messages = [*pieces_of(RAW, 10)[:2], {"type": "http.disconnect"}]
    assert await served(app, messages) == []
    assert behind.bodies == [] and app.results == {"gone": 1}


async def test_more_pieces_than_a_request_may_have_bytes_are_an_error() -> None:
    app = Wrapped(backend(), max_body_bytes=100)
    more: Message = {"type": "http.request", "body": b" " * 60, "more_body": True}
    assert (await served(app, [more, more, more]))[0]["status"] == 413


AUDIO = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}


def with_part(part: dict[str, Any]) -> dict[str, Any]:
    content = [{"type": "text", "text": "Hi"}, part]
    return {"messages": [{"role": "user", "content": content}]}


@pytest.mark.parametrize(
    "part", [AUDIO, {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}]
)
async def test_what_no_guard_can_read_is_refused_or_passed_as_set(part: dict[str, Any]) -> None:
    for choice, bodies in (("block", 0), ("pass", 1)):
        behind = backend()
        got = await call(Wrapped(behind, unscannable=choice), PATH, with_part(part))
        assert len(behind.bodies) == bodies
        assert (got.json["choices"][0]["finish_reason"] == "content_filter") == (bodies == 0)
    assert behind.asked == with_part(part)


async def test_texts_beside_what_no_guard_can_read_are_judged() -> None:
    behind = backend()
    body = with_part(AUDIO)
    body["messages"][0]["content"][0]["text"] = BAD
    await call(Wrapped(behind, unscannable="pass"), PATH, body)
    assert behind.bodies == []


async def test_image_that_is_judged_is_the_image_that_is_forwarded() -> None:
    guard, behind = FakeGuard(), backend()
    url = "data:image/png;base64,iVBORw0KGgo="
    body = with_part({"type": "image_url", "image_url": {"url": url, "detail": "high"}})
    await call(Wrapped(behind, guard), PATH, body)
    assert behind.asked == body
    assert guard.asked[0].messages[0].parts[1].image.data == b"\x89PNG\r\n\x1a\n"


# Turns of the past, and of operators.

PAST = asking("Hi", "Hello.", "Once more?", "Yes.", "And now?")


def past(**said: str) -> dict[str, Any]:
    body = json.loads(json.dumps(PAST))
    for place, text in said.items():
        body["messages"][int(place[1:])]["content"] = text
    return dict(body)


@pytest.mark.parametrize("place", [0, 1, 2, 3])
async def test_exchange_of_the_past_that_is_not_allowed_is_left_out(place: int) -> None:
    guard, behind = FakeGuard(forbids(BAD)), backend()
    got = await call(Wrapped(behind, guard), PATH, past(**{f"m{place}": BAD}))
    left = [0, 1] if place in (0, 1) else [2, 3]
    kept = [one for at, one in enumerate(PAST["messages"]) if at not in left]
    assert got.json == reply("Hello there.")
    assert behind.asked["messages"] == kept
    assert all(BAD not in text_of(part) for part in guard.asked[-1].messages[-1].parts)
    assert len(guard.asked[-1].messages) == len(kept) + 1  # and the reply was judged in that light


@pytest.mark.parametrize("place", [0, 1, 2, 3])
async def test_turn_of_the_past_blocks_the_request_where_that_is_set(place: int) -> None:
    behind = backend()
    await call(Wrapped(behind, old_turns="block"), PATH, past(**{f"m{place}": BAD}))
    assert behind.bodies == []


async def test_past_is_not_judged_again_where_that_is_set() -> None:
    guard, behind = FakeGuard(forbids(BAD)), backend()
    await call(Wrapped(behind, guard, old_turns="pass"), PATH, past(m0=BAD))
    assert behind.asked == past(m0=BAD)
    assert [len(one.messages) for one in guard.asked] == [5, 6]


@pytest.mark.parametrize("old_turns", ["drop", "block", "pass"])
async def test_newest_turn_is_never_left_out(old_turns: str) -> None:
    behind = backend()
    await call(Wrapped(behind, old_turns=old_turns), PATH, past(m4=BAD))
    assert behind.bodies == []


@pytest.mark.parametrize("old_turns", ["drop", "block", "pass"])
async def test_beginning_of_the_reply_is_judged_and_never_left_out(old_turns: str) -> None:
    behind = backend()
    body = past()
    body["messages"].append({"role": "assistant", "content": f"Sure, the {BAD} is"})
    await call(Wrapped(behind, old_turns=old_turns), PATH, body)
    assert behind.bodies == []


async def test_several_exchanges_of_the_past_can_be_left_out() -> None:
    behind = backend()
    await call(Wrapped(behind), PATH, past(m0=BAD, m3=BAD))
    assert behind.asked["messages"] == PAST["messages"][4:]


async def test_tool_results_go_with_the_exchange_that_they_belong_to() -> None:
    function = {"name": "look", "arguments": "{}"}
    call_ = {"id": "c1", "type": "function", "function": function}
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Look it up."},
        {"role": "assistant", "content": None, "tool_calls": [call_]},
        {"role": "tool", "tool_call_id": "c1", "content": BAD},
        {"role": "assistant", "content": "Done."},
        {"role": "user", "content": "Thanks."},
    ]
    behind = backend()
    await call(Wrapped(behind), PATH, {"messages": messages})
    assert behind.asked["messages"] == [messages[0], messages[5]]


async def test_turns_of_one_role_in_a_row_are_judged_together() -> None:
    guard = FakeGuard(forbids(BAD))
    body = {"messages": [{"role": "user", "content": text} for text in ("a", BAD, "b")]}
    behind = backend()
    await call(Wrapped(behind, guard), PATH, body)
    assert behind.bodies == [] and [len(one.messages) for one in guard.asked] == [3]


@pytest.mark.parametrize("role", ["system", "developer"])
async def test_turns_of_operators_are_judged_unless_they_are_trusted(role: str) -> None:
    messages = [{"role": role, "content": BAD}, {"role": "user", "content": "Hi"}]
    for choice, bodies in (("judge", 0), ("trust", 1)):
        behind = backend()
        await call(Wrapped(behind, system_turns=choice), PATH, {"messages": messages})
        assert len(behind.bodies) == bodies


async def test_more_turns_than_may_be_are_an_error() -> None:
    body = asking(*["Hi"] * 5)
    for most, status in ((5, 200), (4, 400)):
        assert (await call(Wrapped(backend(), max_messages=most), PATH, body)).status == status


async def test_many_long_turns_are_asked_about_in_batches_of_bounded_size() -> None:
    guard = FakeGuard()
    sizes: list[int] = []
    judge = guard.judge

    class Watched(FakeGuard):
        async def judge(self, conversations: Any) -> Any:
            sizes.append(len(conversations))
            return await judge(conversations)

    await call(Wrapped(backend(), Watched()), PATH, asking(*["x" * 30_000] * 31))
    assert sum(sizes) == 32 and len(sizes) > 5


# The request's verdict beside the call.


async def test_reply_waits_for_the_verdict_on_its_request() -> None:
    behind = Backend(each(chunks(SAFE)), EVENTS)
    got = await call(Wrapped(behind, prompt_check="beside"), PATH, asking("Hi", stream=True))
    assert got.text() == SAFE and len(behind.bodies) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_blocked_request_beside_its_call_gives_nothing_out(stream: bool) -> None:
    called = asyncio.Event()
    verdicts = 0

    def gate() -> Any:
        nonlocal verdicts
        verdicts += 1
        return called.wait()

    class Noting(Backend):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            called.set()
            await super().__call__(scope, receive, send)

    sent = each(chunks(SAFE * 20)) if stream else [WHOLE]
    behind = Noting(sent, EVENTS if stream else "application/json")
    guard = FakeGuard(forbids(BAD), gate=gate)
    app = Wrapped(behind, guard, prompt_check="beside")
    got = await call(app, PATH, asking(BAD, stream=stream))
    assert called.is_set() and guard.open_streams == 0
    assert b"weather" not in got.body and b"Hello" not in got.body
    assert b"content_filter" in got.body and app.results == {"blocked_prompt": 1}


async def test_call_is_made_anew_when_an_old_exchange_is_left_out_beside_it() -> None:
    behind = backend()
    got = await call(Wrapped(behind, prompt_check="beside"), PATH, past(m0=BAD))
    assert got.json == reply("Hello there.")
    assert behind.asked["messages"] == PAST["messages"][2:]


async def test_client_that_leaves_beside_the_call_ends_both() -> None:
    leaves = asyncio.Event()
    never: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def gate() -> asyncio.Future[None]:
        leaves.set()
        return asyncio.shield(never)

    app = Wrapped(backend(), FakeGuard(gate=gate), prompt_check="beside")
    got = await call(app, PATH, asking("Hi"), leaves=leaves)
    assert got.status == 0 and app.results == {"gone": 1}
