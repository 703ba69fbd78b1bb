"""The second guard on another server: asked over gRPC, believed only as far as it adds up."""

from __future__ import annotations

import base64
import math
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from guard_api.v1 import guard_pb2, verdict_pb2
from guard_service.conversation import (
    Conversation,
    Image,
    Message,
    Role,
    Text,
    ToolCall,
    ToolResult,
)
from guard_service.wire import Sizes, conversation_of, message_of
from tests.middleware.fake_service import FakeService, Refusal, serving
from tests.service.asking import Running, asked, message, refused
from tests.service.cascade.guards import LARGE, SMALL, Told, says, with_picture
from tests.service.conftest import RunGuard
from tests.service.images.drawing import RED, drawn
from tests.service.security.issuing import Authority

POLICY = "name: tiered\nversion: '1'\ncascade: {band: [0.25, 0.75], when_unable: %s}\n"
ERROR, FIRST = POLICY % "error", POLICY % "first"
UP = says(0.3, 0.9)
Cascade = Callable[..., Awaitable[Running]]


@pytest.fixture
def cascade(run_guard: RunGuard, tmp_path: Path) -> Cascade:
    """Starts a server with the small guard, whose second is at a target."""

    async def run(target: str, policy: str = ERROR, **knobs: Any) -> Running:
        address = f"unix:{tmp_path / 'front'}"
        return await run_guard(Told(SMALL), (policy,), host=address, second_guard=target, **knobs)

    return run


async def test_the_other_server_s_verdict_is_used_whole(
    run_guard: RunGuard, cascade: Cascade
) -> None:
    back = await run_guard(Told(LARGE, sees_images=True), (ERROR,))
    front = await cascade(back.server.address)
    for request in (
        asked(UP, policy="tiered"),
        asked(message("hi"), message(UP, "assistant"), policy="tiered", language="de"),
        asked(with_picture(says(0.1, 0.9, large_code="S7")), policy="tiered"),
    ):
        found = (await front.stub.Classify(request)).verdict
        request.as_second = True
        request.no_cache = True
        own = (await back.stub.Classify(request)).verdict
        assert found.model.tier == "second" and found.model.name == LARGE
        assert found.verdict_id != own.verdict_id
        for verdict in (found, own):
            for field in ("timing", "verdict_id", "from_cache"):
                verdict.ClearField(field)
            verdict.model.ClearField("tier")
            verdict.model.ClearField("tier_reason")
        assert str(found).splitlines() == str(own).splitlines()
        assert own.action == verdict_pb2.ACTION_BLOCK
    info = await front.stub.GetInfo(guard_pb2.GetInfoRequest())
    assert [(one.model.name, one.model.tier) for one in info.models] == [
        (SMALL, "first"),
        (LARGE, "second"),
    ]


def by_address(data: bytes) -> guard_pb2.ClassifyRequest:
    """An image in a data: URI, which is read as one that is fetched."""
    request = asked(UP, policy="tiered", return_images=True)
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    request.conversation.messages[0].parts.add(image=guard_pb2.Image(uri=uri))
    return request


async def test_the_bytes_that_the_other_server_judged_come_back(
    run_guard: RunGuard, cascade: Cascade
) -> None:
    back = await run_guard(Told(LARGE, sees_images=True), (ERROR,))
    front = await cascade(back.server.address)
    reply = await front.stub.Classify(by_address(drawn()))
    assert reply.verdict.model.tier_reason == "IMAGE"
    assert [(one.message_index, one.part_index) for one in reply.images] == [(0, 1)]
    assert (reply.images[0].data, reply.images[0].mime_type) == (drawn(), "image/png")


@pytest.mark.parametrize("kept", [True, False])
async def test_bytes_that_are_not_those_judged_are_no_answer(
    run_guard: RunGuard, cascade: Cascade, tmp_path: Path, kept: bool
) -> None:
    back = await run_guard(Told(LARGE, sees_images=True), (ERROR,))
    request = by_address(drawn())
    request.as_second = True
    sound = await back.stub.Classify(request)
    service = Returning()
    with serving(service, f"unix:{tmp_path / 'back'}") as target:
        front = await cascade(target)
        service.reply = sound
        assert (await front.stub.Classify(by_address(drawn()))).images == sound.images
        if kept:
            sound.images[0].data = drawn(RED)
        else:
            del sound.images[:]
        refusal = await refused(front.stub.Classify(by_address(drawn())))
    assert refusal.reason == "SECOND_UNABLE" and "(ENGINE_FAILED)" in refusal.message


class Returning(FakeService):
    """Answers with a whole reply."""

    reply: guard_pb2.ClassifyResponse

    def Classify(
        self, request: guard_pb2.ClassifyRequest, context: grpc.ServicerContext
    ) -> guard_pb2.ClassifyResponse:
        return self.reply


async def test_guards_that_are_each_other_s_second_do_not_ask_on_and_on(
    run_guard: RunGuard, cascade: Cascade, tmp_path: Path
) -> None:
    large = Told(LARGE)
    back = await run_guard(large, (ERROR,), second_guard=f"unix:{tmp_path / 'front'}")
    front = await cascade(back.server.address)
    unsure = says(0.3, 0.4)
    for guard, decides in ((front, LARGE), (back, SMALL)):
        verdict = (await guard.stub.Classify(asked(unsure, policy="tiered"))).verdict
        assert (verdict.model.name, verdict.model.tier) == (decides, "second")
    assert large.saw(unsure) == 1  # the other time from its cache


async def test_a_policy_that_is_another_one_there_counts_as_no_answer(
    run_guard: RunGuard, cascade: Cascade
) -> None:
    back = await run_guard(Told(LARGE), (ERROR + "threshold: 0.6\n",))
    front = await cascade(back.server.address)
    refusal = await refused(front.stub.Classify(asked(UP, policy="tiered")))
    assert refusal.reason == "SECOND_UNABLE" and "give both the same file" in refusal.message


async def test_a_server_that_is_away_is_a_second_that_cannot(
    cascade: Cascade, tmp_path: Path
) -> None:
    front = await cascade(f"unix:{tmp_path / 'nobody'}")
    refusal = await refused(front.stub.Classify(asked(UP, policy="tiered")))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INTERNAL, "SECOND_UNABLE")
    assert "NOT_READY" in refusal.message
    assert refusal.metadata["on_unavailable"] == "block"
    info = await front.stub.GetInfo(guard_pb2.GetInfoRequest())
    assert [one.model.name for one in info.models] == [SMALL]


async def test_what_the_other_server_finds_too_long_is_refused_whatever_the_policy(
    run_guard: RunGuard, cascade: Cascade
) -> None:
    back = await run_guard(Told(LARGE), (FIRST,), max_conversation_tokens=64)
    front = await cascade(back.server.address, FIRST)
    long = UP + " and so on" * 20
    refusal = await refused(front.stub.Classify(asked(long, policy="tiered")))
    assert (refusal.code, refusal.reason) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "CONVERSATION_TOO_LONG",
    )


Code = grpc.StatusCode


@pytest.mark.parametrize(
    ("answer", "code", "reason"),
    [
        (Refusal(Code.UNAVAILABLE, "SHUTTING_DOWN"), Code.INTERNAL, "NOT_READY"),
        (Refusal(Code.RESOURCE_EXHAUSTED, "OVERLOADED"), Code.RESOURCE_EXHAUSTED, "OVERLOADED"),
        (Refusal(Code.RESOURCE_EXHAUSTED), Code.INVALID_ARGUMENT, "CONVERSATION_TOO_LONG"),
        (Refusal(Code.DEADLINE_EXCEEDED), Code.INTERNAL, "DEADLINE_EXCEEDED"),
        (Refusal(Code.FAILED_PRECONDITION, "UNSCANNABLE"), Code.FAILED_PRECONDITION, "UNSCANNABLE"),
        (Refusal(Code.NOT_FOUND), Code.INTERNAL, "POLICY_NOT_SUPPORTED"),
        (Refusal(Code.UNAUTHENTICATED), Code.INTERNAL, "POLICY_NOT_SUPPORTED"),
        (Refusal(Code.INVALID_ARGUMENT), Code.INVALID_ARGUMENT, "INVALID_CONVERSATION"),
        (Refusal(Code.INTERNAL, "ENGINE_FAILED"), Code.INTERNAL, "ENGINE_FAILED"),
        (Refusal(Code.UNKNOWN), Code.INTERNAL, "ENGINE_FAILED"),
    ],
    ids=lambda one: f"{one.code.name} {one.reason}" if isinstance(one, Refusal) else "",
)
async def test_every_failure_there_is_one_of_ours_in_our_words(
    cascade: Cascade, tmp_path: Path, answer: Refusal, code: grpc.StatusCode, reason: str
) -> None:
    answer.details = "words of the other server"
    with serving(FakeService(answer=lambda request: answer), f"unix:{tmp_path / 'back'}") as target:
        front = await cascade(target)
        refusal = await refused(front.stub.Classify(asked(UP, policy="tiered")))
    assert refusal.code is code
    if code is Code.INTERNAL:
        assert refusal.reason == "SECOND_UNABLE" and f"({reason})" in refusal.message
    else:
        assert refusal.reason == reason
    assert "second guard" in refusal.message and "words" not in refusal.message


async def test_the_other_server_s_pause_is_passed_on(cascade: Cascade, tmp_path: Path) -> None:
    full = Refusal(Code.RESOURCE_EXHAUSTED, "OVERLOADED", retry_after_s=0.25)
    with serving(FakeService(answer=lambda request: full), f"unix:{tmp_path / 'back'}") as target:
        front = await cascade(target)
        refusal = await refused(front.stub.Classify(asked(UP, policy="tiered")))
    assert refusal.retry_s == 0.25


def _no_category(verdict: verdict_pb2.Verdict) -> None:
    del verdict.categories[3]


def _strange_category(verdict: verdict_pb2.Verdict) -> None:
    verdict.categories[3].code = "S44"


def _no_part(verdict: verdict_pb2.Verdict) -> None:
    del verdict.coverage.parts[0]


CHANGES: dict[str, Callable[[verdict_pb2.Verdict], Any]] = {
    "milder action": lambda v: setattr(v, "action", verdict_pb2.ACTION_ALLOW),
    "no action": lambda v: setattr(v, "action", 0),
    "shadow action": lambda v: setattr(v, "shadow_action", verdict_pb2.ACTION_BLOCK),
    "score is NaN": lambda v: setattr(v, "unsafe_score", math.nan),
    "score above 1": lambda v: setattr(v, "unsafe_score", 1.5),
    "category below 0": lambda v: setattr(v.categories[2], "score", -0.1),
    "scores of another action": lambda v: setattr(v.categories[0], "score", 0.1),
    "a category less": _no_category,
    "another category": _strange_category,
    "direction": lambda v: setattr(v, "direction", verdict_pb2.DIRECTION_RESPONSE),
    "a part less": _no_part,
    "a part more": lambda v: v.coverage.parts.add(),
    "kind of a part": lambda v: setattr(
        v.coverage.parts[0], "kind", verdict_pb2.PART_KIND_TOOL_CALL
    ),
    "no kind": lambda v: setattr(v.coverage.parts[0], "kind", 0),
    "a part that was not judged": lambda v: setattr(
        v.coverage.parts[0], "state", verdict_pb2.PART_STATE_NOT_JUDGED
    ),
    "a name without end": lambda v: setattr(v.model, "name", "x" * 1000),
    "window above 1": lambda v: setattr(v.coverage.windows[0], "unsafe_score", 2.0),
}


@pytest.mark.parametrize("change", CHANGES)
async def test_a_verdict_that_does_not_add_up_is_no_answer(
    run_guard: RunGuard, cascade: Cascade, tmp_path: Path, change: str
) -> None:
    back = await run_guard(Told(LARGE), (ERROR,))
    sound = (await back.stub.Classify(asked(UP, policy="tiered", as_second=True))).verdict
    broken = verdict_pb2.Verdict.FromString(sound.SerializeToString())
    CHANGES[change](broken)
    service = FakeService(sound, broken)
    with serving(service, f"unix:{tmp_path / 'back'}") as target:
        front = await cascade(target)
        verdict = (await front.stub.Classify(asked(UP, policy="tiered"))).verdict
        assert verdict.action == verdict_pb2.ACTION_BLOCK and verdict.model.tier == "second"
        refusal = await refused(front.stub.Classify(asked(UP, policy="tiered")))
    assert refusal.reason == "SECOND_UNABLE" and "(ENGINE_FAILED)" in refusal.message
    assert service.asked[0].as_second and service.asked[0].policy == "tiered"


async def test_times_and_counts_that_cannot_be_are_cut(
    run_guard: RunGuard, cascade: Cascade, tmp_path: Path
) -> None:
    back = await run_guard(Told(LARGE), (ERROR,))
    odd = (await back.stub.Classify(asked(UP, policy="tiered", as_second=True))).verdict
    odd.timing.computed_tokens = 2**32 - 1
    odd.timing.inference.seconds = 2**62
    odd.timing.queue.seconds = -5
    with serving(FakeService(odd), f"unix:{tmp_path / 'back'}") as target:
        front = await cascade(target)
        timing = (await front.stub.Classify(asked(UP, policy="tiered"))).verdict.timing
    assert timing.computed_tokens >= 2**31
    assert 0 <= timing.queue.ToNanoseconds() < timing.inference.ToNanoseconds()
    assert timing.inference.ToNanoseconds() < 2 * timing.total.ToNanoseconds()


async def test_an_empty_verdict_is_no_answer(cascade: Cascade, tmp_path: Path) -> None:
    service = FakeService(verdict_pb2.Verdict())
    with serving(service, f"unix:{tmp_path / 'back'}") as target:
        front = await cascade(target)
        refusal = await refused(front.stub.Classify(asked(UP, policy="tiered")))
    assert refusal.reason == "SECOND_UNABLE" and "(POLICY_NOT_SUPPORTED)" in refusal.message


def test_a_conversation_is_sent_as_it_came() -> None:
    conversation = Conversation(
        (
            Message(Role.SYSTEM, (Text("be kind"),)),
            Message(Role.USER, (Text("look"), Image(data=b"x", mime_type="image/png"))),
            Message(Role.USER, (Image(uri="https://example.org/a.png"),)),
            Message(Role.ASSISTANT, (ToolCall("f", "{}", "1"),)),
            Message(Role.TOOL, (ToolResult("42", "1"),)),
        )
    )
    assert conversation_of(message_of(conversation), Sizes(10, 10)) == conversation


async def test_with_a_ca_the_channel_is_tls_and_only_that_ca_will_do(
    run_guard: RunGuard, cascade: Cascade, tmp_path: Path
) -> None:
    cert, other = certificate(tmp_path, "back"), certificate(tmp_path, "other")
    back = await run_guard(
        Told(LARGE),
        (ERROR,),
        host="127.0.0.1",
        port=0,
        tls_cert=cert,
        tls_key=cert.with_suffix(".key"),
    )
    target = f"localhost:{back.server.address.rpartition(':')[2]}"
    front = await cascade(target, second_guard_ca=cert)
    verdict = (await front.stub.Classify(asked(UP, policy="tiered"))).verdict
    assert verdict.model.tier == "second"
    await front.server.stop(0.0)
    stranger = await cascade(target, second_guard_ca=other)
    refusal = await refused(stranger.stub.Classify(asked(UP, policy="tiered")))
    assert refusal.reason == "SECOND_UNABLE" and "(NOT_READY)" in refusal.message


def certificate(folder: Path, name: str) -> Path:
    """A self-signed certificate for localhost, its key beside it."""
    cert = folder / f"{name}.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost"]
    command += ["-keyout", str(cert.with_suffix(".key")), "-out", str(cert)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("needs openssl to make a certificate")
    return cert


async def test_a_certificate_of_our_own_is_shown_where_it_is_asked_for(
    run_guard: RunGuard, cascade: Cascade, tmp_path: Path
) -> None:
    ours, theirs = Authority("ours"), Authority("theirs")
    ca = tmp_path / "ca.pem"
    ca.write_bytes(ours.root)
    cert, key = tmp_path / "back.pem", tmp_path / "back.key"
    ours.issue("localhost").write(cert, key)
    back = await run_guard(
        Told(LARGE),
        (ERROR,),
        host="127.0.0.1",
        port=0,
        tls_cert=cert,
        tls_key=key,
        tls_client_ca=ca,
    )
    target = f"localhost:{back.server.address.rpartition(':')[2]}"
    for authority, answers in ((ours, True), (theirs, False), (None, False)):
        shown: dict[str, Path] = {}
        if authority is not None:
            shown["second_guard_cert"] = tmp_path / f"{authority.name}.pem"
            shown["second_guard_key"] = tmp_path / f"{authority.name}.key"
            authority.issue("front").write(*shown.values())
        front = await cascade(target, second_guard_ca=ca, **shown)
        asking = front.stub.Classify(asked(UP, policy="tiered"))
        if answers:
            assert (await asking).verdict.model.tier == "second"
        else:
            assert (await refused(asking)).reason == "SECOND_UNABLE"
        await front.server.stop(0.0)
