"""The blocking client against a guard on a real socket."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from guard_api.v1 import guard_pb2, verdict_pb2
from guard_middleware import (
    TLS,
    Action,
    BadReply,
    CouldNotJudge,
    DeadlineExceeded,
    Direction,
    EngineFailed,
    GuardClient,
    GuardError,
    InvalidRequest,
    Item,
    NotPermitted,
    NotSupported,
    Overloaded,
    Piece,
    Retries,
    Terms,
    Unavailable,
    Unjudged,
    UnknownPolicy,
    Verdict,
)
from guard_middleware.fallback import OnUnavailable
from tests.middleware.fake_service import FakeService, Refusal, serving, socket_in, verdict

ONCE = Retries(attempts=1)
GONE = Refusal(grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
FULL = Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", retry_after_s=0.25)


def test_verdict_arrives_whole(service: FakeService, target: str) -> None:
    service.script = [verdict(verdict_pb2.ACTION_BLOCK, 0.9)]
    with GuardClient(target) as guard:
        found = guard.classify("hello", policy="strict", language="de", no_cache=True)
    assert isinstance(found, Verdict)
    assert found.judged and found.blocked and not found.allowed
    assert found.unsafe_score == pytest.approx(0.9)
    assert found.direction is Direction.PROMPT
    assert [category.code for category in found.fired] == ["S10"]
    assert found.scores == pytest.approx({"S1": 0.225, "S10": 0.675})
    assert found.timing.total_s == pytest.approx(0.005)
    assert found.coverage.complete and not found.coverage.not_judged
    assert found.shadow_action is None
    asked = service.asked[0]
    assert (asked.policy, asked.language, asked.no_cache) == ("strict", "de", True)


def test_every_call_has_a_deadline(service: FakeService, target: str) -> None:
    with GuardClient(target) as guard:
        guard.classify("a")
        guard.classify("a", timeout_s=2.0)
    assert 5 < service.deadlines_s[0] < 10.5
    assert 0 < service.deadlines_s[1] < 2.5


def test_overload_is_tried_again_after_the_servers_delay(service: FakeService, target: str) -> None:
    service.script = [FULL, GONE]
    pauses: list[float] = []
    with GuardClient(target, Terms(draw=lambda: 0.5), sleep=pauses.append) as guard:
        assert guard.classify("a").allowed
    assert pauses == pytest.approx([0.30, 0.10])
    assert len(service.asked) == 3


def test_bad_requests_are_not_tried_again(service: FakeService, target: str) -> None:
    service.script = [Refusal(grpc.StatusCode.INVALID_ARGUMENT, "CONVERSATION_TOO_LONG")]
    with GuardClient(target) as guard, pytest.raises(InvalidRequest) as told:
        guard.classify("a")
    assert told.value.reason == "CONVERSATION_TOO_LONG"
    assert len(service.asked) == 1


def test_error_carries_what_the_details_say(service: FakeService, target: str) -> None:
    service.script = [
        Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", {"request_id": "r7"}, 1.5)
    ]
    with GuardClient(target, Terms(retries=ONCE)) as guard, pytest.raises(Overloaded) as told:
        guard.classify("a")
    assert (told.value.retry_after_s, told.value.request_id) == (1.5, "r7")
    assert str(told.value) == "OVERLOADED: refused (request r7)"


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, Unavailable),
        (grpc.StatusCode.CANCELLED, Unavailable),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, Overloaded),
        (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineExceeded),
        (grpc.StatusCode.INTERNAL, EngineFailed),
        (grpc.StatusCode.UNKNOWN, EngineFailed),
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidRequest),
        (grpc.StatusCode.NOT_FOUND, UnknownPolicy),
        (grpc.StatusCode.FAILED_PRECONDITION, NotSupported),
        (grpc.StatusCode.UNAUTHENTICATED, NotPermitted),
        (grpc.StatusCode.PERMISSION_DENIED, NotPermitted),
    ],
)
def test_status_without_details_still_has_a_type_and_a_reason(
    service: FakeService, target: str, code: grpc.StatusCode, kind: type[GuardError]
) -> None:
    service.script = [Refusal(code)]
    with GuardClient(target, Terms(retries=ONCE)) as guard, pytest.raises(GuardError) as told:
        guard.classify("a")
    assert type(told.value) is kind
    assert told.value.reason == code.name


def test_a_message_over_the_limit_does_not_pass_for_an_overload(tmp_path: Path) -> None:
    with (
        serving(FakeService(), socket_in(tmp_path)) as target,
        GuardClient(target, Terms(on_unavailable="allow")) as guard,
        pytest.raises(InvalidRequest) as told,
    ):
        guard.classify("x" * (5 * 2**20))
    assert told.value.reason == "MESSAGE_TOO_LARGE"


def test_nobody_listening_is_unavailable(tmp_path: Path) -> None:
    with (
        GuardClient(socket_in(tmp_path), Terms(retries=ONCE)) as guard,
        pytest.raises(Unavailable) as told,
    ):
        guard.classify("a")
    assert told.value.reason == "UNAVAILABLE"


@pytest.mark.parametrize("choice", ["block", "flag", "allow"])
def test_fallback_is_what_was_declared_and_does_not_look_like_a_verdict(
    service: FakeService, target: str, choice: OnUnavailable
) -> None:
    service.script = [GONE]
    with GuardClient(target, Terms(retries=ONCE, on_unavailable=choice)) as guard:
        found = guard.classify("a")
    assert isinstance(found, Unjudged)
    assert not found.judged
    assert found.action is Action(choice)
    assert found.reason == "SHUTTING_DOWN"
    assert not hasattr(found, "unsafe_score")


@pytest.mark.parametrize(
    "code",
    [
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.UNAUTHENTICATED,
    ],
)
def test_no_fallback_lets_pass_what_the_caller_got_wrong(
    service: FakeService, target: str, code: grpc.StatusCode
) -> None:
    service.script = [Refusal(code)]
    with (
        GuardClient(target, Terms(on_unavailable="allow")) as guard,
        pytest.raises(GuardError) as told,
    ):
        guard.classify("a")
    assert not isinstance(told.value, CouldNotJudge)


def test_policys_own_fallback_is_learnt_beforehand(service: FakeService, target: str) -> None:
    reply = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with GuardClient(target, Terms(retries=ONCE, on_unavailable="policy")) as guard:
        service.script = [GONE, GONE, GONE]
        assert guard.classify("a").action is Action.FLAG
        assert guard.classify(reply).action is Action.BLOCK
        assert guard.classify("a", policy="never heard of").action is Action.BLOCK


def test_policys_own_fallback_in_the_error_goes_first(service: FakeService, target: str) -> None:
    service.script = [
        Refusal(grpc.StatusCode.UNAVAILABLE, "NOT_READY", {"on_unavailable": "ALLOW"}),
        Refusal(grpc.StatusCode.UNAVAILABLE, "NOT_READY", {"on_unavailable": "gibberish"}),
    ]
    with GuardClient(target, Terms(retries=ONCE, on_unavailable="policy")) as guard:
        assert guard.classify("a").action is Action.ALLOW
        assert guard.classify("a").action is Action.FLAG


def test_policys_fallback_that_nobody_told_is_block(tmp_path: Path) -> None:
    with GuardClient(socket_in(tmp_path), Terms(retries=ONCE, on_unavailable="policy")) as guard:
        assert guard.classify("a").action is Action.BLOCK


def test_unknown_fallback_is_refused_at_once() -> None:
    wrong: Any = "open"
    with pytest.raises(ValueError, match="on_unavailable"):
        GuardClient("localhost:1", Terms(on_unavailable=wrong))


@pytest.mark.parametrize(
    "broken",
    [
        {"action": verdict_pb2.ACTION_UNSPECIFIED},
        {"direction": verdict_pb2.DIRECTION_UNSPECIFIED},
        {"unsafe_score": float("nan")},
        {"unsafe_score": 1.5},
    ],
)
def test_reply_that_breaks_the_contract_is_no_verdict(
    service: FakeService, target: str, broken: dict[str, Any]
) -> None:
    answer = verdict()
    for name, value in broken.items():
        setattr(answer, name, value)
    service.script = [answer]
    with GuardClient(target) as guard, pytest.raises(BadReply):
        guard.classify("a")


def test_batch_answers_item_by_item_in_order(service: FakeService, target: str) -> None:
    service.script = [
        verdict(),
        Refusal(grpc.StatusCode.INVALID_ARGUMENT, details="too long"),
        Refusal(grpc.StatusCode.INTERNAL),
        verdict(verdict_pb2.ACTION_BLOCK, 0.99),
    ]
    with GuardClient(target, Terms(on_unavailable="flag")) as guard:
        first, second, third, fourth = guard.classify_batch(["a", Item("b", "strict"), "c", "d"])
    assert isinstance(first, Verdict) and first.allowed
    assert isinstance(second, InvalidRequest) and not second.judged
    assert isinstance(third, Unjudged) and third.action is Action.FLAG
    assert isinstance(fourth, Verdict) and fourth.blocked


def test_items_that_failed_for_the_moment_are_asked_again_and_they_alone(
    service: FakeService, target: str
) -> None:
    full, gone = grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE
    service.script = [
        *(verdict(score=0.1), Refusal(full), Refusal(grpc.StatusCode.INTERNAL), Refusal(gone)),
        *(Refusal(gone), verdict(score=0.4)),
        verdict(score=0.2),
    ]
    pauses: list[float] = []
    with GuardClient(target, Terms(draw=lambda: 0.5), sleep=pauses.append) as guard:
        first, second, third, fourth = guard.classify_batch(["a", "b", "c", "d"])
    assert service.batches == [["a", "b", "c", "d"], ["b", "d"], ["b"]]
    assert pauses == [0.05, 0.1]
    assert [getattr(one, "unsafe_score", None) for one in (first, second, fourth)] == [
        pytest.approx(score) for score in (0.1, 0.2, 0.4)
    ]
    assert isinstance(third, EngineFailed)


@pytest.mark.parametrize("whole", [False, True])
def test_what_a_batch_answered_stays_when_asking_again_fails(
    service: FakeService, target: str, whole: bool
) -> None:
    service.script = [verdict(), *[Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED)] * 9]
    service.batches_refused = [None, Refusal(grpc.StatusCode.INTERNAL)] if whole else []
    terms = Terms(retries=Retries(attempts=3), draw=lambda: 0.0)
    with GuardClient(target, terms) as guard:
        first, second = guard.classify_batch(["a", "b"])
    assert isinstance(first, Verdict) and isinstance(second, Overloaded)
    assert len(service.batches) == (2 if whole else 3)


def test_batch_names_the_item_that_is_no_conversation(target: str) -> None:
    with GuardClient(target) as guard, pytest.raises(ValueError, match=r"items\[1\]: .*no mess"):
        guard.classify_batch(["a", []])


def test_stream_yields_verdicts_as_asked_and_a_final_one(service: FakeService, target: str) -> None:
    pieces: list[Piece | str] = [Piece("ab", check=True), "cd"]
    with GuardClient(target) as guard:
        found = list(guard.classify_stream("hi", pieces))
    assert [(one.covered_chars, one.final) for one in found] == [(2, False), (4, True)]


def test_broken_stream_ends_with_what_was_declared(service: FakeService, target: str) -> None:
    service.script = [verdict(), GONE]
    with GuardClient(target, Terms(on_unavailable="block")) as guard:
        *_, last = guard.classify_stream("hi", [Piece("ab", check=True), "cd"])
    assert (last.covered_chars, last.final, last.outcome.judged) == (2, True, False)
    assert last.outcome.blocked


def test_broken_stream_raises_by_default(service: FakeService, target: str) -> None:
    service.script = [GONE]
    with GuardClient(target) as guard, pytest.raises(Unavailable):
        list(guard.classify_stream("hi", ["ab"]))


class Silent(FakeService):
    """Ends every stream without a verdict on the whole reply."""

    def ClassifyStream(self, request_iterator: Any, context: Any) -> Iterator[Any]:
        yield guard_pb2.ClassifyStreamResponse(verdict=verdict(), covered_chars=0)


def test_stream_without_final_verdict_is_no_success(tmp_path: Path) -> None:
    with (
        serving(Silent(), socket_in(tmp_path)) as target,
        GuardClient(target) as guard,
        pytest.raises(BadReply, match="ended before"),
    ):
        list(guard.classify_stream("hi", ["ab"]))


def test_info_policies_and_health_are_told(target: str) -> None:
    with GuardClient(target) as guard:
        info, policies = guard.info(), guard.list_policies()
        assert guard.health()
    assert info.version == "9.9.9"
    assert info.models[0].notice == "This is a starter guard."
    assert info.limits.default_deadline_s == 10
    assert policies.default_policy == "default"
    assert policies.policies[0].on_unavailable_prompt is Action.FLAG


def test_metadata_goes_with_every_call(service: FakeService, target: str) -> None:
    with GuardClient(target, Terms(metadata=(("authorization", "Bearer t"),))) as guard:
        guard.classify("a")
    assert service.metadata[0]["authorization"] == "Bearer t"


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """A self-signed certificate for localhost and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    command = ["openssl", "req", "-x509", *curve, "-nodes", "-days", "2", *subject]
    subprocess.run([*command, "-keyout", key, "-out", cert], check=True, capture_output=True)
    return cert, key


def test_tls_with_client_certificates(service: FakeService, tmp_path: Path) -> None:
    cert, key = certificate(tmp_path, "server")
    own_cert, own_key = certificate(tmp_path, "client")
    credentials = grpc.ssl_server_credentials(
        [(key.read_bytes(), cert.read_bytes())], own_cert.read_bytes(), require_client_auth=True
    )
    with serving(service, "localhost:0", credentials=credentials) as target:
        tls = TLS(roots=cert, certificate=own_cert, key=own_key)
        with GuardClient(target, Terms(tls=tls)) as guard:
            assert guard.classify("a").judged
        stranger = Terms(tls=TLS(roots=cert), retries=ONCE)
        with GuardClient(target, stranger) as guard, pytest.raises(Unavailable):
            guard.classify("a")


def test_client_certificate_without_key_is_refused() -> None:
    with pytest.raises(ValueError, match="key"):
        TLS(certificate=b"pem")
