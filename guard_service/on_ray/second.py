"""The second guard of a cascade where it is a deployment of its own: reached by Ray's handle.

To the first guard it is a server on a private socket, as any other second guard: what its answers
are held to is the same.
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from guard_api.v1 import guard_pb2
from guard_service.interceptors import SERVICE
from guard_service.on_ray.passing import OPTIONS, Failed, handed_on

Context = grpc.aio.ServicerContext[Any, Any]
# What Ray says when a deployment has no replica that could take the call, or no room.
_AWAY = (
    "DeploymentUnavailableError",
    "BackPressureError",
    "ActorDiedError",
    "ActorUnavailableError",
)


class SecondBySocket:
    """A server of what a first guard asks a second; for one event loop."""

    def __init__(self, handle: Any) -> None:
        """`handle` is of a deployment whose `ask` takes method, request and metadata."""
        self._handle = handle
        self._folder = tempfile.TemporaryDirectory(prefix="guard-")  # readable by this user only
        self.target = f"unix:{Path(self._folder.name) / 'second'}"
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        """Take calls."""
        self._server = grpc.aio.server(options=OPTIONS)
        methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Classify": grpc.unary_unary_rpc_method_handler(
                self._classify,
                request_deserializer=guard_pb2.ClassifyRequest.FromString,
                response_serializer=guard_pb2.ClassifyResponse.SerializeToString,
            ),
            "GetInfo": grpc.unary_unary_rpc_method_handler(
                self._get_info,
                request_deserializer=guard_pb2.GetInfoRequest.FromString,
                response_serializer=guard_pb2.GetInfoResponse.SerializeToString,
            ),
        }
        handler = grpc.method_handlers_generic_handler(SERVICE, methods)
        self._server.add_generic_rpc_handlers((handler,))
        self._server.add_insecure_port(self.target)
        await self._server.start()

    async def close(self) -> None:
        """Take none any more."""
        if self._server is not None:
            await self._server.stop(0.0)
        self._folder.cleanup()

    async def _classify(self, request: guard_pb2.ClassifyRequest, context: Context) -> Any:
        return await self._asked("Classify", request, context)

    async def _get_info(self, request: guard_pb2.GetInfoRequest, context: Context) -> Any:
        return await self._asked("GetInfo", request, context)

    async def _asked(self, method: str, request: Any, context: Context) -> Any:
        metadata = handed_on(tuple(context.invocation_metadata() or ()))
        try:
            found = await self._handle.ask.remote(method, request, metadata)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            code = grpc.StatusCode.UNAVAILABLE if _is_away(error) else grpc.StatusCode.INTERNAL
            await context.abort(code, "the second guard's deployment did not answer")
        if isinstance(found, Failed):
            await context.abort(found.code, found.details, found.trailers)
        return found


def _is_away(error: BaseException) -> bool:
    return any(kind.__name__ in _AWAY for kind in type(error).__mro__)
