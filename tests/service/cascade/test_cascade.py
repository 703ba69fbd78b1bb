"""Which guard of a cascade decides, over real sockets, with both in one server."""

from __future__ import annotations

import logging

import grpc
import pytest

from guard_api.v1 import guard_pb2, verdict_pb2
from guard_policies.loader import builtin_policies, parse_policy
from guard_service.config import Settings
from guard_service.errors import PolicyNotSupported
from guard_service.logs import FIELDS
from guard_service.server import GuardServer
from tests.service.asking import (
    Running,
    asked,
    fetched,
    message,
    piece,
    refused,
    start,
)
from tests.service.cascade.guards import LARGE, SMALL, Told, says, with_picture
from tests.service.conftest import RunGuard

HEAD = "name: tiered\nversion: '1'\n"
BAND = HEAD + "cascade: {band: [0.25, 0.75]}\n"


def told(verdict: verdict_pb2.Verdict) -> tuple[str, float, str, str, str]:
    """Action, score, model, tier and reason."""
    action = verdict_pb2.Action.Name(verdict.action).removeprefix("ACTION_")
    model = verdict.model
    score = round(verdict.unsafe_score, 6)
    return action, score, model.name, model.tier, model.tier_reason


async def judged(guard: Running, *turns: guard_pb2.Message | str, policy: str = "tiered") -> object:
    return told((await guard.stub.Classify(asked(*turns, policy=policy))).verdict)


async def test_the_second_decides_in_the_band_and_the_verdict_says_so(run_guard: RunGuard) -> None:
    small, large = Told(SMALL), Told(LARGE)
    guard = await run_guard(small, (BAND,), second=large)
    texts = (says(0.1, 0.9), says(0.3, 0.9), says(0.6, 0.2), says(0.9, 0.1))
    assert [await judged(guard, text) for text in texts] == [
        ("ALLOW", 0.1, SMALL, "first", "OUTSIDE_BAND"),
        ("BLOCK", 0.9, LARGE, "second", "IN_BAND"),
        ("ALLOW", 0.2, LARGE, "second", "IN_BAND"),
        ("BLOCK", 0.9, SMALL, "first", "OUTSIDE_BAND"),
    ]
    assert [large.saw(text) for text in texts] == [0, 1, 1, 0]


async def test_the_access_log_tells_the_tiers_that_decided(
    run_guard: RunGuard, caplog: pytest.LogCaptureFixture
) -> None:
    guard = await run_guard(Told(SMALL), (BAND,), second=Told(LARGE))
    with caplog.at_level(logging.INFO, "guard_service.access"):
        await judged(guard, says(0.3, 0.9))
        batch = [asked(says(small, 0.9), policy="tiered") for small in (0.1, 0.6)]
        await guard.stub.ClassifyBatch(guard_pb2.ClassifyBatchRequest(requests=batch))
        await judged(guard, "hello", policy="default")
    tiers = [getattr(record, FIELDS).get("tiers") for record in caplog.records]
    assert tiers == [["second IN_BAND"], ["first OUTSIDE_BAND", "second IN_BAND"], None]


async def test_a_category_goes_up_from_its_score_on(run_guard: RunGuard) -> None:
    policy = HEAD + "cascade: {categories: {S4: 0.05}}\n"
    guard = await run_guard(Told(SMALL), (policy,), second=Told(LARGE))
    up, down = says(0.06, 0.9, small_code="S4"), says(0.06, 0.9, small_code="S5")
    assert await judged(guard, up) == ("BLOCK", 0.9, LARGE, "second", "CATEGORY")
    assert await judged(guard, down) == ("ALLOW", 0.06, SMALL, "first", "OUTSIDE_BAND")


async def test_an_image_is_for_the_second_and_the_first_is_not_asked(run_guard: RunGuard) -> None:
    small, large = Told(SMALL), Told(LARGE, sees_images=True)
    guard = await run_guard(small, (BAND,), second=large)
    text = says(0.1, 0.9)
    assert await judged(guard, with_picture(text)) == ("BLOCK", 0.9, LARGE, "second", "IMAGE")
    earlier = (with_picture(text), message("fine", "assistant"), message("and now?"))
    assert await judged(guard, *earlier) == ("BLOCK", 0.9, LARGE, "second", "IMAGE")
    assert small.saw(text) == 0


async def test_without_images_in_the_cascade_the_first_does_with_them_what_it_can(
    run_guard: RunGuard,
) -> None:
    policy = HEAD + "on_unscannable: flag\ncascade: {band: [0.25, 0.75], images: false}\n"
    guard = await run_guard(Told(SMALL), (policy,), second=Told(LARGE, sees_images=True))
    assert await judged(guard, with_picture(says(0.1, 0.9))) == (
        "FLAG",
        0.1,
        SMALL,
        "first",
        "OUTSIDE_BAND",
    )


async def test_one_window_in_the_band_takes_the_conversation_up(run_guard: RunGuard) -> None:
    small = Told(SMALL, window_tokens=128)
    guard = await run_guard(small, (BAND,), second=Told(LARGE))
    long = says(0.3, 0.9) + " and so on" * 60 + f" {SMALL}=0.95/S2"
    assert await judged(guard, long) == ("BLOCK", 0.9, LARGE, "second", "IN_BAND")
    assert len(small.batches[-1]) > 2


async def test_policies_without_a_cascade_are_the_first_guard_s_alone(run_guard: RunGuard) -> None:
    large = Told(LARGE)
    guard = await run_guard(Told(SMALL), (BAND,), second=large)
    text = says(0.3, 0.9)
    assert await judged(guard, text, policy="") == ("ALLOW", 0.3, SMALL, "", "")
    assert large.saw(text) == 0


async def test_a_direction_that_is_off_asks_neither(run_guard: RunGuard) -> None:
    small, large = Told(SMALL), Told(LARGE)
    policy = HEAD + "prompt: off\ncascade: {band: [0, 1]}\n"
    guard = await run_guard(small, (policy,), second=large)
    text = says(0.3, 0.9)
    assert await judged(guard, text) == ("ALLOW", 0.0, SMALL, "first", "POLICY_IS_OFF")
    reply = await judged(guard, "hi", message(text, "assistant"))
    assert reply == ("BLOCK", 0.9, LARGE, "second", "IN_BAND")
    assert small.saw(text) == large.saw(text) == 1


async def test_a_shadow_policy_lets_pass_what_its_second_would_block(run_guard: RunGuard) -> None:
    guard = await run_guard(Told(SMALL), (BAND + "mode: shadow\n",), second=Told(LARGE))
    verdict = (await guard.stub.Classify(asked(says(0.3, 0.9), policy="tiered"))).verdict
    assert told(verdict)[0] == "ALLOW" and verdict.shadow_action == verdict_pb2.ACTION_BLOCK


async def test_the_verdict_costs_what_both_cost(run_guard: RunGuard) -> None:
    small, large = Told(SMALL), Told(LARGE)
    guard = await run_guard(small, (BAND,), second=large)
    stayed = (await guard.stub.Classify(asked(says(0.1, 0.9), policy="tiered"))).verdict
    went = (await guard.stub.Classify(asked(says(0.3, 0.9), policy="tiered"))).verdict
    assert went.timing.computed_tokens == 2 * stayed.timing.computed_tokens
    assert went.timing.total.ToNanoseconds() >= went.timing.inference.ToNanoseconds() > 0


async def test_a_batch_goes_up_item_by_item(run_guard: RunGuard) -> None:
    guard = await run_guard(Told(SMALL), (BAND,), second=Told(LARGE))
    texts = [says(0.1, 0.9), says(0.3, 0.9), says(0.9, 0.1)]
    request = guard_pb2.ClassifyBatchRequest(
        requests=[asked(text, policy="tiered") for text in texts]
    )
    results = (await guard.stub.ClassifyBatch(request)).results
    assert [one.verdict.model.tier for one in results] == ["first", "second", "first"]


async def test_a_growing_reply_goes_up_whole_and_once_for_each_text(run_guard: RunGuard) -> None:
    small, large = Told(SMALL), Told(LARGE)
    guard = await run_guard(small, (BAND,), second=large)
    call = guard.stub.ClassifyStream()
    await call.write(start("hi", policy="tiered"))
    verdicts = []
    steps = [
        piece(says(0.1, 0.9), check=True),
        piece(says(0.3, 0.2), check=True),
        piece("", check=True),
        piece("", end=True),
    ]
    for step in steps:
        await call.write(step)
        reply = await call.read()
        verdicts.append(told(reply.verdict))
    assert [(score, tier) for _, score, _, tier, _ in verdicts] == [
        (0.1, "first"),
        (0.2, "second"),
        (0.2, "second"),
        (0.2, "second"),
    ]
    assert reply.final and reply.verdict.from_cache
    assert large.saw(says(0.3, 0.2)) == 1
    assert large.batches[-1] == (f"User: hi\n\nAgent: {says(0.1, 0.9)}{says(0.3, 0.2)}\n\n",)


async def test_a_growing_reply_to_an_image_is_read_once_for_each_text(run_guard: RunGuard) -> None:
    large = Told(LARGE, sees_images=True)
    guard = await run_guard(Told(SMALL), (BAND,), second=large)
    call = guard.stub.ClassifyStream()
    opening = start(policy="tiered")
    opening.start.conversation.messages.append(with_picture("look"))
    await call.write(opening)
    for step in (piece(says(0.1, 0.2), check=True), piece("", check=True), piece("", end=True)):
        await call.write(step)
        verdict = (await call.read()).verdict
        assert told(verdict) == ("ALLOW", 0.2, LARGE, "second", "IMAGE")
    assert verdict.from_cache and large.saw(says(0.1, 0.2)) == 1


async def test_a_server_asked_as_the_second_judges_alone(run_guard: RunGuard) -> None:
    large = Told(LARGE)
    wants = f"engine: {SMALL}\n" + BAND.replace("{band", f"{{second: {LARGE}, band")
    guard = await run_guard(large, (wants,))
    request = asked(says(0.3, 0.9), policy="tiered", as_second=True)
    verdict = (await guard.stub.Classify(request)).verdict
    assert told(verdict) == ("BLOCK", 0.9, LARGE, "", "")
    assert verdict.policy.digest == parse_policy(wants).digest


async def test_a_server_without_a_second_guard_refuses_a_policy_with_a_cascade(
    run_guard: RunGuard,
) -> None:
    guard = await run_guard(Told(SMALL), (BAND,))
    refusal = await refused(guard.stub.Classify(asked("hi", policy="tiered")))
    assert refusal.code is grpc.StatusCode.FAILED_PRECONDITION
    assert refusal.reason == "POLICY_NOT_SUPPORTED"
    assert "--second-model" in refusal.message
    policies = {**builtin_policies(), "tiered": parse_policy(BAND)}
    with pytest.raises(PolicyNotSupported, match="no second guard"):
        GuardServer(Settings(default_policy="tiered"), Told(SMALL), policies)


async def test_a_policy_that_wants_another_second_is_refused(run_guard: RunGuard) -> None:
    wants = BAND.replace("{band", "{second: huge, band")
    guard = await run_guard(Told(SMALL), (wants,), second=Told(LARGE))
    refusal = await refused(guard.stub.Classify(asked("hi", policy="tiered")))
    assert refusal.reason == "POLICY_NOT_SUPPORTED" and "huge, not large" in refusal.message


async def test_info_names_both_models_with_their_tiers(run_guard: RunGuard) -> None:
    guard = await run_guard(Told(SMALL), second=Told(LARGE))
    info = await guard.stub.GetInfo(guard_pb2.GetInfoRequest())
    assert [(one.model.name, one.model.tier) for one in info.models] == [
        (SMALL, "first"),
        (LARGE, "second"),
    ]
    alone = await run_guard(Told(SMALL), host="unix:" + guard.server.address[5:] + "-alone")
    info = await alone.stub.GetInfo(guard_pb2.GetInfoRequest())
    assert [(one.model.name, one.model.tier) for one in info.models] == [(SMALL, "")]


async def test_metrics_count_each_verdict_once_and_by_tier(run_guard: RunGuard) -> None:
    guard = await run_guard(Told(SMALL), (BAND,), second=Told(LARGE), metrics=True, metrics_port=0)
    for text in (says(0.1, 0.9), says(0.3, 0.9), says(0.3, 0.9)):
        await judged(guard, text)
    lines = (await fetched(guard, "/metrics"))[1].splitlines()
    for line in (
        'guard_verdicts_total{action="allow",direction="prompt",policy="tiered"} 1.0',
        'guard_verdicts_total{action="block",direction="prompt",policy="tiered"} 2.0',
        'guard_categories_fired_total{category="S1",direction="prompt"} 2.0',
        'guard_cascade_verdicts_total{reason="OUTSIDE_BAND",tier="first"} 1.0',
        'guard_cascade_verdicts_total{reason="IN_BAND",tier="second"} 2.0',
        "guard_second_seconds_count 2.0",
        "guard_second_answers 1.0",
        'guard_verdict_cache_total{result="hit"} 1.0',
        'guard_second_verdict_cache_total{result="hit"} 1.0',
        "guard_second_verdict_cache_entries 1.0",
        "guard_verdict_cache_entries 2.0",
    ):
        assert line in lines
    assert any(line.startswith("guard_second_model_info{") for line in lines)
