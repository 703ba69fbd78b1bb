"""Traces of the service: one for each call, under the caller's, down to the engine; no content."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

from guard_api.v1 import guard_pb2
from guard_service import tracing
from guard_service.config import Settings
from guard_service.engines.fake import FakeEngine
from guard_service.logs import FIELDS
from guard_service.server import GuardServer
from tests.service.asking import BOMB, asked, piece, refused, start, until
from tests.service.conftest import RunGuard
from tests.service.traced import PARENT, PATIENCE_S, UNSAMPLED, Kept, ids, parent, receiving

RPC = "guard_api.v1.GuardService"


@pytest.fixture
def kept() -> Kept:
    return Kept()


async def test_a_call_is_one_trace_under_the_callers(run_guard: RunGuard, kept: Kept) -> None:
    guard = await run_guard(traces=kept.traces)
    reply = await guard.stub.Classify(
        asked(BOMB), metadata=(("traceparent", PARENT), ("x-request-id", "r-1"))
    )
    call, judge = kept.one(f"{RPC}/Classify"), kept.one("guard.judge")
    assert {ids(span)[0] for span in kept.spans} == {PARENT.split("-")[1]}
    assert parent(call) == PARENT.split("-")[2]
    assert parent(judge) == ids(call)[1]
    for name in ("guard.tokenize", "guard.queue", "guard.engine"):
        assert parent(kept.one(name)) == ids(judge)[1]
    assert dict(call.attributes or {}) == {
        "rpc.system.name": "grpc",
        "rpc.method": f"{RPC}/Classify",
        "rpc.response.status_code": "OK",
        "server.address": "guard.test",
        "server.port": 50051,
        "guard.request_id": "r-1",
    }
    verdict, told = reply.verdict, dict(judge.attributes or {})
    assert told["guard.verdict_id"] == verdict.verdict_id
    assert told["guard.action"] == "block"
    assert told["guard.direction"] == "prompt"
    assert told["guard.policy.digest"] == verdict.policy.digest
    assert told["guard.model.digest"] == verdict.model.digest
    assert told["guard.tokens.computed"] == verdict.timing.computed_tokens > 0
    assert told["guard.categories_fired"] == tuple(c.code for c in verdict.categories if c.fired)
    assert told["gen_ai.request.model"] == verdict.model.name


async def test_steps_stand_in_order_inside_their_parents(run_guard: RunGuard, kept: Kept) -> None:
    guard = await run_guard(traces=kept.traces)
    await guard.stub.Classify(asked("hello"))
    order = [kept.one(f"guard.{name}") for name in ("tokenize", "queue", "engine")]
    edges = [edge for span in order for edge in (span.start_time, span.end_time)]
    slack_ns = 5_000_000  # two clocks: that of the batcher, and that of spans
    assert all(
        b is not None and a is not None and b >= a - slack_ns
        for a, b in zip(edges, edges[1:], strict=False)
    )


async def test_without_a_parent_a_trace_begins_and_its_id_is_in_the_access_log(
    run_guard: RunGuard, kept: Kept, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "guard_service.access")
    guard = await run_guard(traces=kept.traces)
    await guard.stub.Classify(asked("hello"), metadata=(("traceparent", "nonsense"),))
    call = kept.one(f"{RPC}/Classify")
    assert parent(call) == ""
    assert [getattr(r, FIELDS)["trace_id"] for r in caplog.records] == [ids(call)[0]]


async def test_nobody_traces_what_the_caller_does_not_sample(
    run_guard: RunGuard, kept: Kept, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "guard_service.access")
    guard = await run_guard(traces=kept.traces)
    await guard.stub.Classify(asked("hello"), metadata=(("traceparent", UNSAMPLED),))
    assert kept.spans == ()
    assert [getattr(r, FIELDS)["trace_id"] for r in caplog.records] == [UNSAMPLED.split("-")[1]]


async def test_refusals_and_failures_are_told_by_their_reason(
    run_guard: RunGuard, kept: Kept
) -> None:
    class Broken(FakeEngine):
        broken = False

        def assess(self, prompts: Any) -> Any:
            if self.broken:
                raise RuntimeError(BOMB)
            return super().assess(prompts)

    engine = Broken()
    guard = await run_guard(engine, traces=kept.traces)
    await refused(guard.stub.Classify(asked(BOMB, policy="no-such")))
    engine.broken = True
    await refused(guard.stub.Classify(asked(BOMB)))
    unknown, failed = kept.named(f"{RPC}/Classify")
    assert (unknown.attributes or {})["error.type"] == "UNKNOWN_POLICY"
    assert unknown.status.status_code.name == "UNSET"  # the caller's doing
    assert (failed.attributes or {})["error.type"] == "ENGINE_FAILED"
    assert failed.status.status_code.name == "ERROR"
    assert (kept.one("guard.judge").attributes or {})["error.type"] == "ENGINE_FAILED"
    assert "bomb" not in kept.told()


async def test_engine_runs_of_several_are_linked(run_guard: RunGuard, kept: Kept) -> None:
    class Held(FakeEngine):
        entered, free = threading.Event(), threading.Event()

        def assess(self, prompts: Any) -> Any:
            self.entered.set()
            assert self.free.wait(PATIENCE_S)
            return super().assess(prompts)

    engine = Held()
    engine.free.set()
    guard = await run_guard(engine, traces=kept.traces)
    engine.free.clear()
    engine.entered.clear()
    alone = asyncio.ensure_future(guard.stub.Classify(asked("first")))
    await asyncio.to_thread(engine.entered.wait, PATIENCE_S)
    items = [asked(f"text {n}") for n in range(4)]
    batch = asyncio.ensure_future(
        guard.stub.ClassifyBatch(guard_pb2.ClassifyBatchRequest(requests=items))
    )
    await until(lambda: guard.server.batcher.queued_items == len(items))
    engine.free.set()
    await asyncio.gather(alone, batch)
    runs = kept.named("guard.engine")
    head, *others = [run for run in runs if (run.attributes or {})["guard.batch.prompts"] == 4]
    assert len(others) == 3 and not head.links
    for run in others:
        assert [f"{link.context.span_id:016x}" for link in run.links] == [ids(head)[1]]


async def test_streams_have_a_span_for_each_verdict(run_guard: RunGuard, kept: Kept) -> None:
    guard = await run_guard(traces=kept.traces)
    steps = [start("hi"), piece("well", check=True), piece(" done", end=True)]
    replies = [reply async for reply in guard.stub.ClassifyStream(iter(steps))]
    judged = kept.named("guard.judge")
    assert len(judged) == len(replies) >= 1
    assert {parent(span) for span in judged} == {ids(kept.one(f"{RPC}/ClassifyStream"))[1]}


async def test_a_second_guard_elsewhere_joins_the_trace(
    run_guard: RunGuard, kept: Kept, tmp_path: Path
) -> None:
    policy = "name: two\nversion: '1'\ncascade: {band: [0.0, 1.0]}\n"
    second = await run_guard(policies=(policy,), traces=kept.traces)
    first = await run_guard(
        policies=(policy,),
        traces=kept.traces,
        host=f"unix:{tmp_path / 'first'}",
        second_guard=second.server.address,
    )
    await first.stub.Classify(asked("hello", policy="two"))
    asked_second = kept.one("guard.second")
    outer, inner = sorted(kept.named(f"{RPC}/Classify"), key=lambda span: span.start_time or 0)
    assert parent(inner) == ids(asked_second)[1]
    assert {ids(span)[0] for span in kept.spans} == {ids(outer)[0]}


async def test_no_content_is_in_spans(run_guard: RunGuard, kept: Kept) -> None:
    guard = await run_guard(traces=kept.traces)
    marker = "xq7marker"
    await guard.stub.Classify(asked(f"{marker} {BOMB}"), metadata=(("x-other", marker),))
    await refused(guard.stub.Classify(asked(marker, policy=marker)))
    await refused(guard.stub.Classify(asked(marker, language=f"{marker}!")))
    steps = [start(marker), piece(marker, check=True), piece(marker, end=True)]
    assert [reply async for reply in guard.stub.ClassifyStream(iter(steps))]
    assert len(kept.spans) > 10
    assert marker not in kept.told()


async def test_exemplars_lead_to_sampled_traces_only(run_guard: RunGuard, kept: Kept) -> None:
    guard = await run_guard(traces=kept.traces, metrics=True, metrics_port=0)
    await guard.stub.Classify(asked("one"), metadata=(("traceparent", UNSAMPLED),))
    plain, openmetrics = await asyncio.gather(
        asyncio.to_thread(_scrape, guard.server.metrics_port, "text/plain"),
        asyncio.to_thread(_scrape, guard.server.metrics_port, OPEN_METRICS),
    )
    assert "trace_id" not in openmetrics[1]
    await guard.stub.Classify(asked("two"), metadata=(("traceparent", PARENT),))
    kind, shown = await asyncio.to_thread(_scrape, guard.server.metrics_port, OPEN_METRICS)
    assert kind.startswith("application/openmetrics-text")
    trace_id = PARENT.split("-")[1]
    for name in ("request", "tokenize", "queue", "inference"):
        lines = [x for x in shown.splitlines() if x.startswith(f"guard_{name}_seconds_bucket")]
        assert any(f'# {{trace_id="{trace_id}"}}' in line for line in lines), name
    kind, shown = await asyncio.to_thread(_scrape, guard.server.metrics_port, "text/plain")
    assert kind.startswith("text/plain") and trace_id not in shown


OPEN_METRICS = "application/openmetrics-text; version=1.0.0"


def _scrape(port: int, accept: str) -> tuple[str, str]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=20) as reply:
        return reply.headers["Content-Type"], reply.read().decode()


async def test_spans_reach_a_collector_as_the_environment_says(
    run_guard: RunGuard, monkeypatch: pytest.MonkeyPatch
) -> None:
    with receiving() as (receiver, address):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
        monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
        guard = await run_guard(tracing=True)
        await guard.stub.Classify(asked("hello"), metadata=(("traceparent", PARENT),))
        await guard.server.stop(1.0)
        await asyncio.to_thread(receiver.wait_for, f"{RPC}/Classify", "guard.engine")
    assert receiver.services == {"guard-service"}
    assert {span.trace_id.hex() for span in receiver.spans} == {PARENT.split("-")[1]}
    sent = guard.server._metrics.trace_spans.labels("sent")._value.get()
    assert sent == len(receiver.spans)


async def test_a_collector_that_fails_hurts_no_call_and_is_counted(
    run_guard: RunGuard, monkeypatch: pytest.MonkeyPatch
) -> None:
    with receiving(grpc.StatusCode.PERMISSION_DENIED) as (_, address):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
        guard = await run_guard(tracing=True)
        for _ in range(3):
            assert (await guard.stub.Classify(asked("hello"))).verdict.verdict_id
        await guard.server.stop(1.0)
    assert guard.server._metrics.trace_spans.labels("failed")._value.get() >= 3


async def test_a_collector_that_is_away_keeps_no_server_from_ending(
    run_guard: RunGuard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    guard = await run_guard(tracing=True)
    assert (await guard.stub.Classify(asked("hello"))).verdict.verdict_id
    async with asyncio.timeout(30):
        await guard.server.stop(1.0)


def test_an_exporter_that_is_not_there_is_an_error_that_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "zipkin")
    with pytest.raises(OSError, match="pip install opentelemetry-exporter-zipkin"):
        GuardServer(Settings(tracing=True), FakeEngine(), {})


def test_a_sampler_that_samples_nothing_is_honoured() -> None:
    kept = Kept(ALWAYS_OFF)
    spot = kept.traces.tracer.call("Classify", {})
    assert not spot.sampled
    with spot.step("guard.judge"):
        assert tracing.exemplar() is None
    spot.end("OK", "")
    assert kept.spans == ()


def test_the_server_does_not_need_opentelemetry() -> None:
    code = (
        "import sys\n"
        "sys.modules['opentelemetry'] = None\n"
        "from guard_service.config import Settings\n"
        "from guard_service.live.policies import loaded_policies\n"
        "from guard_service.server import GuardServer\n"
        "from guard_service.engines.fake import FakeEngine\n"
        "GuardServer(Settings(), FakeEngine(), loaded_policies(Settings()))\n"
        "try:\n"
        "    GuardServer(Settings(tracing=True), FakeEngine(), loaded_policies(Settings()))\n"
        "except OSError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "llama-guard-service[tracing]" in done.stdout
