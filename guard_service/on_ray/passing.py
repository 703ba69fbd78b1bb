"""Calls handed on between Ray and a guard service, with their metadata and how they ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import grpc
import grpc.aio

OPTIONS = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))
# Ray's own, and what gRPC makes for each hop.
NOT_HANDED_ON = frozenset({"application", "multiplexed_model_id", "request_id", "user-agent"})

Metadata = Sequence[tuple[str, str | bytes]]
Reply = TypeVar("Reply")


class RayContext(Protocol):
    """What is used of ray.serve.grpc_util.RayServegRPCContext."""

    def invocation_metadata(self) -> Metadata: ...
    def set_code(self, code: grpc.StatusCode) -> None: ...
    def set_details(self, details: str) -> None: ...
    def set_trailing_metadata(self, trailing_metadata: list[tuple[str, str | bytes]]) -> None: ...


@dataclass(frozen=True, slots=True)
class Failed:
    """How a call ended that has no reply; can be sent between processes."""

    code: grpc.StatusCode
    details: str
    trailers: tuple[tuple[str, str | bytes], ...]


async def outcome(call: Any) -> tuple[Any, Metadata] | Failed:
    """The reply of a unary call with its trailing metadata, or how it failed."""
    try:
        reply = await call
    except grpc.aio.AioRpcError as error:
        return failed(error)
    return reply, tuple(await call.trailing_metadata())


def failed(error: grpc.aio.AioRpcError) -> Failed:
    """How a call ended, as gRPC told it."""
    trailers = tuple(error.trailing_metadata() or ())
    return Failed(error.code(), error.details() or error.code().name, trailers)


def tell(context: RayContext, how: Failed) -> None:
    """Have Ray end its call in the same way."""
    context.set_code(how.code)
    context.set_details(how.details)
    context.set_trailing_metadata(list(how.trailers))


async def answered(
    method: Callable[..., Any], request: Any, context: RayContext, nothing: Reply
) -> Reply:
    """The reply to a call that is handed on; `nothing` beside the status of one that failed.

    The failure is not raised: Ray would keep its code and text and drop its details.
    """
    found = await outcome(method(request, metadata=handed_on(context.invocation_metadata())))
    if isinstance(found, Failed):
        tell(context, found)
        return nothing
    reply: Reply = found[0]
    context.set_trailing_metadata(list(found[1]))
    return reply


async def streamed(call: Any, requests: AsyncIterator[Any], context: RayContext) -> Any:
    """The replies to a stream that is handed on.

    A failure is raised, since one more reply would be taken for a verdict: code and text reach the
    caller, details do not. Now and then the code is INTERNAL: gRPC's asyncio client loses a status
    that comes while it writes (grpc/grpc#36066).
    """
    sender = asyncio.create_task(_send(call, requests), name="guard-stream-sender")
    try:
        async for reply in call:
            yield reply
    except grpc.aio.AioRpcError as error:
        tell(context, failed(error))
        raise RuntimeError("the stream ended with an error") from None
    finally:
        call.cancel()
        sender.cancel()
        await asyncio.gather(sender, return_exceptions=True)


def handed_on(metadata: Metadata) -> tuple[tuple[str, str | bytes], ...]:
    """The caller's own metadata."""
    return tuple(
        (key, value)
        for key, value in metadata
        if key not in NOT_HANDED_ON and not key.startswith("grpc-")
    )


async def _send(call: Any, requests: AsyncIterator[Any]) -> None:
    try:
        async for request in requests:
            await call.write(request)
        await call.done_writing()
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
        return  # the call is over; who reads from it tells why
