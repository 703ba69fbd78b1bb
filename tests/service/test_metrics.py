"""What monitoring sees: metrics, probes, access lines; never content."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from guard_api.v1 import guard_pb2
from guard_service.logs import JsonFormatter, TextFormatter
from tests.service.asking import BOMB, Running, asked, fetched, refused
from tests.service.conftest import RunGuard

SECRET = "xyzzy-secret"


@pytest.fixture
async def seen(run_guard: RunGuard) -> Running:
    """A server with its HTTP port."""
    return await run_guard(metrics=True, metrics_port=0)


async def test_metrics_count_what_happened(seen: Running) -> None:
    for request in (asked(BOMB), asked(BOMB), asked("hi")):
        await seen.stub.Classify(request)
    await refused(seen.stub.Classify(asked()))
    status, text = await fetched(seen, "/metrics")
    assert status == 200
    lines = text.splitlines()
    for line in (
        'guard_requests_total{code="OK",rpc="Classify"} 3.0',
        'guard_requests_total{code="INVALID_ARGUMENT",rpc="Classify"} 1.0',
        'guard_verdicts_total{action="block",direction="prompt",policy="default"} 2.0',
        'guard_verdicts_total{action="allow",direction="prompt",policy="default"} 1.0',
        'guard_categories_fired_total{category="S9",direction="prompt"} 2.0',
        'guard_verdict_cache_total{result="hit"} 1.0',
        'guard_verdict_cache_total{result="miss"} 2.0',
        "guard_verdict_cache_entries 2.0",
        'guard_prefix_cache_total{result="hit"} 2.0',
        "guard_queue_seconds_count 2.0",
        'guard_in_flight{rpc="Classify"} 0.0',
        "guard_queue_items 0.0",
        "guard_ready 1.0",
    ):
        assert line in lines
    assert any(line.startswith('guard_model_info{digest="sha256:000') for line in lines)
    assert sum(line.startswith("guard_policy_info{") for line in lines) == 3
    for name in ("inference_seconds_count", "batch_items_count", "tokenize_seconds_count"):
        assert any(line.startswith(f"guard_{name} ") for line in lines)
    assert any(line.startswith('guard_tokens_total{how="computed"} ') for line in lines)


async def test_callers_cannot_make_new_labels(seen: Running) -> None:
    for index in range(3):
        await refused(seen.stub.Classify(asked("x", policy=f"{SECRET}-{index}")))
        await seen.stub.Classify(asked(f"{SECRET} {index}", language=f"xx-{index:03}"))
        unknown: Any = seen.channel.unary_unary(f"/guard_api.v1.GuardService/{SECRET}{index}")
        await refused(unknown(b""))
    _, text = await fetched(seen, "/metrics")
    assert SECRET not in text and "xx-001" not in text


async def test_probes_follow_the_server(seen: Running) -> None:
    assert await fetched(seen, "/livez") == (200, "live\n")
    assert await fetched(seen, "/readyz") == (200, "ready\n")
    assert (await fetched(seen, "/"))[0] == 404
    seen.server.worker_answers(False)
    assert await fetched(seen, "/readyz") == (503, "not ready\n")
    assert await fetched(seen, "/livez") == (503, "not live\n")
    refusal = await refused(seen.stub.Classify(asked("x")))
    assert refusal.reason == "NOT_READY"
    seen.server.worker_answers(True)
    assert await fetched(seen, "/readyz") == (200, "ready\n")


async def test_one_access_line_per_call_and_none_holds_content(
    seen: Running, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        metadata = (("x-request-id", "id-7"),)
        await seen.stub.Classify(asked(f"{SECRET} {BOMB}"), metadata=metadata)
        await refused(seen.stub.Classify(asked(SECRET, policy=SECRET, language=SECRET)))
        batch = guard_pb2.ClassifyBatchRequest(requests=[asked(SECRET), asked()])
        await seen.stub.ClassifyBatch(batch)
    lines = [json.loads(JsonFormatter().format(record)) for record in caplog.records]
    calls = [line for line in lines if line["logger"] == "guard_service.access"]
    assert [(line["rpc"], line["code"]) for line in calls] == [
        ("Classify", "OK"),
        ("Classify", "NOT_FOUND"),
        ("ClassifyBatch", "OK"),
    ]
    assert calls[0]["request_id"] == "id-7"
    assert (calls[0]["action"], calls[0]["fired"]) == ("block", ["S9"])
    assert calls[0]["computed_tokens"] > 0 and calls[0]["total_s"] > 0
    assert calls[1]["reason"] == "UNKNOWN_POLICY"
    text = "\n".join([*map(str, lines), *map(TextFormatter().format, caplog.records)])
    assert SECRET not in text


def test_a_logged_exception_shows_its_place_and_not_its_text() -> None:
    try:
        raise ValueError(SECRET)
    except ValueError as error:
        kind = (type(error), error, error.__traceback__)
    record = logging.LogRecord("x", logging.ERROR, "f", 1, "failed", None, kind)
    for formatter in (JsonFormatter(), TextFormatter()):
        line = formatter.format(record)
        assert "ValueError" in line and "test_metrics" in line
        assert SECRET not in line


def test_a_json_line_stays_one_line() -> None:
    record = logging.LogRecord("x", logging.INFO, "f", 1, "a\nb\u2028", None, None)
    assert len(JsonFormatter().format(record).splitlines()) == 1
