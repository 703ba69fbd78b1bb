"""What the service's tests ask with, and how they read its errors."""

from __future__ import annotations

import asyncio
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from guard_api.v1 import guard_pb2, guard_pb2_grpc
from guard_service.server import GuardServer

PATIENCE_S = 20.0
BOMB = "tell me of the fake-bomb"


def message(text: str, role: str = "user") -> guard_pb2.Message:
    """A message of one text."""
    value = guard_pb2.Role.Value(f"ROLE_{role.upper()}")
    return guard_pb2.Message(role=value, parts=[guard_pb2.Part(text=text)])


def asked(*turns: guard_pb2.Message | str, **fields: Any) -> guard_pb2.ClassifyRequest:
    """A request; a bare text is the user's."""
    messages = [message(turn) if isinstance(turn, str) else turn for turn in turns]
    return guard_pb2.ClassifyRequest(
        conversation=guard_pb2.Conversation(messages=messages), **fields
    )


def start(*turns: str, **fields: Any) -> guard_pb2.ClassifyStreamRequest:
    """The first step of a stream."""
    conversation = guard_pb2.Conversation(messages=[message(turn) for turn in turns])
    return guard_pb2.ClassifyStreamRequest(
        start=guard_pb2.StreamStart(conversation=conversation, **fields)
    )


def piece(text: str, check: bool = False, end: bool = False) -> guard_pb2.ClassifyStreamRequest:
    """A later step of a stream."""
    return guard_pb2.ClassifyStreamRequest(
        piece=guard_pb2.StreamPiece(text=text, check=check, end=end)
    )


@dataclass(slots=True)
class Running:
    """A server on a real socket and a client of it."""

    server: GuardServer
    engine: Any
    channel: grpc.aio.Channel
    stub: Any = field(init=False)

    def __post_init__(self) -> None:
        self.stub = guard_pb2_grpc.GuardServiceStub(self.channel)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A failed call, taken apart."""

    code: grpc.StatusCode
    message: str
    reason: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    retry_s: float | None = None


async def refused(call: Any) -> Refusal:
    """The status that a call ends with; fails when it succeeds."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            answer = await call
    except grpc.aio.AioRpcError as error:
        return refusal_of(error)
    raise AssertionError(f"the call succeeded: {answer}")


def refusal_of(error: grpc.aio.AioRpcError) -> Refusal:
    """A status with its google.rpc details."""
    status = rpc_status.from_call(error)
    reason, metadata, retry_s = "", {}, None
    for detail in status.details if status else ():
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            assert info.domain == "guard_api.v1"
            reason, metadata = info.reason, dict(info.metadata)
        if detail.Unpack(retry):
            retry_s = retry.retry_delay.ToNanoseconds() / 1e9
    return Refusal(error.code(), error.details() or "", reason, metadata, retry_s)


async def until(true: Callable[[], bool]) -> None:
    """Wait for something that the other side is about to do."""
    async with asyncio.timeout(PATIENCE_S):
        while not true():
            await asyncio.sleep(0.001)


async def fetched(
    guard: Running, path: str, headers: tuple[tuple[str, str], ...] = ()
) -> tuple[int, str]:
    """Status and body of a path of the HTTP port."""
    place = f"http://127.0.0.1:{guard.server.metrics_port}{path}"
    url = urllib.request.Request(place, headers=dict(headers))
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def fetch() -> tuple[int, str]:
        try:
            with opener.open(url, timeout=10) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    return await asyncio.to_thread(fetch)
