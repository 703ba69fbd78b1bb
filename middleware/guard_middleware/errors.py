"""The errors of the clients, and how a gRPC status becomes one of them."""

# GuardError                    there is no verdict
# ├── CouldNotJudge             the guard's side; `on_unavailable` says what follows
# │   ├── Unavailable           not reachable, draining, not ready           (retried)
# │   ├── Overloaded            its queue is full                            (retried)
# │   ├── DeadlineExceeded      no verdict in time
# │   ├── EngineFailed          it failed on this request
# │   └── BadReply              it answered what the contract forbids
# ├── InvalidRequest            the caller's side: malformed, too long, too large
# ├── UnknownPolicy             no policy of that name
# ├── NotSupported              the loaded model cannot do what was asked for
# └── NotPermitted              no or wrong credentials

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from guard_api.v1 import error_reason_pb2, guard_pb2

DOMAIN = "guard_api.v1"
_DETAILS_KEY = "grpc-status-details-bin"


class GuardError(Exception):
    """There is no verdict. The text is safe to show: it holds no content of the request.

    `reason` is an ErrorReason without its prefix ("OVERLOADED"), or the status code's name where
    the other side gave no reason. `retry_after_s` is what the server asked for, if it did.
    """

    judged: Literal[False] = False

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode = grpc.StatusCode.UNKNOWN,
        reason: str = "",
        retry_after_s: float | None = None,
        request_id: str = "",
        on_unavailable: str = "",
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason or code.name
        self.retry_after_s = retry_after_s
        self.request_id = request_id
        self.on_unavailable = on_unavailable

    def __str__(self) -> str:
        text = f"{self.reason}: {self.args[0]}"
        return f"{text} (request {self.request_id})" if self.request_id else text


class CouldNotJudge(GuardError):
    """The guard could not judge; never to be taken for an answer of "safe"."""


class Unavailable(CouldNotJudge):
    """The guard is not reachable, drains, or is not ready yet."""


class Overloaded(CouldNotJudge):
    """The guard's queue is full; `retry_after_s` says when to try again."""


class DeadlineExceeded(CouldNotJudge):
    """There was no verdict in time."""


class EngineFailed(CouldNotJudge):
    """The guard failed on this request."""


class BadReply(CouldNotJudge):
    """The guard answered what the contract forbids, for example a verdict without action."""


class InvalidRequest(GuardError, ValueError):
    """The request is malformed, too long or too large; sending it again does not help."""


class UnknownPolicy(GuardError, LookupError):
    """No policy of that name is loaded."""


class NotSupported(GuardError):
    """The loaded model cannot do what was asked for, for example judge an image."""


class NotPermitted(GuardError):
    """The server wants other credentials."""


_BY_CODE: Mapping[grpc.StatusCode, type[GuardError]] = {
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    # The caller's own cancellation never comes this way: a server that stops cancels what is late.
    grpc.StatusCode.CANCELLED: Unavailable,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: UnknownPolicy,
    grpc.StatusCode.FAILED_PRECONDITION: NotSupported,
    grpc.StatusCode.UNIMPLEMENTED: NotSupported,
    grpc.StatusCode.UNAUTHENTICATED: NotPermitted,
    grpc.StatusCode.PERMISSION_DENIED: NotPermitted,
}
_CODE_BY_NUMBER = {code.value[0]: code for code in grpc.StatusCode}


class RpcStatus(Protocol):
    """What a failed call tells, in both flavours of gRPC."""

    def code(self) -> grpc.StatusCode: ...
    def details(self) -> str | None: ...
    def trailing_metadata(self) -> Any: ...


def from_rpc(failed: RpcStatus) -> GuardError:
    """The typed error of a failed call, with what its google.rpc details say."""
    code = failed.code()
    message = failed.details() or code.name
    details = _details(failed.trailing_metadata() or ())
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "message larger than max" in message:
        # gRPC itself refuses large messages with the code of an overload. A caller's content must
        # not be able to pass for one: neither retries nor `on_unavailable` apply.
        return InvalidRequest(message, code=code, reason="MESSAGE_TOO_LARGE", **details)
    return _BY_CODE.get(code, EngineFailed)(message, code=code, **details)


def from_item(item: guard_pb2.ItemError) -> GuardError:
    """The typed error of one item of a batch."""
    code = _CODE_BY_NUMBER.get(item.code, grpc.StatusCode.UNKNOWN)
    reason = ""
    if item.reason in error_reason_pb2.ErrorReason.values():
        reason = error_reason_pb2.ErrorReason.Name(item.reason).removeprefix("ERROR_REASON_")
    reason = "" if reason == "UNSPECIFIED" else reason
    return _BY_CODE.get(code, EngineFailed)(item.message or code.name, code=code, reason=reason)


def _details(trailers: Sequence[tuple[str, str | bytes]]) -> dict[str, Any]:
    """Keyword arguments of GuardError from a status's details; malformed ones count as absent."""
    raw = next((value for key, value in trailers if key == _DETAILS_KEY), None)
    found: dict[str, Any] = {}
    if not isinstance(raw, bytes):
        return found
    try:
        for detail in status_pb2.Status.FromString(raw).details:
            info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
            if detail.Unpack(info) and info.domain == DOMAIN:
                found["reason"] = info.reason
                found["request_id"] = info.metadata.get("request_id", "")
                found["on_unavailable"] = info.metadata.get("on_unavailable", "")
            elif detail.Unpack(retry):
                found["retry_after_s"] = max(0.0, retry.retry_delay.ToTimedelta().total_seconds())
    except (DecodeError, OverflowError, ValueError):
        pass
    return found
