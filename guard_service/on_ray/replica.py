"""One replica of a Ray Serve deployment: a whole guard service, and the way into it.

The service listens on a private socket of the replica's own process, and calls are handed on to it
as they came. Admission, policies, errors, request ids, logs and drain are those of guard-service.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from typing import Any

import grpc.aio
import ray
from grpc_health.v1 import health_pb2, health_pb2_grpc

from guard_api.v1 import guard_pb2, guard_pb2_grpc
from guard_service import logs
from guard_service.interceptors import SERVICE
from guard_service.local import private_server
from guard_service.on_ray import passing
from guard_service.on_ray.passing import RayContext
from guard_service.on_ray.second import SecondBySocket
from guard_service.on_ray.settings import settings_of

HEALTH_TIMEOUT_S = 5.0
SERVING = health_pb2.HealthCheckResponse.SERVING


class Guard:
    """What Ray Serve makes a replica of. The context of a call is Ray's own, `grpc_context`."""

    def __init__(
        self, given: Mapping[str, Any], second: Any = None, is_second: bool = False
    ) -> None:
        """Load the model and check it; raises what guard-service would end with.

        `second` is the handle of the deployment that cascades ask, of this same class; that one
        `is_second`: the first has asked its callers who they are.
        """
        cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 0.0)
        settings = settings_of(given, cpus)
        if is_second:
            settings = replace(settings, auth=None)
        logs.set_up(settings.log_level, settings.log_format)
        self._second = SecondBySocket(second) if second is not None else None
        self._started: asyncio.Task[None] | None = None
        if self._second is not None:
            settings = replace(settings, second_guard=self._second.target)
        self._opened = ExitStack()
        self._target = self._opened.enter_context(private_server(settings))

    async def Classify(
        self, request: guard_pb2.ClassifyRequest, grpc_context: RayContext
    ) -> guard_pb2.ClassifyResponse:
        """The verdict on one conversation."""
        stub, nothing = await self._ready(), guard_pb2.ClassifyResponse()
        return await passing.answered(stub.Classify, request, grpc_context, nothing)

    async def ClassifyBatch(
        self, request: guard_pb2.ClassifyBatchRequest, grpc_context: RayContext
    ) -> guard_pb2.ClassifyBatchResponse:
        """A result for each conversation."""
        stub, nothing = await self._ready(), guard_pb2.ClassifyBatchResponse()
        return await passing.answered(stub.ClassifyBatch, request, grpc_context, nothing)

    async def ClassifyStream(
        self, requests: AsyncIterator[guard_pb2.ClassifyStreamRequest], grpc_context: RayContext
    ) -> AsyncIterator[guard_pb2.ClassifyStreamResponse]:
        """Verdicts on a reply as it grows."""
        metadata = passing.handed_on(grpc_context.invocation_metadata())
        call = (await self._ready()).ClassifyStream(metadata=metadata)
        async for reply in passing.streamed(call, requests, grpc_context):
            yield reply

    async def ListPolicies(
        self, request: guard_pb2.ListPoliciesRequest, grpc_context: RayContext
    ) -> guard_pb2.ListPoliciesResponse:
        """The policies that requests may name."""
        stub, nothing = await self._ready(), guard_pb2.ListPoliciesResponse()
        return await passing.answered(stub.ListPolicies, request, grpc_context, nothing)

    async def GetInfo(
        self, request: guard_pb2.GetInfoRequest, grpc_context: RayContext
    ) -> guard_pb2.GetInfoResponse:
        """What this replica runs."""
        stub, nothing = await self._ready(), guard_pb2.GetInfoResponse()
        return await passing.answered(stub.GetInfo, request, grpc_context, nothing)

    async def Check(
        self, request: health_pb2.HealthCheckRequest, grpc_context: RayContext
    ) -> health_pb2.HealthCheckResponse:
        """gRPC's health, of the replica that the question came to."""
        nothing = health_pb2.HealthCheckResponse()
        return await passing.answered(self._health.Check, request, grpc_context, nothing)

    async def ask(
        self, method: str, request: Any, metadata: passing.Metadata
    ) -> Any | passing.Failed:
        """For other deployments: a reply, or how the call failed."""
        call = getattr(await self._ready(), method)(request, metadata=metadata)
        found = await passing.outcome(call)
        return found if isinstance(found, passing.Failed) else found[0]

    async def check_health(self) -> None:
        """Asked by Ray now and then; a replica for which this raises is replaced."""
        await self._ready()
        request = health_pb2.HealthCheckRequest(service=SERVICE)
        reply = await self._health.Check(request, timeout=HEALTH_TIMEOUT_S)
        if reply.status != SERVING:
            raise RuntimeError("the guard does not serve: its engine does not answer")

    async def __del__(self) -> None:
        """Awaited by Ray when the last call has ended."""
        if self._second is not None:
            await self._second.close()
        await self._channel.close()
        await asyncio.to_thread(self._opened.close)

    async def _ready(self) -> guard_pb2_grpc.GuardServiceAsyncStub:
        """The way to the service; the second guard's is opened first."""
        if self._second is not None:
            if self._started is None:
                self._started = asyncio.create_task(self._second.start())
            await asyncio.shield(self._started)
        return self._stub

    @cached_property
    def _channel(self) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(self._target, options=passing.OPTIONS)

    @cached_property
    def _stub(self) -> guard_pb2_grpc.GuardServiceAsyncStub:
        stub: guard_pb2_grpc.GuardServiceAsyncStub = guard_pb2_grpc.GuardServiceStub(self._channel)
        return stub

    @cached_property
    def _health(self) -> Any:
        return health_pb2_grpc.HealthStub(self._channel)
