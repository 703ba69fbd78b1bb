"""What becomes of exchanges through a real Envoy when something is wrong: nothing leaks."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from guard_middleware.messages import Receive, Scope, Send
from guard_middleware.testing import FakeGuard
from tests.middleware.asgi_calls import EVENTS, Backend, body_of, each
from tests.middleware.ext_proc.real_envoy import (
    BUFFERED,
    MODES,
    STREAMED,
    Setup,
    Stage,
    bootstrap,
    envoy,
    modes,
    needs_envoy,
    serving,
    stage,
)
from tests.middleware.formats.openai_replies import PATH, asking, chunks, reply
from tests.middleware.wrapped import BAD, SAFE

pytestmark = needs_envoy
every_mode = pytest.mark.parametrize("mode", MODES)
WHOLE = json.dumps(reply("Hello there.")).encode()


@pytest.mark.parametrize(
    ("mode", "more", "told"),
    [
        (modes("NONE"), {}, "request_body_mode NONE"),
        (modes(BUFFERED, "NONE"), {}, "response_body_mode NONE"),
        (modes("BUFFERED_PARTIAL", BUFFERED), {}, "request_body_mode BUFFERED_PARTIAL"),
        (modes(BUFFERED, "BUFFERED_PARTIAL"), {}, "response_body_mode BUFFERED_PARTIAL"),
        (modes(BUFFERED, request_header_mode="SKIP"), {}, "request_header_mode SEND"),
        (
            modes(STREAMED),
            {"send_body_without_waiting_for_header_response": True},
            "send_body_without_waiting_for_header_response",
        ),
    ],
    ids=lambda one: one if isinstance(one, str) else None,
)
async def test_modes_that_hide_what_is_to_be_screened_are_refused(
    mode: Mapping[str, str],
    more: Mapping[str, Any],
    told: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    backend = Backend([WHOLE])
    async with stage(Setup(mode, more), tmp_path, backend) as running:
        for _ in range(2):
            assert (await running.ask(PATH, asking("Hi"))).status == 500
    assert b"".join(backend.bodies) == b"" and caplog.text.count(told) == 1


@every_mode
async def test_reply_whose_headers_do_not_come_does_not_go_out(mode: str, tmp_path: Path) -> None:
    backend = Backend([json.dumps(reply(BAD)).encode()])
    setup = Setup(modes(mode, response_header_mode="SKIP"))
    async with stage(setup, tmp_path, backend) as running:
        got = await whatever(running, asking("Hi"))
    assert BAD.encode() not in got and b"choices" not in got


async def whatever(running: Stage, body: object) -> bytes:
    """All that comes back, whole or not."""
    got = bytearray()
    with suppress(httpx.HTTPError):
        async with running.client.stream("POST", PATH, json=body) as response:
            async for data in response.aiter_raw():
                got += data
    return bytes(got)


@every_mode
async def test_nothing_passes_without_the_processor(mode: str, tmp_path: Path) -> None:
    backend = Backend([WHOLE])
    async with stage(Setup(modes(mode)), tmp_path, backend) as running:
        assert (await running.ask(PATH, asking("Hi"))).status == 200
        running.server.stop()
        async with asyncio.timeout(60):
            while (await running.ask(PATH, asking("Hi"))).status == 200:
                pass
        asked = len(backend.bodies)
        assert (await running.ask(PATH, asking("Hi"))).status in (500, 503)
        assert (await running.ask("/v1/anything", asking("Hi"))).status in (500, 503)
        assert b"".join(backend.bodies[asked:]) == b""


@every_mode
async def test_reply_under_way_is_cut_off_when_the_processor_dies(
    mode: str, tmp_path: Path
) -> None:
    """What was not judged by then does not go out."""
    judging: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    asked = 0

    def gate() -> asyncio.Future[None]:
        nonlocal asked
        asked += 1
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if asked == 1:
            done.set_result(None)
        elif not judging.done():
            judging.set_result(None)  # and this verdict never comes
        return done

    backend = Backend(each(chunks("word")), EVENTS)  # in one event
    guard = FakeGuard(gate=gate)
    setup = Setup(modes(mode), drain_s=0)
    async with stage(setup, tmp_path, backend, guard) as running:
        task = asyncio.create_task(whatever(running, asking("Hi", stream=True)))
        async with asyncio.timeout(60):
            await judging
            running.server.stop()
            got = await task
    assert asked == 2 and b"word" not in got and b"[DONE]" not in got


@every_mode
async def test_guard_that_does_not_answer_is_an_unjudged_request(mode: str, tmp_path: Path) -> None:
    backend = Backend([WHOLE])
    nowhere = f"unix:{tmp_path / 'nobody'}"
    async with guarded_by(nowhere, mode, tmp_path, backend) as client:
        got = (await client.post(PATH, json=asking("Hi"))).json()
    assert (
        got["choices"][0]["finish_reason"] == "content_filter" and b"".join(backend.bodies) == b""
    )


@asynccontextmanager
async def guarded_by(target: str, mode: str, folder: Path, backend: Backend) -> Any:
    """A client before an Envoy whose processor asks a guard elsewhere."""
    from guard_middleware.ext_proc.server import Places, Server
    from guard_middleware.settings import Settings
    from tests.middleware.asgi_calls import listening
    from tests.middleware.ext_proc.real_envoy import client_over

    settings = Settings(guard=target, guarded=("/",), guard_timeout_s=0.2)
    places = Places(f"unix:{folder / 'processor'}", f"unix:{folder / 'processor-admin'}")
    async with (
        listening(backend, lifespan="off") as upstream,
        serving(Server(places, settings)),
        envoy(bootstrap(Setup(modes(mode)), folder, upstream), folder),
        client_over(httpx.AsyncHTTPTransport(uds=str(folder / "clients"))) as client,
    ):
        yield client


async def test_envoy_answers_for_a_processor_that_is_slower_than_its_timeout(
    tmp_path: Path,
) -> None:
    """message_timeout holds in BUFFERED and STREAMED modes: it must be longer than the guard's."""
    never: list[asyncio.Future[None]] = []

    def gate() -> asyncio.Future[None]:
        never.append(asyncio.get_running_loop().create_future())
        return never[-1]

    backend = Backend([WHOLE])
    setup = Setup(modes(BUFFERED), {"message_timeout": "0.2s"})
    async with stage(setup, tmp_path, backend, FakeGuard(gate=gate)) as running:
        got = await running.ask(PATH, asking("Hi"))
    assert got.status == 504 and b"".join(backend.bodies) == b""


@every_mode
async def test_body_that_is_larger_than_may_be_is_told_so(mode: str, tmp_path: Path) -> None:
    backend = Backend([WHOLE])
    async with stage(Setup(modes(mode)), tmp_path, backend, max_body_bytes=1000) as running:
        got = await running.ask(PATH, asking("a" * 100_000))
        assert await running.counted(invalid=1)
    assert got.status == 413 and got.json["error"]["code"] == "invalid_request"
    assert b"".join(backend.bodies) == b""


async def test_body_over_envoys_own_limit_is_told_so(tmp_path: Path) -> None:
    backend = Backend([WHOLE])
    setup = Setup(modes(BUFFERED), buffer_bytes=1024)
    async with stage(setup, tmp_path, backend) as running:
        got = await running.ask(PATH, asking("a" * 100_000))
    assert got.status == 413 and b"".join(backend.bodies) == b""


async def test_reply_over_envoys_own_limit_does_not_go_out(tmp_path: Path) -> None:
    setup = Setup(modes(BUFFERED), buffer_bytes=1024)
    backend = Backend([json.dumps(reply("a" * 100_000)).encode()])
    async with stage(setup, tmp_path, backend) as running:
        got = await running.ask(PATH, asking("Hi"))
    assert got.status == 500 and b"aaaa" not in got.body


@every_mode
async def test_backend_that_cannot_be_reached_is_told_without_envoys_words(
    mode: str, tmp_path: Path
) -> None:
    async def nobody(scope: Scope, receive: Receive, send: Send) -> None:
        await body_of(receive)
        raise ConnectionResetError

    async with stage(Setup(modes(mode)), tmp_path, nobody) as running:
        got = await running.ask(PATH, asking("Hi"))
    assert got.status in (500, 503) and got.json["error"]["code"] == "upstream_error"


@every_mode
async def test_backend_that_breaks_off_leaves_only_what_was_judged(
    mode: str, tmp_path: Path
) -> None:
    backend = Backend(each(chunks(SAFE))[:-1], EVENTS, breaks=True)
    async with stage(Setup(modes(mode)), tmp_path, backend) as running:
        got = await whatever(running, asking("Hi", stream=True))
        assert sum(running.results.values()) <= 1
    assert b"[DONE]" not in got
