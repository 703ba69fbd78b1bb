"""One trace from the client through middleware or sidecar to the engine, and to the backend."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from guard_middleware.asgi import GuardMiddleware
from guard_middleware.metrics import Metrics, shared
from guard_middleware.settings import Settings, SettingsError
from guard_middleware.sidecar import Places, Sidecar
from guard_service.config import Settings as ServiceSettings
from guard_service.local import local_server
from tests.middleware.asgi_calls import EVENTS, Backend, call, each, listening
from tests.middleware.formats.openai_replies import asking, chunks, reply
from tests.service.asking import until
from tests.service.traced import PARENT, PATIENCE_S, UNSAMPLED, Kept, ids, parent, receiving

CHAT = "/v1/chat/completions"
RPC = "guard_api.v1.GuardService"
TRACE, SPAN = PARENT.split("-")[1:3]
CALLER = [(b"traceparent", PARENT.encode()), (b"baggage", b"who=me")]


@pytest.fixture
def kept() -> Kept:
    return Kept()


@pytest.fixture
def guard(kept: Kept) -> Iterator[str]:
    """A guard that traces into the same memory."""
    with local_server(ServiceSettings(model="fake"), kept.traces) as target:
        yield target


def wrapped(backend: Backend, guard: str, kept: Kept, **knobs: Any) -> GuardMiddleware:
    settings = Settings(guard=guard, tracing="on", **knobs)
    return GuardMiddleware(backend, settings=settings, tracer_provider=kept.provider)


def whole(text: str = "Hello.") -> Backend:
    return Backend([json.dumps(reply(text)).encode()])


def header(backend: Backend, name: bytes) -> list[str]:
    return [value.decode() for key, value in backend.scopes[-1]["headers"] if key == name]


def calls(kept: Kept, rpc: str) -> tuple[list[ReadableSpan], list[ReadableSpan]]:
    """The client's spans of an RPC, and the server's."""
    spans = kept.named(f"{RPC}/{rpc}")
    client = [span for span in spans if span.kind.name == "CLIENT"]
    return client, [span for span in spans if span.kind.name == "SERVER"]


async def test_a_screened_request_is_one_trace(guard: str, kept: Kept) -> None:
    backend = whole()
    app = wrapped(backend, guard, kept)
    got = await call(app, CHAT, asking("Hi"), headers=CALLER)
    await app.close()
    assert got.status == 200
    screen, upstream = kept.one("guard.screen openai-chat"), kept.one("guard.upstream")
    assert {ids(span)[0] for span in kept.spans} == {TRACE}
    assert parent(screen) == SPAN and screen.kind.name == "SERVER"
    assert parent(upstream) == ids(screen)[1]
    assert header(backend, b"traceparent") == [f"00-{TRACE}-{ids(upstream)[1]}-01"]
    asked, served = calls(kept, "ClassifyBatch")
    assert {parent(span) for span in asked} == {ids(screen)[1]}
    assert [parent(span) for span in served] == [ids(span)[1] for span in asked]
    assert len(kept.named("guard.engine")) == len(kept.named("guard.judge")) == 2
    told = dict(screen.attributes or {})
    assert told["guard.result"] == "passed" and told["guard.verdicts"] == 2
    assert told["guard.exchange_id"] == got.headers["x-guard-verdict-id"]
    assert (upstream.attributes or {})["gen_ai.operation.name"] == "chat"


async def test_verdicts_on_a_stream_are_not_the_applications_work(guard: str, kept: Kept) -> None:
    app = wrapped(Backend(each(chunks("All is well. " * 30)), EVENTS), guard, kept)
    await call(app, CHAT, asking("Hi", stream=True), headers=CALLER)
    await app.close()
    await until(lambda: bool(calls(kept, "ClassifyStream")[1]))  # it ends after the client's
    (asked,), (served,) = calls(kept, "ClassifyStream")
    assert parent(asked) == ids(kept.one("guard.screen openai-chat"))[1]
    assert parent(served) == ids(asked)[1]


async def test_an_applications_own_span_is_the_parent(guard: str, kept: Kept) -> None:
    app = wrapped(whole(), guard, kept)
    with kept.provider.get_tracer("application").start_as_current_span("request") as own:
        await call(app, CHAT, asking("Hi"), headers=CALLER)
    await app.close()
    screen = kept.one("guard.screen openai-chat")
    assert parent(screen) == f"{own.get_span_context().span_id:016x}"
    assert screen.kind.name == "INTERNAL"


async def test_a_guard_in_the_process_joins(kept: Kept) -> None:
    app = wrapped(whole(), "", kept, model="fake")
    await call(app, CHAT, asking("Hi"), headers=CALLER)
    await app.close()
    assert {ids(span)[0] for span in kept.named("guard.engine")} == {TRACE}


async def test_shadow_mode_traces_its_copy_and_forwards_what_came(guard: str, kept: Kept) -> None:
    backend = whole()
    app = wrapped(backend, guard, kept, mode="shadow")
    await call(app, CHAT, asking("Hi"), headers=CALLER)
    await app.close()
    assert header(backend, b"traceparent") == [PARENT]
    assert {ids(span)[0] for span in kept.named("guard.engine")} == {TRACE}


async def test_what_the_caller_does_not_sample_is_not_traced(guard: str, kept: Kept) -> None:
    backend = whole()
    app = wrapped(backend, guard, kept)
    await call(app, CHAT, asking("Hi"), headers=[(b"traceparent", UNSAMPLED.encode())])
    await app.close()
    assert kept.spans == ()
    (carried,) = header(backend, b"traceparent")
    assert carried.startswith(f"00-{TRACE}-") and carried.endswith("-00")


async def test_off_is_off(guard: str, kept: Kept) -> None:
    backend = whole()
    app = GuardMiddleware(backend, guard)
    await call(app, CHAT, asking("Hi"), headers=CALLER)
    await app.close()
    assert header(backend, b"traceparent") == [PARENT]
    assert {ids(span)[0] for span in kept.spans}.isdisjoint({TRACE})  # the guard's begin anew


async def test_a_failing_application_is_told_without_its_words(guard: str, kept: Kept) -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("xq7marker")

    app = GuardMiddleware(
        broken, settings=Settings(guard=guard, tracing="on"), tracer_provider=kept.provider
    )
    with pytest.raises(RuntimeError):
        await call(app, CHAT, asking("Hi"))
    await app.close()
    assert (kept.one("guard.upstream").attributes or {})["error.type"] == "RuntimeError"
    assert "xq7marker" not in kept.told()


@pytest.mark.parametrize("stream", [False, True])
async def test_no_content_is_in_spans(guard: str, kept: Kept, stream: bool) -> None:
    marker = "xq7marker"
    chunked = Backend(each(chunks(marker * 20)), EVENTS)
    app = wrapped(chunked if stream else whole(marker), guard, kept)
    headers = [(b"baggage", marker.encode()), (b"authorization", marker.encode())]
    body = {**asking(marker, stream=stream), "model": marker, "user": marker}
    assert (await call(app, CHAT, body, headers=headers)).status == 200
    await app.close()
    assert kept.spans and marker not in kept.told()


async def test_exemplars_are_of_the_exchanges_trace(guard: str, kept: Kept) -> None:
    registry = CollectorRegistry()
    app = GuardMiddleware(
        whole(),
        settings=Settings(guard=guard, tracing="on"),
        metrics=Metrics(registry),
        tracer_provider=kept.provider,
    )
    await call(app, CHAT, asking("Hi"), headers=CALLER)
    await app.close()
    encode, kind = choose_encoder("application/openmetrics-text; version=1.0.0")
    assert kind.startswith("application/openmetrics-text")
    shown = encode(registry).decode()
    for name in ("prompt_seconds", "first_text_delay_seconds", "end_delay_seconds"):
        lines = [x for x in shown.splitlines() if x.startswith(f"guard_middleware_{name}_bucket")]
        assert any(f'trace_id="{TRACE}"' in line for line in lines), name


async def test_client_sidecar_guard_and_engine_are_one_trace_at_a_collector(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = whole()
    with receiving() as (receiver, address):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
        with local_server(ServiceSettings(model="fake", tracing=True)) as guard:
            async with (
                listening(backend) as upstream,
                sidecar_at(upstream, guard, tmp_path) as client,
            ):
                headers = {"traceparent": PARENT}
                got = await client.post(CHAT, json=asking("Hi"), headers=headers)
                assert got.status_code == 200
        names = ("guard.screen openai-chat", "guard.upstream", f"{RPC}/ClassifyBatch")
        await asyncio.to_thread(receiver.wait_for, *names, "guard.judge", "guard.engine")
    assert receiver.services == {"guard-service", "guard-sidecar"}
    assert {span.trace_id.hex() for span in receiver.spans} == {TRACE}
    known = {span.span_id for span in receiver.spans} | {bytes.fromhex(SPAN)}
    assert {span.parent_span_id for span in receiver.spans} <= known


async def test_a_sidecars_collector_that_fails_hurts_nobody_and_is_counted(
    fake_guard: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = shared().trace_spans.labels("failed")._value
    before = failed.get()
    with receiving(grpc.StatusCode.PERMISSION_DENIED) as (_, address):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
        async with (
            listening(whole()) as upstream,
            sidecar_at(upstream, fake_guard, tmp_path) as client,
        ):
            assert (await client.post(CHAT, json=asking("Hi"))).status_code == 200
    assert failed.get() > before


@asynccontextmanager
async def sidecar_at(upstream: str, guard: str, folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A whole sidecar with tracing; a client of it."""
    places = Places(upstream, listen=f"unix:{folder}/listen", admin=f"unix:{folder}/admin")
    sidecar = Sidecar(places, Settings(guard=guard, guarded=("/",), tracing="on"))
    task = asyncio.create_task(sidecar.serve())
    async with asyncio.timeout(PATIENCE_S):
        while not sidecar.server.started:
            await asyncio.sleep(0.01)
    transport = httpx.AsyncHTTPTransport(uds=f"{folder}/listen")
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://sidecar") as client:
            yield client
    finally:
        sidecar.server.should_exit = True
        await task


def test_without_opentelemetry_the_setting_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "guard_middleware.spans", None)
    with pytest.raises(SettingsError, match=r"llama-guard-service\[tracing\]"):
        GuardMiddleware(whole(), "127.0.0.1:1", tracing="on")
