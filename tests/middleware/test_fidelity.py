"""With a guard that allows everything clients get what the backend sent, in every protocol: byte
for byte, whichever way it was cut, with its status and its headers."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Iterator, Sequence

import httpx
import pytest

from guard_middleware.formats import FORMATS
from guard_middleware.messages import Message, Receive, Scope, Send
from guard_middleware.proxy import Proxy
from guard_middleware.testing import FakeGuard
from tests.middleware.asgi_calls import EVENTS, JSON, Backend, Reply, call, each, listening
from tests.middleware.formats.openai_replies import PATH, asking, chunks
from tests.middleware.formats.speech import Said, Speech
from tests.middleware.formats.speeches import SPEECHES
from tests.middleware.wrapped import SAFE, Wrapped

OWN = ((b"x-own", b"1"), (b"set-cookie", b"a=1"), (b"set-cookie", b"b=2"), (b"vary", b"origin"))
# What the middleware answers for itself: the length of a body that it held, its id.
OURS = {"content-length", "x-guard-verdict-id"}
WITHOUT_IDS = {"llama-cpp"}
WORDS = ("Ein Bär\n", 'said "no" \\ ', "\u2028 and \U0001f43b left. ")

every_speech = pytest.mark.parametrize("speech", SPEECHES, ids=lambda one: type(one).__name__)


def said_of(speech: Speech) -> list[tuple[Said, str]]:
    """Every channel of every choice, in pieces, interleaved."""
    saids = [Said(at, name) for at in range(speech.most_choices) for name in speech.channels]
    return [(said, word) for word in WORDS for said in saids]


def whole_of(speech: Speech) -> bytes:
    texts: dict[Said, str] = {}
    for said, word in said_of(speech):
        texts[said] = texts.get(said, "") + word
    return speech.whole(texts)


def cut(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


async def asked(speech: Speech, backend: Backend, streamed: bool) -> Reply:
    path = speech.stream_path if streamed else speech.path
    request = speech.request("Hi", streamed, speech.most_choices)
    app = Wrapped(backend, FakeGuard())
    got = await call(app, path, request)
    assert app.results == {"passed": 1}
    assert backend.asked == request
    return got


def test_every_format_that_streams_has_a_speech() -> None:
    batches = {one.name for one in FORMATS if "-batch-" in one.name}
    assert {one.format.name for one in SPEECHES} == {one.name for one in FORMATS} - batches


def same(speech: Speech, got: bytes, sent: bytes) -> bool:
    """Byte for byte; where a format takes token ids out, the same values but these."""
    if speech.format.name in WITHOUT_IDS:
        return values_of(got) == values_of(sent)
    return got == sent


def values_of(body: bytes) -> list[object]:
    lines = [line[6:] for line in body.splitlines() if line.startswith(b"data: ")]
    return [json.loads(line, object_hook=_without_ids) for line in lines or [body]]


def _without_ids(value: dict[str, object]) -> dict[str, object]:
    return {key: inner for key, inner in value.items() if key != "tokens"}


@every_speech
@pytest.mark.parametrize("size", [None, 1, 10_000_000], ids=["as sent", "1", "at once"])
async def test_stream_is_byte_for_byte_the_backends(speech: Speech, size: int | None) -> None:
    sent = speech.events(said_of(speech))
    pieces = cut(b"".join(sent), size) if size else sent
    backend = Backend(pieces, speech.stream_type, headers=OWN)
    got = await asked(speech, backend, streamed=True)
    assert (got.status, got.ended) == (200, True) and same(speech, got.body, b"".join(sent))
    assert own_headers(got) == {"content-type": speech.stream_type, "x-own": "1"} | COOKIES


@every_speech
@pytest.mark.parametrize("size", [1, 10_000_000], ids=["1", "at once"])
async def test_whole_reply_is_byte_for_byte_the_backends(speech: Speech, size: int) -> None:
    body = whole_of(speech)
    backend = Backend(cut(body, size), headers=OWN)
    got = await asked(speech, backend, streamed=False)
    assert (got.status, got.ended, got.body) == (200, True, body)
    assert own_headers(got) == {"content-type": JSON, "x-own": "1"} | COOKIES
    assert got.headers["content-length"] == str(len(body))


COOKIES = {"set-cookie": "b=2", "vary": "origin"}  # of `call`'s headers the last of a name


def own_headers(got: Reply) -> dict[str, str]:
    assert len(got.headers["x-guard-verdict-id"]) == 32
    return {name: value for name, value in got.headers.items() if name not in OURS}


@every_speech
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "stream"])
async def test_packed_reply_is_what_was_packed(speech: Speech, streamed: bool) -> None:
    body = b"".join(speech.events(said_of(speech))) if streamed else whole_of(speech)
    kind = speech.stream_type if streamed else JSON
    headers = ((b"content-encoding", b"gzip"),)
    got = await asked(
        speech, Backend(cut(gzip.compress(body), 100), kind, headers=headers), streamed
    )
    assert same(speech, got.body, body) and "content-encoding" not in got.headers


@every_speech
@pytest.mark.parametrize("status", [429, 500])
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "stream"])
async def test_error_is_byte_for_byte_the_backends(
    speech: Speech, status: int, streamed: bool
) -> None:
    body = json.dumps({"error": {"message": "Not today.", "type": "x", "code": status}}).encode()
    backend = Backend([body], status=status, headers=((b"retry-after", b"7"),))
    got = await asked(speech, backend, streamed)
    assert (got.status, got.body, got.headers["retry-after"]) == (status, body, "7")


async def test_set_cookies_stay_apart() -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    backend = Backend(each(chunks(SAFE)), EVENTS, headers=OWN)
    messages = [{"type": "http.request", "body": json.dumps(asking("Hi", stream=True)).encode()}]

    async def receive() -> Message:
        return messages.pop() if messages else {"type": "http.disconnect"}

    scope = {"type": "http", "method": "POST", "path": PATH, "headers": []}
    await Wrapped(backend, FakeGuard())(scope, _until(receive, sent), send)
    kept = [one for one in sent[0]["headers"] if one[0] != b"x-guard-verdict-id"]
    assert kept == [(b"content-type", EVENTS.encode()), *OWN]


def _until(receive: Receive, sent: Sequence[Message]) -> Receive:
    """The client leaves once it has got all."""

    async def receiving() -> Message:
        message = await receive()
        while message["type"] == "http.disconnect" and not (
            sent and sent[-1].get("more_body") is False
        ):
            await asyncio.sleep(0)
        return message

    return receiving


UNREAD = (
    ("GET", "/own"),
    ("PUT", "/own"),
    ("GET", "/v1/models"),
    ("HEAD", "/v1/models"),
    ("GET", "/health"),
    ("OPTIONS", PATH),
    ("OPTIONS", "/v1/unknown"),
)


@pytest.mark.parametrize(("method", "path"), UNREAD)
async def test_what_is_not_guarded_passes_as_it_is(method: str, path: str) -> None:
    """The application is given the client's own scope and send, and what the client sent."""
    seen: list[object] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend((scope, await receive(), send))

    async def receive() -> Message:
        return {"type": "http.request", "body": b"\xff" if method == "PUT" else b""}

    async def send(message: Message) -> None:
        raise AssertionError

    scope = {"type": "http", "method": method, "path": path, "headers": [(b"origin", b"x")]}
    await Wrapped(app)(scope, receive, send)
    assert seen[0] is scope and seen[2] is send
    got = seen[1]
    assert isinstance(got, dict) and got.get("body", b"") == (await receive())["body"]


class Switch:
    """The backend of the exchange that is under way."""

    def __init__(self) -> None:
        self.backend = Backend([b"{}"])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.backend(scope, receive, send)


async def test_through_the_sidecar_replies_are_byte_for_byte_the_backends() -> None:
    """Every protocol over real sockets; and preflights, HEAD and routes that pass unread."""
    switch = Switch()
    async with listening(switch) as upstream:
        proxy = Proxy(upstream)

        async def proxied(scope: Scope, receive: Receive, send: Send) -> None:
            await (proxy if scope["type"] == "http" else switch)(scope, receive, send)

        app = Wrapped(proxied, FakeGuard(), guarded=("/",))
        async with listening(app) as address, httpx.AsyncClient(timeout=60) as http:
            for speech, streamed, backend in _exchanges():
                switch.backend = backend
                url = address + (speech.stream_path if streamed else speech.path)
                request = speech.request("Hi", streamed, speech.most_choices)
                got = await http.post(url, json=request)
                assert got.status_code == 200 and backend.asked == request
                assert same(speech, got.content, b"".join(backend.chunks))
                assert got.headers["content-type"] == backend.content_type
                assert got.headers.get_list("set-cookie") == ["a=1", "b=2"]
            switch.backend = Backend([], "text/plain", 204, ((b"allow", b"POST"),))
            preflight = await http.options(f"{address}{PATH}", headers={"origin": "http://a.test"})
            head = await http.head(f"{address}/v1/models")
        await proxy.close()
    assert (preflight.status_code, preflight.headers["allow"]) == (204, "POST")
    assert (head.status_code, head.content) == (204, b"")


def _exchanges() -> Iterator[tuple[Speech, bool, Backend]]:
    for speech in SPEECHES:
        yield speech, False, Backend([whole_of(speech)], headers=OWN)
        yield speech, True, Backend(speech.events(said_of(speech)), speech.stream_type, headers=OWN)
