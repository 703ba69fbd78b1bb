"""What a guard's policy declares holds in the middleware wherever its settings leave it to it."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc
import pytest

from guard_api.v1 import guard_pb2, verdict_pb2
from guard_middleware import Terms
from guard_middleware.calls import Piece
from guard_middleware.context import in_force
from guard_middleware.fallback import LEARN_AGAIN_S, Fallback
from guard_middleware.guards import Conversation, RemoteGuard
from guard_middleware.service_info import PolicySummary, read_policies
from guard_middleware.settings import Settings
from guard_middleware.testing import FakeGuard
from guard_middleware.verdict import PolicyRef, StreamOutcome
from guard_policies.assessment import Action
from guard_policies.loader import parse_policy
from guard_policies.schema import DEFAULT_REFUSAL, Stream, Unscannable
from guard_service.wire import policy_summary_of
from tests.middleware.asgi_calls import EVENTS, Backend, call, each
from tests.middleware.fake_service import FakeService, verdict
from tests.middleware.formats.openai_replies import PATH, asking, chunks, reply
from tests.middleware.wrapped import SAFE, Wrapped

POLICY = """
name: shop
version: "1"
on_unscannable: {on_unscannable}
response: {{on_unscannable: flag}}
refusal: {{default: "No.", de: "Nein.", pt-br: "Não."}}
stream:
  check_every_chars: 100
  first_check_chars: 20
  hold_back_chars: 30
  sentence_ends: {ends}
"""
AUDIO = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}


def wire(on_unscannable: str = "error", ends: str = "true") -> guard_pb2.PolicySummary:
    text = POLICY.format(on_unscannable=on_unscannable, ends=ends)
    return policy_summary_of(parse_policy(text))


def summary(of: guard_pb2.PolicySummary) -> PolicySummary:
    return read_policies(guard_pb2.ListPoliciesResponse(policies=[of])).policies[0]


class Declares(FakeGuard):
    def __init__(self, declared: PolicySummary | None) -> None:
        super().__init__()
        self.declared = declared

    async def policy(self) -> PolicySummary | None:
        return self.declared


@pytest.mark.parametrize("choice", list(Unscannable))
def test_summary_carries_what_the_policy_file_says(choice: Unscannable) -> None:
    found = summary(wire(choice.value))
    assert (found.on_unscannable_prompt, found.on_unscannable_response) == (
        choice,
        Unscannable.FLAG,
    )
    assert found.stream == Stream(100, 20, sentence_ends=True, hold_back_chars=30)
    said = {tag: found.refusal(tag) for tag in ("", "de-AT", "pt-BR", "fr")}
    assert said == {"": "No.", "de-AT": "Nein.", "pt-BR": "Não.", "fr": "No."}


def test_a_guard_that_does_not_tell_these_has_declared_nothing_that_passes() -> None:
    found = summary(guard_pb2.PolicySummary())
    assert found.on_unscannable_prompt is found.on_unscannable_response is Unscannable.BLOCK
    assert (found.refusal("de"), found.stream) == ("", Stream())
    newer = guard_pb2.PolicySummary(on_unscannable_prompt=99)  # type: ignore[arg-type]
    assert summary(newer).on_unscannable_prompt is Unscannable.BLOCK


@pytest.mark.parametrize(
    ("given", "declared", "refusal", "unscannable", "piece_chars"),
    [
        ({}, "error", "No.", "block", 100),
        ({}, "block", "No.", "block", 100),
        ({}, "flag", "No.", "pass", 100),
        ({"language": "de-CH"}, "allow", "Nein.", "pass", 100),
        ({}, None, DEFAULT_REFUSAL, "block", 200),
        ({"refusal": "Mine.", "unscannable": "pass"}, "block", "Mine.", "pass", 100),
        ({"unscannable": "block", "piece_chars": 7}, "allow", "No.", "block", 7),
        ({"unscannable": "pass", "piece_chars": 7}, None, DEFAULT_REFUSAL, "pass", 7),
    ],
)
async def test_settings_go_before_the_policy_and_the_policy_before_what_is_safe(
    given: dict[str, Any], declared: str | None, refusal: str, unscannable: str, piece_chars: int
) -> None:
    guard = Declares(summary(wire(declared)) if declared else None)
    found = await in_force(Settings(**given), guard)
    assert (found.refusal, found.unscannable, found.piece_chars) == (
        refusal,
        unscannable,
        piece_chars,
    )


@pytest.mark.parametrize(
    ("given", "declared", "first", "sentences", "back"),
    [
        ({}, True, 20, "on", 30),
        ({}, False, 40, "off", 0),
        (
            {"first_check_chars": 7, "sentence_pieces": "off", "hold_back_chars": 9},
            True,
            7,
            "off",
            9,
        ),
        (
            {"first_check_chars": 7, "sentence_pieces": "on", "hold_back_chars": 9},
            False,
            7,
            "on",
            9,
        ),
    ],
)
async def test_settings_of_streams_go_before_the_policys(
    given: dict[str, Any], declared: bool, first: int, sentences: str, back: int
) -> None:
    found = await in_force(Settings(**given), Declares(summary(wire()) if declared else None))
    assert (found.first_check_chars, found.sentence_pieces) == (first, sentences)
    assert found.hold_back_chars == back


class Tells(FakeService):
    """Serves one policy, as the service does, and counts who asks for it."""

    def __init__(self, *policies: guard_pb2.PolicySummary) -> None:
        super().__init__()
        self.policies = list(policies)
        self.told = 0
        self.sizes: list[int] = []

    def ListPolicies(
        self, request: guard_pb2.ListPoliciesRequest, context: grpc.ServicerContext
    ) -> guard_pb2.ListPoliciesResponse:
        self.told += 1
        return guard_pb2.ListPoliciesResponse(policies=self.policies, default_policy="shop")

    def ClassifyStream(self, request_iterator: Any, context: grpc.ServicerContext) -> Any:
        def steps() -> Any:
            for step in request_iterator:
                self.sizes.append(len(step.piece.text))
                yield step

        yield from super().ClassifyStream(steps(), context)

    def judged_by(self, of: guard_pb2.PolicySummary) -> verdict_pb2.Verdict:
        found = verdict()
        found.policy.CopyFrom(of.policy)
        return found


@asynccontextmanager
async def guarded(target: str, backend: Backend, **settings: Any) -> AsyncIterator[Wrapped]:
    guard = RemoteGuard(Settings(guard=target, **settings))
    try:
        yield Wrapped(backend, guard, **settings)
    finally:
        await guard.close()


@pytest.fixture
def service() -> Tells:
    return Tells(wire("allow"))


async def test_refusal_is_the_policys_in_the_language_that_was_set(
    service: Tells, target: str
) -> None:
    service.answer = lambda request: verdict(verdict_pb2.ACTION_BLOCK, 0.9)
    async with guarded(target, Backend([b"{}"]), language="de") as app:
        got = await call(app, PATH, asking("Hi"))
    assert got.json["choices"][0]["message"]["content"] == "Nein."


@pytest.mark.parametrize(("declared", "passes"), [("allow", True), ("error", False)])
async def test_what_no_guard_can_read_passes_where_the_policy_lets_it(
    service: Tells, target: str, declared: str, passes: bool
) -> None:
    service.policies = [wire(declared)]
    backend = Backend([json.dumps(reply("Hello.")).encode()])
    asked = {"model": "m", "messages": [{"role": "user", "content": [AUDIO]}]}
    async with guarded(target, backend) as app:
        got = await call(app, PATH, asked)
    assert len(backend.bodies) == passes
    assert (got.json["choices"][0]["finish_reason"] == "stop") is passes


async def test_a_stream_goes_to_the_guard_in_pieces_of_the_policys_cadence(
    service: Tells, target: str
) -> None:
    service.policies = [wire(ends="false")]
    async with guarded(target, Backend(each(chunks(SAFE)), EVENTS), idle_check_s=60.0) as app:
        got = await call(app, PATH, asking("Hi", stream=True))
    assert got.text() == SAFE
    first, *most, _ = [size for size in service.sizes if size]
    assert first >= 20 and most and min(most) >= 100


class Hears(Declares):
    """Keeps the pieces of streams."""

    def __init__(self, declared: PolicySummary) -> None:
        super().__init__(declared)
        self.pieces: list[Piece] = []

    def growing(
        self, conversation: Conversation, pieces: AsyncIterable[Piece]
    ) -> AsyncGenerator[StreamOutcome]:
        async def heard() -> AsyncIterator[Piece]:
            async for piece in pieces:
                self.pieces.append(piece)
                yield piece

        return super().growing(conversation, heard())


async def test_pieces_end_with_sentences_where_the_policy_judges_there() -> None:
    """The first one asks for a verdict; the guard knows itself when it makes the others."""
    guard = Hears(summary(wire()))
    backend = Backend(each(chunks(SAFE, size=1)), EVENTS)
    app = Wrapped(backend, guard, idle_check_s=60.0)
    got = await call(app, PATH, asking("Hi", stream=True))
    assert got.text() == SAFE
    first, *most = [piece for piece in guard.pieces if piece.text]
    assert (len(first.text), first.check) == (20, True)
    assert {(piece.text[-2:], piece.check) for piece in most} == {(". ", False)}
    assert len(most) > 10


async def test_a_policy_that_was_loaded_anew_is_asked_for_anew(service: Tells, target: str) -> None:
    old, new = wire("allow"), wire("error")
    seconds = [100.0]
    terms = Terms(on_unavailable="policy", clock=lambda: seconds[0])
    guard = RemoteGuard(Settings(guard=target), terms)
    try:
        app = Wrapped(Backend([json.dumps(reply("Hello.")).encode()]), guard)
        service.answer = lambda request: service.judged_by(old)
        for _ in range(2):
            await call(app, PATH, asking("Hi"))
        assert service.told == 1
        service.policies, service.answer = [new], lambda request: service.judged_by(new)
        seconds[0] += LEARN_AGAIN_S
        await call(app, PATH, asking("Hi"))
        await call(app, PATH, asking("Hi"))
        assert service.told == 2
        found = await guard.policy()
        assert found is not None and found.on_unscannable_prompt is Unscannable.ERROR
    finally:
        await guard.close()


def test_a_guard_that_does_not_tell_is_not_asked_at_every_call() -> None:
    seconds = [100.0]
    fallback = Fallback("policy", lambda: seconds[0])
    assert fallback.wants_policies
    fallback.learn(None)
    assert not fallback.wants_policies and fallback.declared("") is None
    seconds[0] += LEARN_AGAIN_S
    assert fallback.wants_policies


def test_what_was_learnt_stays_until_something_newer_is_told() -> None:
    seconds = [100.0]
    fallback = Fallback("policy", lambda: seconds[0])
    told = guard_pb2.ListPoliciesResponse(policies=[wire()], default_policy="shop")
    fallback.learn(read_policies(told))
    known = fallback.declared("")
    assert known is not None and known.on_unavailable_prompt is Action.BLOCK
    fallback.saw(known.policy)
    seconds[0] += LEARN_AGAIN_S
    assert not fallback.wants_policies
    fallback.saw(replace(known.policy, digest="sha256:22"))
    assert fallback.wants_policies and fallback.declared("shop") == known
    fallback.saw(PolicyRef("other", "1", "sha256:33"))
    assert fallback.wants_policies


async def test_a_guard_that_is_away_declares_nothing(tmp_path: Any) -> None:
    guard = RemoteGuard(Settings(guard=f"unix:{tmp_path / 'nobody'}"))
    assert await guard.policy() is None
    await guard.close()
