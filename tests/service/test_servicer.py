"""The five calls over real sockets."""

from __future__ import annotations

import threading

import grpc
import pytest

from guard_api.v1 import error_reason_pb2, guard_pb2, verdict_pb2
from guard_service.engines.fake import FakeEngine
from tests.service.asking import (
    BOMB,
    Running,
    asked,
    message,
    piece,
    refusal_of,
    refused,
    start,
    until,
)
from tests.service.conftest import RunGuard

IMAGE = guard_pb2.Message(
    role=guard_pb2.ROLE_USER,
    parts=[guard_pb2.Part(text="look"), guard_pb2.Part(image=guard_pb2.Image(data=b"\x89PNG"))],
)


async def test_harm_is_blocked_and_the_verdict_says_why(guard: Running) -> None:
    verdict = (await guard.stub.Classify(asked(BOMB))).verdict
    assert verdict.action == verdict_pb2.ACTION_BLOCK
    assert verdict.unsafe_score == pytest.approx(0.95)
    fired = [result for result in verdict.categories if result.fired]
    assert [(result.code, result.name) for result in fired] == [("S9", "Indiscriminate Weapons")]
    assert [result.code for result in verdict.categories][:3] == ["S1", "S2", "S3"]
    assert verdict.direction == verdict_pb2.DIRECTION_PROMPT
    assert verdict.model.name == "fake" and verdict.model.digest.startswith("sha256:")
    assert verdict.policy.name == "default" and verdict.policy.digest.startswith("sha256:")
    assert verdict.coverage.complete and len(verdict.coverage.windows) == 1
    assert verdict.timing.total.ToNanoseconds() >= verdict.timing.inference.ToNanoseconds() > 0
    assert verdict.timing.computed_tokens > 0 and verdict.timing.cached_tokens > 0
    assert len(verdict.verdict_id) == 32
    assert verdict.shadow_action == verdict_pb2.ACTION_UNSPECIFIED


async def test_a_harmless_reply_is_allowed_as_a_response(guard: Running) -> None:
    verdict = (await guard.stub.Classify(asked("hi", message("hello", "assistant")))).verdict
    assert verdict.action == verdict_pb2.ACTION_ALLOW
    assert verdict.direction == verdict_pb2.DIRECTION_RESPONSE
    assert len(verdict.coverage.parts) == 2


async def test_an_identical_conversation_comes_from_the_cache(guard: Running) -> None:
    first = (await guard.stub.Classify(asked(BOMB))).verdict
    second = (await guard.stub.Classify(asked(BOMB))).verdict
    fresh = (await guard.stub.Classify(asked(BOMB, no_cache=True))).verdict
    assert [first.from_cache, second.from_cache, fresh.from_cache] == [False, True, False]
    assert second.unsafe_score == first.unsafe_score and second.verdict_id != first.verdict_id
    assert second.timing.computed_tokens == 0
    assert sum(texts == (f"User: {BOMB}\n\n",) for texts in guard.engine.batches) == 2


async def test_an_unknown_policy_is_not_found(guard: Running) -> None:
    refusal = await refused(guard.stub.Classify(asked("hi", policy="none-such")))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_POLICY")
    assert "none-such" not in refusal.message


async def test_errors_say_what_the_policy_wants_without_a_verdict(guard: Running) -> None:
    refusal = await refused(guard.stub.Classify(asked("hi", language="not a tag!")))
    assert (refusal.code, refusal.reason) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_CONVERSATION",
    )
    policies = await guard.stub.ListPolicies(guard_pb2.ListPoliciesRequest())
    default = next(p for p in policies.policies if p.policy.name == policies.default_policy)
    wanted = verdict_pb2.Action.Name(default.on_unavailable_prompt)
    assert f"ACTION_{refusal.metadata['on_unavailable'].upper()}" == wanted


async def test_a_batch_answers_item_by_item_in_order(guard: Running) -> None:
    request = guard_pb2.ClassifyBatchRequest(
        requests=[asked("one"), asked(), asked(BOMB), asked("x", policy="none-such"), asked("one")]
    )
    results = (await guard.stub.ClassifyBatch(request)).results
    assert [result.WhichOneof("outcome") for result in results] == [
        "verdict",
        "error",
        "verdict",
        "error",
        "verdict",
    ]
    assert results[0].verdict.action == verdict_pb2.ACTION_ALLOW
    assert results[2].verdict.action == verdict_pb2.ACTION_BLOCK
    empty, unknown = results[1].error, results[3].error
    assert (empty.code, empty.reason) == (3, error_reason_pb2.ERROR_REASON_INVALID_CONVERSATION)
    assert (unknown.code, unknown.reason) == (5, error_reason_pb2.ERROR_REASON_UNKNOWN_POLICY)
    assert "conversation.messages" in empty.message


async def test_a_batch_over_the_limit_is_refused_whole(run_guard: RunGuard) -> None:
    guard = await run_guard(max_batch_items=2)
    request = guard_pb2.ClassifyBatchRequest(requests=[asked("x")] * 3)
    refusal = await refused(guard.stub.ClassifyBatch(request))
    assert (refusal.code, refusal.reason) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "BATCH_TOO_LARGE",
    )
    assert not (await guard.stub.ClassifyBatch(guard_pb2.ClassifyBatchRequest())).results


async def test_an_image_is_never_safe_with_a_text_only_model(run_guard: RunGuard) -> None:
    engine = FakeEngine()
    refusing = POLICY.format(name="refusing", extra="on_unscannable: error")
    blocking = POLICY.format(name="blocking", extra="on_unscannable: block")
    allowing = POLICY.format(name="allowing", extra="on_unscannable: allow")
    guard = await run_guard(engine, (refusing, blocking, allowing))
    refusal = await refused(guard.stub.Classify(asked(IMAGE, policy="refusing")))
    assert (refusal.code, refusal.reason) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "UNSCANNABLE",
    )
    assert refusal.message == "cannot judge images: model fake is text-only"
    for policy, action in (
        ("blocking", verdict_pb2.ACTION_BLOCK),
        ("allowing", verdict_pb2.ACTION_ALLOW),
    ):
        verdict = (await guard.stub.Classify(asked(IMAGE, policy=policy))).verdict
        assert verdict.action == action
        assert not verdict.coverage.complete
        text, image = verdict.coverage.parts
        assert text.state == verdict_pb2.PART_STATE_JUDGED
        assert image.state == verdict_pb2.PART_STATE_NOT_JUDGED
        assert (image.kind, image.reason) == (verdict_pb2.PART_KIND_IMAGE, "MODEL_IS_TEXT_ONLY")


async def test_a_shadow_policy_lets_pass_and_tells(run_guard: RunGuard) -> None:
    guard = await run_guard(policies=(POLICY.format(name="quiet", extra="mode: shadow"),))
    verdict = (await guard.stub.Classify(asked(BOMB, policy="quiet"))).verdict
    assert verdict.action == verdict_pb2.ACTION_ALLOW
    assert verdict.shadow_action == verdict_pb2.ACTION_BLOCK


async def test_info_tells_what_runs_and_its_limits(guard: Running) -> None:
    info = await guard.stub.GetInfo(guard_pb2.GetInfoRequest())
    (model,) = info.models
    assert model.engine == "fake" and "fake" in model.notice and not model.judges_images
    assert not model.custom_codes
    assert info.limits.max_message_bytes == 4 * 1024 * 1024
    images = ("max_images", "max_image_bytes", "max_image_pixels")
    assert [getattr(info.limits, name) for name in images] == [0, 0, 0]
    assert info.limits.default_deadline.seconds == 30
    assert info.started_at.seconds > 0


async def test_policies_are_listed_by_name(guard: Running) -> None:
    reply = await guard.stub.ListPolicies(guard_pb2.ListPoliciesRequest())
    names = [summary.policy.name for summary in reply.policies]
    assert names == sorted(names) and reply.default_policy in names


async def test_a_stream_judges_where_asked_and_at_the_end(guard: Running) -> None:
    call = guard.stub.ClassifyStream()
    await call.write(start("tell me"))
    await call.write(piece("Sure: the "))
    await call.write(piece("fake-", check=True))
    early = await call.read()
    assert (early.covered_chars, early.final) == (15, False)
    assert early.verdict.action == verdict_pb2.ACTION_ALLOW
    assert early.verdict.direction == verdict_pb2.DIRECTION_RESPONSE
    await call.write(piece("bomb", end=True))
    last = await call.read()
    assert (last.covered_chars, last.final) == (19, True)
    assert last.verdict.action == verdict_pb2.ACTION_BLOCK
    assert await call.read() == grpc.aio.EOF
    assert await call.code() == grpc.StatusCode.OK


async def test_a_stream_judges_at_the_cadence_of_its_policy(run_guard: RunGuard) -> None:
    extra = "stream: {check_every_chars: 50, first_check_chars: 50}"
    guard = await run_guard(policies=(POLICY.format(name="often", extra=extra),))
    call = guard.stub.ClassifyStream()
    await call.write(start("hi", policy="often"))
    for _ in range(2):
        await call.write(piece("ä" * 40))
    reply = await call.read()
    assert reply.covered_chars == 80
    await call.write(piece("", end=True))
    assert (await call.read()).final


async def test_a_stream_is_judged_early_and_at_the_ends_of_sentences(run_guard: RunGuard) -> None:
    extra = "stream: {first_check_chars: 10, sentence_ends: true}"
    guard = await run_guard(policies=(POLICY.format(name="sentences", extra=extra),))
    call = guard.stub.ClassifyStream()
    await call.write(start("hi", policy="sentences"))
    await call.write(piece("A beginning"))
    assert (await call.read()).covered_chars == 11
    await call.write(piece(" and more of it"))
    await call.write(piece(". And on"))
    assert (await call.read()).covered_chars == 34
    await call.write(piece("", end=True))
    assert (await call.read()).final


async def test_pieces_that_wait_are_judged_together(run_guard: RunGuard) -> None:
    gate = threading.Event()
    engine = FakeEngine()
    extra = "stream: {check_every_chars: 1}"
    guard = await run_guard(engine, (POLICY.format(name="always", extra=extra),))
    engine.before_run = lambda texts: (gate.wait(10), None)[1]
    done = len(engine.batches)
    call = guard.stub.ClassifyStream()
    await call.write(start("hi", policy="always"))
    await call.write(piece("a"))
    await until(lambda: len(engine.batches) > done)
    for _ in range(5):
        await call.write(piece("b"))
    await call.write(piece("c", end=True))
    gate.set()
    replies = [reply async for reply in call]
    assert replies[0].covered_chars == 1 and replies[-1].covered_chars == 7
    assert len(replies) < 7 and replies[-1].final


@pytest.mark.parametrize(
    ("steps", "code", "reason"),
    [
        ([piece("x")], "INVALID_ARGUMENT", "INVALID_STREAM"),
        ([], "INVALID_ARGUMENT", "INVALID_STREAM"),
        ([start("hi")], "INVALID_ARGUMENT", "INVALID_STREAM"),
        ([start("hi"), start("hi")], "INVALID_ARGUMENT", "INVALID_STREAM"),
        ([start("hi"), piece("no end")], "INVALID_ARGUMENT", "INVALID_STREAM"),
        (
            [start("hi"), guard_pb2.ClassifyStreamRequest()],
            "INVALID_ARGUMENT",
            "INVALID_STREAM",
        ),
        ([start()], "INVALID_ARGUMENT", "INVALID_CONVERSATION"),
        ([start("hi", policy="none-such")], "NOT_FOUND", "UNKNOWN_POLICY"),
        ([start("hi"), piece("x" * 101)], "INVALID_ARGUMENT", "CONVERSATION_TOO_LONG"),
    ],
)
async def test_a_stream_out_of_order_is_refused(
    run_guard: RunGuard, steps: list[guard_pb2.ClassifyStreamRequest], code: str, reason: str
) -> None:
    guard = await run_guard(max_conversation_chars=100)
    call = guard.stub.ClassifyStream(iter(steps))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    refusal = refusal_of(caught.value)
    assert (refusal.code.name, refusal.reason) == (code, reason)


async def test_an_idle_stream_ends(run_guard: RunGuard) -> None:
    guard = await run_guard(stream_idle_s=0.05)
    for steps in ([], [start("hi")]):
        call = guard.stub.ClassifyStream()
        for step in steps:
            await call.write(step)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in call:
                pass
        assert refusal_of(caught.value).reason == "DEADLINE_EXCEEDED"


POLICY = """\
name: {name}
version: "1"
description: For tests.
{extra}
"""
