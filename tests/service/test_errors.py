"""The tree of errors against the contract."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from google.rpc import error_details_pb2

from guard_api.v1.error_reason_pb2 import DESCRIPTOR, ErrorReason
from guard_service.errors import GuardServiceError, Overloaded, ShuttingDown, status_of


def _tree(kind: type[GuardServiceError]) -> Iterator[type[GuardServiceError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _tree(child)


def test_every_reason_of_the_contract_has_an_error_and_no_error_another() -> None:
    reasons = {f"ERROR_REASON_{kind.reason}" for kind in _tree(GuardServiceError)}
    assert reasons | {"ERROR_REASON_UNSPECIFIED"} == set(ErrorReason.keys())


@pytest.mark.parametrize("kind", list(_tree(GuardServiceError)))
def test_the_code_is_the_one_the_contract_names(kind: type[GuardServiceError]) -> None:
    proto = DESCRIPTOR.enum_types_by_name["ErrorReason"]
    assert proto.values_by_name[f"ERROR_REASON_{kind.reason}"].number > 0
    codes = {
        "INVALID_CONVERSATION": "INVALID_ARGUMENT",
        "CONVERSATION_TOO_LONG": "INVALID_ARGUMENT",
        "UNKNOWN_POLICY": "NOT_FOUND",
        "BATCH_TOO_LARGE": "INVALID_ARGUMENT",
        "OVERLOADED": "RESOURCE_EXHAUSTED",
        "UNSCANNABLE": "FAILED_PRECONDITION",
        "SHUTTING_DOWN": "UNAVAILABLE",
        "ENGINE_FAILED": "INTERNAL",
        "DEADLINE_EXCEEDED": "DEADLINE_EXCEEDED",
        "INVALID_STREAM": "INVALID_ARGUMENT",
        "POLICY_NOT_SUPPORTED": "FAILED_PRECONDITION",
        "NOT_READY": "UNAVAILABLE",
        "INTERNAL": "INTERNAL",
        "SECOND_UNABLE": "INTERNAL",
        "UNAUTHENTICATED": "UNAUTHENTICATED",
        "INVALID_CREDENTIALS": "UNAUTHENTICATED",
        "EXPIRED_CREDENTIALS": "UNAUTHENTICATED",
        "NO_TENANT": "PERMISSION_DENIED",
        "QUOTA_EXCEEDED": "RESOURCE_EXHAUSTED",
        "NOT_RECORDED": "UNAVAILABLE",
    }
    assert kind.code is grpc.StatusCode[codes[kind.reason]]


def test_a_status_carries_reason_request_id_and_what_the_policy_wants() -> None:
    error = ShuttingDown()
    error.on_unavailable = "block"
    (detail,) = status_of(error, "id-1").details
    info = error_details_pb2.ErrorInfo()
    assert detail.Unpack(info)
    assert (info.reason, info.domain) == ("SHUTTING_DOWN", "guard_api.v1")
    assert dict(info.metadata) == {"request_id": "id-1", "on_unavailable": "block"}


def test_an_overload_says_when_to_retry() -> None:
    _, detail = status_of(Overloaded("full", 1.25), "id").details
    retry = error_details_pb2.RetryInfo()
    assert detail.Unpack(retry)
    assert retry.retry_delay.ToMilliseconds() == 1250
