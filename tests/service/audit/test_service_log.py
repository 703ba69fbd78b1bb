"""The service writes its audit log before answers leave; what it says, and what it never says."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from guard_api.v1 import guard_pb2
from guard_policies.loader import builtin_policies
from guard_service.audit.chain import Entry
from guard_service.audit.entries import Question
from guard_service.audit.files import HEAD, segments
from guard_service.audit.keys import AuditError, read_keys
from guard_service.audit.payload import unseal
from guard_service.audit.prints import fingerprint
from guard_service.audit.verifying import verify
from guard_service.audit.writer import HELD_BYTES, WAITING, Writer
from guard_service.config import ConfigError, Settings
from guard_service.conversation import (
    Conversation,
    Image,
    Message,
    Role,
    Text,
    ToolCall,
    ToolResult,
)
from guard_service.engines.fake import FakeEngine
from guard_service.errors import NotRecorded
from guard_service.metrics import AuditMetrics, Metrics
from tests.service.asking import BOMB, Running, asked, piece, refused, start, until
from tests.service.audit.logs import lines
from tests.service.conftest import RunGuard
from tests.service.security.callers import Auth, bearer
from tests.service.traced import PARENT, PATIENCE_S, Kept

MARKER = "xq7marker"


def said(logged: dict[str, Any], *kinds: str) -> list[dict[str, Any]]:
    """The lines of these kinds, of a log that verifies."""
    folder = logged["audit"]
    verify(segments(folder), folder / HEAD, read_keys(logged["audit_key"]))
    return [one for one in lines(folder) if one["kind"] in (kinds or ("verdict",))]


async def test_a_verdict_is_on_the_disk_before_it_is_given(
    run_guard: RunGuard, logged: dict[str, Any]
) -> None:
    kept = Kept()
    guard = await run_guard(traces=kept.traces, **{**logged, "audit_fsync": True})
    metadata = (("x-request-id", "r-1"), ("traceparent", PARENT))
    verdict = (await guard.stub.Classify(asked(BOMB), metadata=metadata)).verdict
    (line,) = said(logged)
    assert (line["rpc"], line["request_id"]) == ("Classify", "r-1")
    assert line["trace_id"] == PARENT.split("-")[1]
    assert line["verdict_id"] == verdict.verdict_id
    assert line["policy"]["digest"] == verdict.policy.digest
    assert line["model"] == {"name": verdict.model.name, "digest": verdict.model.digest}
    assert (line["action"], line["direction"]) == ("block", "prompt")
    assert line["unsafe"] == verdict.unsafe_score
    assert line["scores"] == {one.code: one.score for one in verdict.categories}
    assert line["fired"] == {one.code: one.threshold for one in verdict.categories if one.fired}
    assert line["coverage"]["complete"] and line["coverage"]["parts"] == 1
    assert line["tokens"]["computed"] == verdict.timing.computed_tokens


async def test_the_policy_of_a_line_is_the_one_that_decided(
    run_guard: RunGuard, logged: dict[str, Any]
) -> None:
    candidate = "name: next\nversion: '2'\ncandidate: {for: default, share: 100}\n"
    guard = await run_guard(policies=(candidate,), **logged)
    verdict = (await guard.stub.Classify(asked(BOMB))).verdict
    (line,) = said(logged)
    assert line["policy"]["name"] == verdict.policy.name == "next"


async def test_answers_from_the_cache_have_their_line_too(
    run_guard: RunGuard, logged: dict[str, Any]
) -> None:
    guard = await run_guard(**logged)
    for _ in range(2):
        await guard.stub.Classify(asked("hello"))
    one, two = said(logged)
    assert (one["from_cache"], two["from_cache"]) == (False, True)
    assert one["verdict_id"] != two["verdict_id"]
    assert one["fingerprints"] == two["fingerprints"]


async def test_items_of_batches_and_verdicts_of_streams_have_a_line_each(
    run_guard: RunGuard, logged: dict[str, Any]
) -> None:
    guard = await run_guard(**logged)
    items = [asked("one"), asked("two", policy="no-such"), asked(BOMB)]
    await guard.stub.ClassifyBatch(guard_pb2.ClassifyBatchRequest(requests=items))
    assert len(said(logged)) == 2
    (refusal,) = said(logged, "refused")
    assert (refusal["rpc"], refusal["reason"]) == ("ClassifyBatch", "UNKNOWN_POLICY")
    steps = [start("hi"), piece("well", check=True), piece(" done", end=True)]
    replies = [reply async for reply in guard.stub.ClassifyStream(iter(steps))]
    streamed = [one for one in said(logged) if one["rpc"] == "ClassifyStream"]
    assert [one["step"] for one in streamed] == list(range(1, len(replies) + 1))
    assert len({one["stream"] for one in streamed}) == 1
    assert [one["verdict_id"] for one in streamed] == [r.verdict.verdict_id for r in replies]


async def test_what_got_no_verdict_has_one_line(
    run_guard: RunGuard, logged: dict[str, Any]
) -> None:
    class Broken(FakeEngine):
        broken = False

        def assess(self, prompts: Any) -> Any:
            if self.broken:
                raise RuntimeError(MARKER)
            return super().assess(prompts)

    engine = Broken()
    guard = await run_guard(engine, **logged)
    await refused(guard.stub.Classify(asked("x", policy="no-such")))
    await refused(guard.stub.Classify(guard_pb2.ClassifyRequest()))
    engine.broken = True
    await refused(guard.stub.Classify(asked("hello")))
    one, two, three = said(logged, "refused", "unjudged", "verdict")
    assert (one["kind"], one["reason"], one["code"]) == ("refused", "UNKNOWN_POLICY", "NOT_FOUND")
    assert (two["kind"], two["reason"]) == ("refused", "INVALID_CONVERSATION")
    assert (three["kind"], three["reason"]) == ("unjudged", "ENGINE_FAILED")
    assert three["policy"]["name"] == "default" and three["on_unavailable"] == "block"


async def test_a_caller_who_leaves_has_a_line(run_guard: RunGuard, logged: dict[str, Any]) -> None:
    class Held(FakeEngine):
        free = threading.Event()

        def assess(self, prompts: Any) -> Any:
            assert self.free.wait(30)
            return super().assess(prompts)

    engine = Held()
    engine.free.set()
    guard = await run_guard(engine, **logged)
    engine.free.clear()
    call = guard.stub.Classify(asked("hello"))
    waiting = asyncio.ensure_future(call)
    await until(lambda: bool(guard.server._door._tasks))
    call.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    engine.free.set()
    await until(lambda: bool(said(logged, "refused")))
    (line,) = said(logged, "refused")
    assert (line["code"], line["reason"]) == ("CANCELLED", "CALLER_GONE")


async def test_no_content_and_no_plain_hash_of_it_is_in_the_log(
    run_guard: RunGuard, logged: dict[str, Any]
) -> None:
    guard = await run_guard(**logged)
    await guard.stub.Classify(asked(MARKER))
    await refused(guard.stub.Classify(asked(MARKER, policy=MARKER)))
    await refused(guard.stub.Classify(asked(MARKER, language=f"{MARKER}!")))
    steps = [start(MARKER), piece(MARKER, check=True), piece(MARKER, end=True)]
    assert [reply async for reply in guard.stub.ClassifyStream(iter(steps))]
    await guard.server.stop(1.0)
    data = b"".join(path.read_bytes() for path in logged["audit"].iterdir())
    assert b"verdict" in data and MARKER.encode() not in data
    assert hashlib.sha256(MARKER.encode()).hexdigest().encode() not in data


def test_fingerprints_are_of_the_key_and_of_every_byte_and_place() -> None:
    base = Conversation.of(("user", "ab"), ("assistant", "c"))
    others = [
        Conversation.of(("user", "a"), ("assistant", "bc")),
        Conversation.of(("user", "ab"), ("user", "c")),
        Conversation.of(
            ("user", "ab"),
            ("assistant", "c "),
        ),
        Conversation.of(("user", "abc")),
    ]
    found = {fingerprint(one, b"key") for one in (base, *others)}
    assert len(found) == len(others) + 1
    assert fingerprint(base, b"key") in found and fingerprint(base, b"other") not in found


async def test_payloads_are_for_the_owner_of_the_private_key(
    run_guard: RunGuard, logged: dict[str, Any], pair: X25519PrivateKey, tmp_path: Path
) -> None:
    guard = await run_guard(audit_payload_key=tmp_path / "public.pem", **logged)
    await guard.stub.Classify(asked(MARKER, language="de"))
    await guard.stub.Classify(asked("another"))
    one, two = said(logged)
    request = guard_pb2.ClassifyRequest.FromString(unseal(one["payload"], pair, one["verdict_id"]))
    assert request.conversation.messages[0].parts[0].text == MARKER
    assert (request.policy, request.language) == ("default", "de")
    for sealed, key, of in (
        (one["payload"], X25519PrivateKey.generate(), one["verdict_id"]),
        (two["payload"], pair, one["verdict_id"]),
        (one["payload"][:-8], pair, one["verdict_id"]),
        ("?", pair, one["verdict_id"]),
    ):
        with pytest.raises(AuditError):
            unseal(sealed, key, of)
    assert MARKER not in (segments(logged["audit"])[-1]).read_text()


def failing(guard: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the disk is full."""
    assert guard.server._audit is not None

    def full(entries: Sequence[Entry]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(guard.server._audit.writer._log, "append", full)


def counted(guard: Running) -> tuple[float, float]:
    found = guard.server._audit_metrics.lines
    return found.labels("written")._value.get(), found.labels("failed")._value.get()


async def test_what_cannot_be_recorded_is_not_answered(
    run_guard: RunGuard,
    logged: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    guard = await run_guard(**logged)
    await guard.stub.Classify(asked("hello"))
    with monkeypatch.context() as patch:
        failing(guard, patch)
        for _ in range(2):
            refusal = await refused(guard.stub.Classify(asked("hello")))
            assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "NOT_RECORDED")
            assert refusal.metadata["on_unavailable"] == "block"
        batch = guard_pb2.ClassifyBatchRequest(requests=[asked("one")])
        (item,) = (await guard.stub.ClassifyBatch(batch)).results
        assert item.HasField("error") and not item.HasField("verdict")
        unknown = await refused(guard.stub.Classify(asked("x", policy="no-such")))
        assert unknown.reason == "UNKNOWN_POLICY"  # an error needs no record to be one
    assert (await guard.stub.Classify(asked("hello"))).verdict.verdict_id
    assert counted(guard) == (2, 4)
    told = [record.getMessage() for record in caplog.records]
    assert told.count("the audit log cannot be written") == 1  # not once for each


async def test_where_it_is_set_to_continue_answers_are_given(
    run_guard: RunGuard, logged: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = await run_guard(audit_failure="continue", **logged)
    failing(guard, monkeypatch)
    for _ in range(3):
        assert (await guard.stub.Classify(asked("hello"))).verdict.verdict_id
    await until(lambda: counted(guard)[1] == 3)


async def test_a_disk_that_hangs_fills_a_bounded_queue() -> None:
    class Hanging:
        free = threading.Event()

        def append(self, entries: Sequence[Entry]) -> None:
            assert self.free.wait(30)

        def stop(self) -> None:
            pass

    metrics = AuditMetrics(Metrics().registry)
    log = Hanging()
    writer = Writer(log, True, metrics)
    try:
        writer.soon(dict)
        await until(writer._queue.empty)
        for _ in range(WAITING):
            writer.soon(dict)
        with pytest.raises(NotRecorded):
            await writer.write(dict)
    finally:
        log.free.set()
        await asyncio.to_thread(writer.close)
    assert metrics.lines.labels("written")._value.get() == WAITING + 1


async def test_what_waits_for_the_disk_is_bounded_in_bytes_too() -> None:
    class Hanging:
        free = threading.Event()

        def append(self, entries: Sequence[Entry]) -> None:
            assert self.free.wait(PATIENCE_S)

        def stop(self) -> None:
            pass

    metrics = AuditMetrics(Metrics().registry)
    log = Hanging()
    writer = Writer(log, True, metrics)
    try:
        writer.soon(dict, HELD_BYTES - 1)
        writer.soon(dict, 1)
        with pytest.raises(NotRecorded):
            await writer.write(dict, 1)
    finally:
        log.free.set()
    await until(lambda: not writer._held)
    await writer.write(dict, 2 * HELD_BYTES)  # alone there is room for anything
    await asyncio.to_thread(writer.close)
    with pytest.raises(NotRecorded):
        await writer.write(dict)


def test_a_question_weighs_what_it_holds() -> None:
    parts = (Text("four"), Image(data=b"12345"), ToolCall("ab", "c"), ToolResult("1234567"))
    conversation = Conversation((Message(Role.ASSISTANT, parts),))
    question = Question(conversation, builtin_policies()["default"], "", False, False)
    assert question.weight == 4 + 5 + 3 + 7


async def test_the_tenant_is_told_and_who_has_no_token_is_refused_on_record(
    run_guard: RunGuard, logged: dict[str, Any], tmp_path: Path
) -> None:
    kept, auth = Kept(), Auth(tmp_path)
    acme = bearer(auth.tenant("acme", policies=["strict"], default_policy="strict"))
    guard = await run_guard(auth=auth.write(), traces=kept.traces, **logged)
    await guard.stub.Classify(asked("hi"), metadata=acme)
    await refused(guard.stub.Classify(asked("hi")))
    (verdict,) = said(logged)
    assert (verdict["tenant"], verdict["policy"]["name"]) == ("acme", "strict")
    (refusal,) = said(logged, "refused")
    assert (refusal["tenant"], refusal["reason"]) == ("", "UNAUTHENTICATED")
    one, two = kept.named("guard_api.v1.GuardService/Classify")
    assert (one.attributes or {})["guard.tenant"] == "acme"
    assert "guard.tenant" not in (two.attributes or {})
    token = dict(acme)["authorization"].removeprefix("Bearer ")
    log = b"".join(path.read_bytes() for path in segments(logged["audit"]))
    assert token.encode() not in log and token not in kept.told()


async def test_an_entry_that_cannot_be_made_fails_alone() -> None:
    class Kept:
        lines: list[Entry] = []

        def append(self, entries: Sequence[Entry]) -> None:
            self.lines += entries

        def stop(self) -> None:
            pass

    def broken() -> Entry:
        raise RuntimeError(MARKER)

    log = Kept()
    writer = Writer(log, True, AuditMetrics(Metrics().registry))
    found = await asyncio.gather(
        *(writer.write(one) for one in (lambda: {"n": 1}, broken, lambda: {"n": 2})),
        return_exceptions=True,
    )
    await asyncio.to_thread(writer.close)
    assert [type(one) for one in found] == [type(None), NotRecorded, type(None)]
    assert log.lines == [{"n": 1}, {"n": 2}]


async def test_many_callers_share_writes_and_the_chain_holds(
    run_guard: RunGuard, logged: dict[str, Any]
) -> None:
    guard = await run_guard(audit_segment_bytes=8192, **logged)
    replies = await asyncio.gather(*(guard.stub.Classify(asked(f"text {n}")) for n in range(60)))
    found = {one["verdict_id"] for one in said(logged)}
    assert found == {reply.verdict.verdict_id for reply in replies}
    assert len(segments(logged["audit"])) > 3
    await guard.server.stop(1.0)
    assert said(logged, "end")[-1]["why"] == "stop"


async def test_a_log_that_cannot_be_begun_keeps_the_server_from_starting(
    run_guard: RunGuard, logged: dict[str, Any]
) -> None:
    logged["audit"].mkdir()
    logged["audit"].chmod(0o777)
    with pytest.raises(OSError, match="anybody may write"):
        await run_guard(**logged)
    (logged["audit_key"]).write_text("short")
    with pytest.raises(OSError, match="openssl rand"):
        await run_guard(**logged)


def test_settings_that_do_not_go_together_are_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="audit: needs audit_key"):
        Settings(audit=tmp_path)
    with pytest.raises(ConfigError, match="audit_failure: 'ignore' is none of"):
        Settings(audit_failure="ignore")


def test_the_key_is_in_no_line(logged: dict[str, Any]) -> None:
    keys = read_keys(logged["audit_key"])
    assert "k" * 8 not in repr(keys) and keys.chain.hex() not in json.dumps(repr(keys))
