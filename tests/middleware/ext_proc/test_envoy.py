"""What clients get through a real Envoy with the processor, in each of its modes."""

from __future__ import annotations

import asyncio
import gzip
import json
from pathlib import Path

import httpx
import pytest

from guard_middleware.messages import Receive, Scope, Send
from guard_middleware.testing import FakeGuard
from tests.middleware.asgi_calls import EVENTS, Backend, body_of, each
from tests.middleware.ext_proc.real_envoy import (
    BUFFERED,
    DUPLEX,
    MODES,
    STREAMED,
    Setup,
    modes,
    needs_envoy,
    stage,
)
from tests.middleware.formats.openai_replies import PATH, asking, chunks, reply
from tests.middleware.wrapped import BAD, SAFE

pytestmark = needs_envoy
every_mode = pytest.mark.parametrize("mode", MODES)
REFUSAL = "No."
START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", EVENTS.encode())],
}
WHOLE = json.dumps(reply("Hello there.")).encode()


@every_mode
async def test_blocked_prompt_is_refused_and_goes_nowhere(mode: str, tmp_path: Path) -> None:
    backend = Backend([WHOLE])
    async with stage(Setup(modes(mode)), tmp_path, backend) as envoy:
        whole = await envoy.ask(PATH, asking(f"Make a {BAD}"))
        streamed = await envoy.ask(PATH, asking(f"Make a {BAD}", stream=True))
        assert await envoy.counted(blocked_prompt=2)
    assert whole.status == 200 and whole.headers["x-guard-verdict-id"]
    assert whole.json["choices"][0]["finish_reason"] == "content_filter"
    assert int(whole.headers["content-length"]) == len(whole.body)
    assert streamed.headers["content-type"].startswith(EVENTS)
    assert streamed.events[-1]["choices"][0]["finish_reason"] == "content_filter"
    assert b"".join(backend.bodies) == b""


@every_mode
async def test_refusal_may_be_an_error(mode: str, tmp_path: Path) -> None:
    async with stage(Setup(modes(mode)), tmp_path, Backend([WHOLE]), refuse_with="error") as envoy:
        got = await envoy.ask(PATH, asking(BAD))
    assert got.status == 400 and got.json["error"]["code"] == "content_filter"


@every_mode
async def test_blocked_reply_has_the_backends_status_and_none_of_its_words(
    mode: str, tmp_path: Path
) -> None:
    said = json.dumps(reply(f"Take a {BAD}")).encode()
    async with stage(Setup(modes(mode)), tmp_path, Backend([said])) as envoy:
        whole = await envoy.ask(PATH, asking("Hi"))
        envoy.backend = Backend([json.dumps({"error": BAD}).encode()], status=529)
        error = await envoy.ask(PATH, asking("Hi"))
        assert await envoy.counted(blocked_response=2)
    assert whole.json["choices"][0]["finish_reason"] == "content_filter"
    assert error.status == 529 and error.json["error"]["code"] == "upstream_error"


@every_mode
async def test_backends_harmless_error_comes_as_it_is(mode: str, tmp_path: Path) -> None:
    error = b'{"error": "model is loading"}'
    async with stage(Setup(modes(mode)), tmp_path, Backend([error], status=503)) as envoy:
        got = await envoy.ask(PATH, asking("Hi"))
    assert got.status == 503 and got.body == error


@pytest.mark.parametrize("mode", [DUPLEX, BUFFERED])
async def test_whole_reply_may_become_an_error(mode: str, tmp_path: Path) -> None:
    said = json.dumps(reply(BAD)).encode()
    setup = Setup(modes(mode))
    async with stage(setup, tmp_path, Backend([said]), refuse_with="error") as envoy:
        got = await envoy.ask(PATH, asking("Hi"))
    assert got.status == 400 and got.json["error"]["code"] == "content_filter"


async def test_reply_that_cannot_become_an_error_any_more_is_cut_off(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In STREAMED mode its headers may have gone on."""
    said = json.dumps(reply(BAD)).encode()
    setup = Setup(modes(STREAMED))
    async with stage(setup, tmp_path, Backend([said]), refuse_with="error") as envoy:
        try:
            got = await envoy.ask(PATH, asking("Hi"))
        except httpx.RemoteProtocolError:
            pass
        else:
            assert got.status == 500 and BAD.encode() not in got.body
    assert "set response_body_mode FULL_DUPLEX_STREAMED or BUFFERED" in caplog.text


async def test_text_goes_out_while_the_backend_still_speaks(tmp_path: Path) -> None:
    goes_on = asyncio.Event()

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await body_of(receive)
        await send(START)
        for data in each(chunks(SAFE)):
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await goes_on.wait()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async with stage(Setup(modes(DUPLEX)), tmp_path, slow) as envoy:
        body = asking("Hi", stream=True)
        async with envoy.client.stream("POST", PATH, json=body) as response:
            received = response.aiter_raw()
            got = b""
            while got.count(b"data: ") < 10:
                got += await anext(received)
            goes_on.set()
            got += b"".join([data async for data in received])
    assert got == b"".join(each(chunks(SAFE)))


async def test_blocked_stream_ends_before_the_backend_does(tmp_path: Path) -> None:
    asked, over = asyncio.Event(), asyncio.Event()

    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        await body_of(receive)
        await send(START)
        for data in each(chunks(SAFE + BAD + SAFE))[:-1]:
            await send({"type": "http.response.body", "body": data, "more_body": True})
        asked.set()
        while (await receive())["type"] != "http.disconnect":
            pass
        over.set()

    async with stage(Setup(modes(DUPLEX)), tmp_path, endless, refusal=REFUSAL) as envoy:
        got = await envoy.ask(PATH, asking("Hi", stream=True))
        async with asyncio.timeout(60):
            await asked.wait()
            await over.wait()  # Envoy lets go of the backend, too
    assert got.events[-1]["choices"][0]["finish_reason"] == "content_filter"
    assert SAFE.startswith(got.text().removesuffix(REFUSAL))


@every_mode
async def test_client_that_leaves_ends_guard_and_backend(mode: str, tmp_path: Path) -> None:
    began, over = asyncio.Event(), asyncio.Event()

    async def waiting(scope: Scope, receive: Receive, send: Send) -> None:
        await body_of(receive)
        await send(START)
        for data in each(chunks(SAFE))[:-1]:
            await send({"type": "http.response.body", "body": data, "more_body": True})
        began.set()
        while (await receive())["type"] != "http.disconnect":
            pass
        over.set()

    guard = FakeGuard()
    async with stage(Setup(modes(mode)), tmp_path, waiting, guard) as envoy:
        task = asyncio.create_task(envoy.ask(PATH, asking("Hi", stream=True)))
        async with asyncio.timeout(60):
            await began.wait()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await over.wait()
        assert await envoy.counted(gone=1)
        assert guard.open_streams == 0


@every_mode
async def test_packed_bodies_are_read(mode: str, tmp_path: Path) -> None:
    packed = {"content-encoding": "gzip", "accept-encoding": "gzip"}
    reply_ = Backend([gzip.compress(WHOLE)], headers=((b"content-encoding", b"gzip"),))
    async with stage(Setup(modes(mode)), tmp_path, reply_) as envoy:
        blocked = await envoy.ask(PATH, gzip.compress(json.dumps(asking(BAD)).encode()), packed)
        got = await envoy.ask(PATH, gzip.compress(json.dumps(asking("Hi")).encode()), packed)
    assert blocked.json["choices"][0]["finish_reason"] == "content_filter"
    assert got.body == WHOLE and "content-encoding" not in got.headers
    headers = dict(reply_.scopes[0]["headers"])
    assert reply_.asked == asking("Hi") and headers[b"accept-encoding"] == b"identity"
    assert b"content-encoding" not in headers


@every_mode
@pytest.mark.parametrize("override", [False, True], ids=["", "allow_mode_override"])
async def test_what_is_not_guarded_passes_untouched(
    mode: str, override: bool, tmp_path: Path
) -> None:
    backend = Backend([BAD.encode()] * 3, "text/plain", headers=((b"content-encoding", b"br"),))
    setup = Setup(modes(mode), {"allow_mode_override": override})
    async with stage(setup, tmp_path, backend, guarded=("/v1",)) as envoy:
        got = await envoy.ask("/upload", BAD.encode() * 5000, {"x-guard-verdict-id": "mine"})
        health = await envoy.answer(envoy.client.build_request("GET", "/v1/models"))
        assert envoy.results == {}
    assert got.body == health.body == BAD.encode() * 3
    assert got.headers["content-encoding"] == "br" and "x-guard-verdict-id" not in got.headers
    assert backend.bodies == [BAD.encode() * 5000, b""]
    assert dict(backend.scopes[0]["headers"])[b"x-guard-verdict-id"] == b"mine"


@every_mode
async def test_requests_that_no_format_reads_are_refused_on_guarded_paths(
    mode: str, tmp_path: Path
) -> None:
    backend = Backend([WHOLE])
    asked = [
        ("POST", "/v1/anything", b"{}"),
        ("GET", "/v1/anything", b""),
        ("PUT", PATH, b"{}"),
        ("GET", "/v1/models", BAD.encode()),
        ("GET", "/v1/%6dodels%2f..%2fchat", b""),
    ]
    async with stage(Setup(modes(mode)), tmp_path, backend) as envoy:
        for method, path, body in asked:
            got = await envoy.answer(envoy.client.build_request(method, path, content=body))
            assert got.status == 403, path
        head = await envoy.answer(envoy.client.build_request("HEAD", PATH))
        empty = await envoy.answer(envoy.client.build_request("POST", PATH))
        socket = {
            **{"connection": "upgrade", "upgrade": "websocket", "sec-websocket-version": "13"},
            "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
        }
        asks = envoy.client.build_request("GET", "/v1/realtime", headers=socket)
        upgrade = await envoy.answer(asks)
    assert (head.status, head.body, upgrade.status) == (403, b"", 403)
    assert empty.status == 400 and "x-guard-verdict-id" in empty.headers
    assert b"".join(backend.bodies) == b""


@every_mode
async def test_shadow_mode_changes_nothing_and_counts(mode: str, tmp_path: Path) -> None:
    sent = each(chunks(SAFE + BAD))
    backend = Backend(sent, EVENTS)
    async with stage(Setup(modes(mode)), tmp_path, backend, mode="shadow") as envoy:
        body = json.dumps(asking("Hi", stream=True), indent=3).encode()
        got = await envoy.ask(PATH, body)
        bad = await envoy.ask(PATH, asking(BAD))
        other = await envoy.ask("/v1/anything", b"x")
        assert await envoy.counted(**{"shadow: blocked_response": 1, "shadow: blocked_prompt": 1})
    assert got.body == bad.body == other.body == b"".join(sent)
    assert "x-guard-verdict-id" not in got.headers and backend.bodies[0] == body


async def test_in_observability_mode_nothing_is_changed_and_all_is_counted(tmp_path: Path) -> None:
    sent = each(chunks(SAFE + BAD))
    setup = Setup(modes(STREAMED), {"observability_mode": True, "failure_mode_allow": True})
    async with stage(setup, tmp_path, Backend(sent, EVENTS)) as envoy:
        got = await envoy.ask(PATH, asking("Hi", stream=True))
        await envoy.ask(PATH, asking(BAD))
        await envoy.ask("/v1/anything", b"x")
        assert await envoy.counted(**{"shadow: blocked_response": 1, "shadow: blocked_prompt": 1})
    assert got.body == b"".join(sent)


@pytest.mark.parametrize("mode", [DUPLEX, BUFFERED])
async def test_bodies_of_megabytes_go_through(mode: str, tmp_path: Path) -> None:
    said = "a" * 5_000_000
    whole = json.dumps(reply(said)).encode()
    setup = Setup(modes(mode), buffer_bytes=2**24)
    backend = Backend([whole[at : at + 65536] for at in range(0, len(whole), 65536)])
    async with stage(setup, tmp_path, backend) as envoy:
        got = await envoy.ask(PATH, asking(said))
        assert await envoy.counted(passed=1)
    assert got.body == whole and backend.asked == asking(said)


async def test_many_exchanges_at_once_do_not_meet(tmp_path: Path) -> None:
    async def echo(scope: Scope, receive: Receive, send: Send) -> None:
        asked = json.loads(await body_of(receive))["messages"][0]["content"]
        await send(START)
        for data in each(chunks(asked * 20)):
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async with stage(Setup(modes(DUPLEX)), tmp_path, echo, refusal=REFUSAL) as envoy:
        names = [f"exchange {number}. " for number in range(60)]
        bad = [name + BAD for name in names]
        asked = [envoy.ask(PATH, asking(one, stream=True)) for one in names + bad]
        got = await asyncio.gather(*asked)
        assert await envoy.counted(passed=60, blocked_prompt=60)
    for name, one in zip(names, got, strict=False):
        assert one.text() == name * 20
    assert all(one.text() == REFUSAL for one in got[60:])
