"""The gRPC service envoy.service.ext_proc.v3.ExternalProcessor."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import grpc

from guard_api.ext_proc.v3 import processing_pb2 as pb
from guard_middleware.asgi import GuardMiddleware
from guard_middleware.bodies import has_body
from guard_middleware.ext_proc.modes import OBSERVED, Modes, modes_of
from guard_middleware.ext_proc.passing import Passing
from guard_middleware.ext_proc.screened import Screened, backend
from guard_middleware.ext_proc.wire import (
    Misled,
    headers_of,
    immediate,
    scope_of,
    status_of,
    wordless,
)
from guard_middleware.failures import log_failure
from guard_middleware.formats.contract import Format
from guard_middleware.guards import Guard
from guard_middleware.messages import Scope
from guard_middleware.metrics import Metrics, shared
from guard_middleware.routes import Rule
from guard_middleware.settings import Settings, SettingsError
from guard_middleware.shadow import SKIPPED
from guard_middleware.strict_json import dump

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

LOG = logging.getLogger(__name__)

SERVICE = "envoy.service.ext_proc.v3.ExternalProcessor"
Wire = grpc.aio.ServicerContext[Any, Any]


class Processor:
    """Serves exchanges. A stream never ends well before its exchange has: Envoy would let the rest
    pass. For one event loop."""

    def __init__(
        self,
        settings: Settings,
        guard: Guard | None = None,
        metrics: Metrics | None = None,
        tracer_provider: TracerProvider | None = None,
    ) -> None:
        """With the guard that the settings name, or another. Raises SettingsError."""
        if settings.prompt_check == "beside":
            raise SettingsError(
                "prompt_check: a request that Envoy has forwarded cannot be called back; leave it "
                "at before"
            )
        self.settings = settings
        more: dict[str, Any] = {"metrics": metrics, "tracer_provider": tracer_provider}
        self.middleware = GuardMiddleware(backend, guard, settings=settings, **more)
        self._listening = self.middleware
        if settings.mode != "shadow":
            listens = replace(settings, mode="shadow")
            self._listening = GuardMiddleware(
                backend, self.middleware.guard, settings=listens, **more
            )
        self._metrics = metrics or shared()
        self._warned: set[str] = set()

    def handler(self) -> grpc.GenericRpcHandler:
        """To be added to a server of grpc.aio."""
        process = grpc.stream_stream_rpc_method_handler(
            self.process,
            request_deserializer=pb.ProcessingRequest.FromString,
            response_serializer=pb.ProcessingResponse.SerializeToString,
        )
        return grpc.method_handlers_generic_handler(SERVICE, {"Process": process})

    async def process(self, _: object, wire: Wire) -> None:
        """One exchange."""
        try:
            await self._serve(_Line(wire))
        except Misled as wrong:
            self._warn(str(wrong))
            await wire.abort(grpc.StatusCode.FAILED_PRECONDITION, str(wrong))
        except Exception as failure:
            log_failure(LOG, "an exchange failed", failure)
            await wire.abort(grpc.StatusCode.INTERNAL, "the exchange failed")

    async def close(self) -> None:
        """Let go of the guard; what shadow mode has under way is finished before."""
        await self._listening.close()
        await self.middleware.close()

    async def _serve(self, line: _Line) -> None:
        first = await line.read()
        if first is None:
            return
        if first.HasField("response_headers"):
            await self._unasked(line, first)
            return
        if not first.HasField("request_headers"):
            raise Misled("the request's headers did not come first: set request_header_mode SEND")
        modes = OBSERVED if first.observability_mode else modes_of(first)
        try:
            scope = scope_of(first.request_headers)
        except ValueError as wrong:
            if first.observability_mode:
                return
            await line.write(_invalid(f"{wrong}.".capitalize()))
            return
        found = self.middleware.find(scope)
        bodiless = first.request_headers.end_of_stream
        if first.observability_mode or self.settings.mode == "shadow":
            write = None if first.observability_mode else line.write
            listener = self._listener(found, modes)
            await Passing(modes, line.read, write, listener=listener).run(scope, bodiless)
        elif self._passes(found, scope, bodiless, modes):
            bare = found is Rule.BARE
            await Passing(modes, line.read, line.write, bare).run(scope, bodiless)
        else:
            if not isinstance(found, Rule):
                modes.demand()
            await Screened(self.middleware, modes, line.read, line.write).run(scope, bodiless)

    async def _unasked(self, line: _Line, first: pb.ProcessingRequest) -> None:
        """A reply to a request that we have not seen. Envoy's own are errors."""
        headers = first.response_headers.headers
        status = status_of(headers_of(headers))
        if first.observability_mode or self.settings.mode == "shadow":
            write = None if first.observability_mode else line.write
            await Passing(modes_of(first), line.read, write).resume(first)
        elif status < 400:
            raise Misled("a reply came without its request: set request_header_mode SEND")
        else:
            await line.write(wordless(status))
            while await line.read() is not None:
                pass

    def _passes(self, found: Format | Rule, scope: Scope, bodiless: bool, modes: Modes) -> bool:
        """Whether nothing of an exchange is screened. Where a body is to be left out, it must come
        here."""
        if found is Rule.BARE and not bodiless:
            modes.demand()
            return not has_body(scope["headers"])
        return found is Rule.UNTOUCHED or found is Rule.BARE

    def _listener(self, found: Format | Rule, modes: Modes) -> GuardMiddleware | None:
        """Who hears an exchange that is only listened to."""
        if found is Rule.UNTOUCHED or found is Rule.BARE:
            return None
        if not isinstance(found, Rule) and modes.problem:
            self._warn(modes.problem)
            self._metrics.exchanges.labels(found.name, SKIPPED, "shadow").inc()
            return None
        return self._listening

    def _warn(self, problem: str) -> None:
        """Once for each problem: Envoy's settings are wrong for all exchanges or for none."""
        if problem not in self._warned:
            self._warned.add(problem)
            LOG.error("ext_proc: %s", problem)


class _Line:
    """Envoy's stream: read by one task at a time, written by several."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._writing = asyncio.Lock()

    async def read(self) -> pb.ProcessingRequest | None:
        """The next message; None when Envoy has ended the stream."""
        message = await self._wire.read()
        return message if isinstance(message, pb.ProcessingRequest) else None

    async def write(self, answer: pb.ProcessingResponse) -> None:
        """Send an answer; waits while Envoy does not read. To a stream that is over none is sent:
        reading tells of its end."""
        async with self._writing:
            with suppress(grpc.aio.InternalError, grpc.aio.UsageError, asyncio.InvalidStateError):
                await self._wire.write(answer)


def _invalid(message: str) -> pb.ProcessingResponse:
    body = dump({"error": {"message": message, "type": "invalid_request_error"}})
    return immediate(400, [(b"content-type", b"application/json")], body)
