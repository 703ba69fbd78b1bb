"""Shadow mode changes nothing and reports everything."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from guard_middleware import GuardMiddleware
from guard_middleware import shadow as shadow_module
from guard_middleware.guards import Conversation
from guard_middleware.messages import Receive, Scope, Send
from guard_middleware.metrics import Metrics
from guard_middleware.testing import FakeGuard, forbids
from guard_middleware.verdict import Outcome
from tests.middleware.asgi_calls import EVENTS, Backend, body_of, call, each
from tests.middleware.formats.openai_replies import PATH, asking, chunks, reply
from tests.middleware.wrapped import BAD, SAFE


class Shadowed:
    """A middleware in shadow mode, and what it reported."""

    def __init__(self, app: Any, guard: FakeGuard | None = None, **settings: Any) -> None:
        self.registry = CollectorRegistry()
        self.guard = guard or FakeGuard(forbids(BAD))
        metrics = Metrics(self.registry)
        self.app = GuardMiddleware(app, self.guard, metrics=metrics, mode="shadow", **settings)

    async def results(self) -> list[str]:
        await self.app.close()
        return [
            sample.labels["result"]
            for metric in self.registry.collect()
            for sample in metric.samples
            if sample.name == "guard_middleware_exchanges_total"
            for _ in range(int(sample.value))
            if sample.labels["mode"] == "shadow"
        ]


async def test_request_and_reply_pass_byte_for_byte() -> None:
    raw = b' { "messages" : [{"role":"user","content":"\\u0048i"}] } '
    backend = Backend([b'{"choices" ', b": []}"], headers=((b"x-own", b"1"),))
    shadowed = Shadowed(backend)
    got = await call(shadowed.app, PATH, raw, headers=[(b"accept-encoding", b"br")])
    assert backend.bodies == [raw] and got.chunks == [b'{"choices" ', b": []}", b""]
    assert (b"accept-encoding", b"br") in backend.scopes[0]["headers"]
    assert backend.scopes[0]["extensions"]
    assert got.headers == {"content-type": "application/json", "x-own": "1"}
    assert await shadowed.results() == ["passed"]


@pytest.mark.parametrize(
    ("said", "replied", "result"),
    [
        ("Hi", SAFE, "passed"),
        (f"Make a {BAD}", SAFE, "blocked_prompt"),
        ("Hi", SAFE + BAD, "blocked_response"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_enforcing_would_have_done_is_counted(
    said: str, replied: str, result: str, stream: bool
) -> None:
    sent = each(chunks(replied)) if stream else [json.dumps(reply(replied)).encode()]
    backend = Backend(sent, EVENTS if stream else "application/json")
    shadowed = Shadowed(backend)
    got = await call(shadowed.app, PATH, asking(said, stream=stream))
    assert got.chunks == [*sent, b""] and got.ended
    assert await shadowed.results() == [result]
    assert shadowed.guard.open_streams == 0


@pytest.mark.parametrize("body", [b"\xff no json", b"{}", b'{"messages": [], "messages": []}'])
async def test_what_no_format_can_read_passes_and_is_counted(body: bytes) -> None:
    backend = Backend([b"ok"], "text/plain")
    shadowed = Shadowed(backend)
    got = await call(shadowed.app, PATH, body)
    assert got.body == b"ok" and backend.bodies == [body]
    assert await shadowed.results() == ["invalid"]


async def test_unknown_guarded_path_passes_and_is_counted() -> None:
    shadowed = Shadowed(Backend([b"ok"], "text/plain"))
    assert (await call(shadowed.app, "/v1/unknown", {"input": "x"})).body == b"ok"
    assert shadowed.registry.get_sample_value("guard_middleware_refused_total") == 1


async def test_reply_does_not_wait_for_the_guard() -> None:
    gate: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    guard = FakeGuard(forbids(BAD), gate=lambda: asyncio.shield(gate))
    shadowed = Shadowed(Backend(each(chunks(SAFE)), EVENTS), guard)
    got = await call(shadowed.app, PATH, asking("Hi", stream=True))
    assert got.text() == SAFE
    gate.set_result(None)
    assert await shadowed.results() == ["passed"]


async def test_copy_that_outgrows_its_bounds_is_dropped_and_the_reply_is_not() -> None:
    never: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    guard = FakeGuard(gate=lambda: asyncio.shield(never))
    limits = {"max_body_bytes": 1000, "max_reply_bytes": 1000}
    shadowed = Shadowed(Backend(each(chunks(SAFE)), EVENTS), guard, **limits)
    got = await call(shadowed.app, PATH, asking("Hi", stream=True))
    assert got.text() == SAFE
    assert await shadowed.results() == ["skipped"]


async def test_more_copies_than_may_be_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadow_module, "MOST_COPIES", 1)
    gate: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    guard = FakeGuard(gate=lambda: asyncio.shield(gate))
    shadowed = Shadowed(Backend([json.dumps(reply("Hello.")).encode()]), guard)
    for _ in range(3):
        assert (await call(shadowed.app, PATH, asking("Hi"))).json == reply("Hello.")
    gate.set_result(None)
    assert sorted(await shadowed.results()) == ["passed", "skipped", "skipped"]


class _Broken(FakeGuard):
    async def judge(self, conversations: Sequence[Conversation]) -> Sequence[Outcome]:
        raise RuntimeError("out of order")


async def test_guard_that_fails_changes_nothing() -> None:
    shadowed = Shadowed(Backend([json.dumps(reply("Hello.")).encode()]), _Broken())
    assert (await call(shadowed.app, PATH, asking("Hi"))).json == reply("Hello.")
    assert await shadowed.results() == ["blocked_prompt"]


async def test_application_that_fails_fails_as_without_us() -> None:
    async def failing(scope: Scope, receive: Receive, send: Send) -> None:
        await body_of(receive)
        raise KeyError("own")

    shadowed = Shadowed(failing)
    with pytest.raises(KeyError, match="own"):
        await call(shadowed.app, PATH, asking("Hi"))
    assert await shadowed.results() == ["aborted"]


async def test_reply_that_breaks_off_is_counted_as_aborted() -> None:
    backend = Backend(each(chunks(SAFE))[:5], EVENTS, breaks=True)
    shadowed = Shadowed(backend)
    with pytest.raises(ConnectionResetError):
        await call(shadowed.app, PATH, asking("Hi", stream=True))
    assert await shadowed.results() == ["aborted"]


async def test_request_that_nobody_read_to_its_end_is_counted_as_gone() -> None:
    async def unread(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 401, "headers": []})
        await send({"type": "http.response.body"})

    shadowed = Shadowed(unread)
    assert (await call(shadowed.app, PATH, asking("Hi"))).status == 401
    assert await shadowed.results() == ["gone"]
