"""The tree of errors: the class fixes status code and reason; every text is safe to show.

GuardServiceError
├── InvalidRequest          INVALID_ARGUMENT
│   ├── ConversationTooLong
│   ├── BatchTooLarge
│   └── InvalidStream
├── UnknownPolicy           NOT_FOUND
├── Unauthenticated         UNAUTHENTICATED
│   ├── InvalidCredentials
│   └── ExpiredCredentials
├── NoTenant                PERMISSION_DENIED
├── Unscannable             FAILED_PRECONDITION
├── PolicyNotSupported      FAILED_PRECONDITION
├── Overloaded              RESOURCE_EXHAUSTED, with RetryInfo
│   └── QuotaExceeded
├── DeadlineExceeded        DEADLINE_EXCEEDED
├── ShuttingDown            UNAVAILABLE
├── NotReady                UNAVAILABLE
├── NotRecorded             UNAVAILABLE
├── NotAssessed             INTERNAL, when the engine failed
├── SecondUnable            INTERNAL
└── InternalError           INTERNAL
"""

from __future__ import annotations

from typing import ClassVar

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2

from guard_api.v1.error_reason_pb2 import ErrorReason

DOMAIN = "guard_api.v1"


class GuardServiceError(Exception):
    """Why there is no verdict. Its text holds no content of the request.

    `on_unavailable` is the name of the action that the policy wants then ("block"), where known.
    """

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    reason: ClassVar[str] = "INTERNAL"
    on_unavailable: str = ""
    retry_after_s: float | None = None
    recorded: bool = False  # in the audit log

    @property
    def code_number(self) -> int:
        """The google.rpc.Code."""
        return int(self.code.value[0])

    @property
    def reason_value(self) -> ErrorReason.ValueType:
        """The reason as the contract's enum."""
        return ErrorReason.Value(f"ERROR_REASON_{self.reason}")


class InvalidRequest(GuardServiceError):
    """The request is not well-formed."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "INVALID_CONVERSATION"


class ConversationTooLong(InvalidRequest):
    """The conversation is over the limit of tokens."""

    reason = "CONVERSATION_TOO_LONG"


class BatchTooLarge(InvalidRequest):
    """More items than one batch may hold."""

    reason = "BATCH_TOO_LARGE"


class InvalidStream(InvalidRequest):
    """The steps of a stream are out of order."""

    reason = "INVALID_STREAM"


class UnknownPolicy(GuardServiceError):
    """No policy of that name is loaded."""

    code = grpc.StatusCode.NOT_FOUND
    reason = "UNKNOWN_POLICY"

    def __init__(
        self, message: str = "no policy of that name is loaded; ListPolicies lists them"
    ) -> None:
        super().__init__(message)


class Unscannable(GuardServiceError):
    """A part cannot be judged by the model and the policy says that this is an error."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "UNSCANNABLE"


class PolicyNotSupported(GuardServiceError):
    """The loaded model cannot serve the policy."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "POLICY_NOT_SUPPORTED"


class Overloaded(GuardServiceError):
    """The queue is full."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "OVERLOADED"

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QuotaExceeded(Overloaded):
    """The tenant's own quota is used up; there may be room for others."""

    reason = "QUOTA_EXCEEDED"


class Unauthenticated(GuardServiceError):
    """The call has no credentials, and needs some."""

    code = grpc.StatusCode.UNAUTHENTICATED
    reason = "UNAUTHENTICATED"

    def __init__(
        self, message: str = "send a bearer token in `authorization`, or a client certificate"
    ) -> None:
        super().__init__(message)


class InvalidCredentials(Unauthenticated):
    """The call's credentials do not count. What is wrong with them is not told."""

    reason = "INVALID_CREDENTIALS"

    def __init__(self) -> None:
        super().__init__("the credentials are not valid here")


class ExpiredCredentials(Unauthenticated):
    """They were good once: whoever sends them can fetch new ones."""

    reason = "EXPIRED_CREDENTIALS"

    def __init__(self) -> None:
        super().__init__("the credentials have expired; fetch new ones")


class NoTenant(GuardServiceError):
    """It is known who calls, and that nobody who is served here is meant by it."""

    code = grpc.StatusCode.PERMISSION_DENIED
    reason = "NO_TENANT"

    def __init__(self) -> None:
        super().__init__("whoever these credentials are for is not served here")


class DeadlineExceeded(GuardServiceError):
    """The deadline passed before there was a verdict."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED
    reason = "DEADLINE_EXCEEDED"


class ShuttingDown(GuardServiceError):
    """The server drains."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "SHUTTING_DOWN"

    def __init__(self, message: str = "the server is shutting down; try another replica") -> None:
        super().__init__(message)


class NotReady(GuardServiceError):
    """The model is still being checked, or its worker does not answer."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "NOT_READY"


class NotRecorded(GuardServiceError):
    """The audit log cannot be written, and without it no answer is given."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "NOT_RECORDED"


class NotAssessed(GuardServiceError):
    """The engine failed on this work."""

    reason = "ENGINE_FAILED"


class SecondUnable(GuardServiceError):
    """The second guard of a cascade was to decide and could not.

    Never UNAVAILABLE or DEADLINE_EXCEEDED: callers would take this server for one that is away.
    """

    reason = "SECOND_UNABLE"


class InternalError(GuardServiceError):
    """A defect of the service; only its logs tell more."""


def status_of(error: GuardServiceError, request_id: str) -> status_pb2.Status:
    """The google.rpc.Status of an error, with ErrorInfo and, where it helps, RetryInfo."""
    metadata = {"request_id": request_id}
    if error.on_unavailable:
        metadata["on_unavailable"] = error.on_unavailable
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata)
    details = [_packed(info)]
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        details.append(_packed(error_details_pb2.RetryInfo(retry_delay=delay)))
    number = code_pb2.Code.Value(error.code.name)
    return status_pb2.Status(code=number, message=str(error), details=details)


def _packed(message: error_details_pb2.ErrorInfo | error_details_pb2.RetryInfo) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed
