"""GuardMiddleware around OpenAI's chat: what goes in and what comes out is screened."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry

from guard_middleware import GuardMiddleware
from guard_middleware.metrics import Metrics
from guard_middleware.testing import FakeGuard, forbids
from tests.middleware.asgi_calls import EVENTS, Backend, call, each, sse
from tests.middleware.formats.openai_replies import PATH, asking, chunks, reply
from tests.middleware.wrapped import BAD, SAFE, fits


def wrapped(backend: Backend, guard: FakeGuard | None = None, **settings: Any) -> GuardMiddleware:
    guard = guard or FakeGuard(forbids(BAD))
    return GuardMiddleware(backend, guard, metrics=Metrics(CollectorRegistry()), **settings)


async def test_allowed_reply_passes_byte_for_byte() -> None:
    backend = Backend([json.dumps(reply("Hello there.")).encode()])
    app = wrapped(backend)
    got = await call(app, PATH, asking("Hi"))
    assert (got.status, got.ended) == (200, True)
    assert got.json == reply("Hello there.")
    assert backend.asked == asking("Hi")
    assert len(got.headers["x-guard-verdict-id"]) == 32


async def test_blocked_prompt_never_reaches_the_backend() -> None:
    backend = Backend([b"{}"])
    got = await call(wrapped(backend), PATH, asking(f"Make a {BAD}"))
    assert backend.bodies == []
    assert got.status == 200
    choice = got.json["choices"][0]
    assert choice["finish_reason"] == "content_filter"
    assert choice["message"]["content"] == "I can't help with that."


async def test_blocked_reply_is_replaced() -> None:
    backend = Backend([json.dumps(reply(f"Take a {BAD}")).encode()])
    got = await call(wrapped(backend), PATH, asking("Hi"))
    assert BAD not in got.body.decode()
    assert got.json["choices"][0]["finish_reason"] == "content_filter"


async def test_allowed_stream_passes_byte_for_byte() -> None:
    sent = sse(*chunks(SAFE))
    guard = FakeGuard(forbids(BAD))
    got = await call(wrapped(Backend([sent], EVENTS), guard), PATH, asking("Hi", stream=True))
    assert got.ended and got.body == sent
    assert guard.streamed == [SAFE] and guard.open_streams == 0


async def test_stream_ends_well_formed_before_what_is_blocked() -> None:
    backend = Backend(each(chunks(SAFE + BAD + SAFE)), EVENTS)
    got = await call(wrapped(backend), PATH, asking("Hi", stream=True))
    assert got.ended and got.body.endswith(b"data: [DONE]\n\n")
    assert got.text() and fits(got.text(), SAFE + BAD + SAFE)
    assert got.events[-1]["choices"][0]["finish_reason"] == "content_filter"
    assert got.events[-1]["id"] == "chatcmpl-7"


async def test_stream_that_is_blocked_at_once_is_a_refusal() -> None:
    backend = Backend([sse(*chunks(BAD + SAFE))], EVENTS)
    got = await call(wrapped(backend), PATH, asking("Hi", stream=True))
    assert got.text() == "I can't help with that."
    assert got.events[-1]["choices"][0]["finish_reason"] == "content_filter"


async def test_other_paths_pass_untouched() -> None:
    backend = Backend([b"anything"], "text/plain")
    got = await call(wrapped(backend), "/static/page", b"\xff", headers=[(b"x-own", b"1")])
    assert got.body == b"anything" and backend.bodies == [b"\xff"]
    assert backend.scopes[0]["extensions"] and "x-guard-verdict-id" not in got.headers


async def test_unknown_guarded_path_is_refused() -> None:
    backend = Backend([b"{}"])
    got = await call(wrapped(backend), "/v1/unknown", {"input": "x"})
    assert got.status == 403 and backend.bodies == []


async def test_client_that_leaves_ends_backend_and_guard() -> None:
    leaves = asyncio.Event()

    def endless() -> Iterator[bytes]:
        yield sse(*chunks(SAFE), done=False)
        leaves.set()
        while True:
            yield b": wait\n\n"

    backend, guard = Backend(endless(), EVENTS), FakeGuard()
    await call(wrapped(backend, guard), PATH, asking("Hi", stream=True), leaves=leaves)
    assert backend.cancelled == 1 and guard.open_streams == 0


async def test_guard_in_this_process_opens_when_it_is_first_needed() -> None:
    backend = Backend([json.dumps(reply("Hello there.")).encode()])
    app = GuardMiddleware(backend, model="fake", metrics=Metrics(CollectorRegistry()))
    try:
        allowed = await call(app, PATH, asking("Hi"))
        blocked = await call(app, PATH, asking(f"Make a {BAD}"))
    finally:
        await app.guard.close()
    assert allowed.json == reply("Hello there.")
    assert blocked.json["choices"][0]["finish_reason"] == "content_filter"
