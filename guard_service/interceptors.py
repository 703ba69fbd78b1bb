"""Around every call: admission, request id, errors to statuses, metrics, access log."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message

from guard_policies.assessment import Action
from guard_service.audit.recording import Recorder
from guard_service.errors import (
    GuardServiceError,
    InternalError,
    InvalidRequest,
    NotReady,
    Overloaded,
    ShuttingDown,
    status_of,
)
from guard_service.logs import FIELDS
from guard_service.metrics import Metrics
from guard_service.moderation import Judgement
from guard_service.security.authenticator import Authenticator, Caller
from guard_service.security.whose import WHOSE
from guard_service.tracing import SPOT, Spot, Tracer, exemplar

LOG = logging.getLogger("guard_service.access")
SERVICE = "guard_api.v1.GuardService"
REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
CROWDED_RETRY_S = 0.25
QUIET_S = 0.1
Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(slots=True)
class Call:
    """What is told about a call once it has ended. Holds no content."""

    rpc: str
    request_id: str
    caller: Caller | None = None
    size: int = 0
    verdicts: int = 0
    verdict_id: str = ""
    action: Action | None = None
    policy: str = ""
    fired: set[str] = field(default_factory=set)
    tiers: set[str] = field(default_factory=set)  # of cascades, each with its reason
    computed_tokens: int = 0
    cached_tokens: int = 0
    from_cache: int = 0
    queue_s: float = 0.0
    inference_s: float = 0.0
    spot: Spot | None = None

    @property
    def tenant(self) -> str:
        """The caller's; empty without an auth file, or before it is known who calls."""
        return self.caller.usage.name if self.caller else ""

    def note(self, judgement: Judgement) -> None:
        """Add a verdict; of many, the severest action and the longest times are kept."""
        decision = judgement.decision
        self.verdicts += 1
        self.verdict_id = judgement.id
        self.policy = judgement.policy.name
        self.action = max(self.action or Action.ALLOW, decision.action, key=lambda a: a.severity)
        self.fired.update(o.category.code for o in decision.outcomes if o.fired)
        self.computed_tokens += judgement.computed_tokens
        self.cached_tokens += judgement.cached_tokens
        self.from_cache += judgement.from_cache
        if judgement.tier:
            self.tiers.add(f"{judgement.tier} {judgement.tier_reason}")
        self.queue_s = max(self.queue_s, judgement.queue_s)
        self.inference_s = max(self.inference_s, judgement.inference_s)


CALL: ContextVar[Call] = ContextVar("guard_call")


class State(Enum):
    """Whether calls are taken."""

    STARTING = "starting"
    OPEN = "open"
    STUCK = "stuck"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class _Malformed:
    """Stands for a message that could not be decoded."""

    name: str


class Door(grpc.aio.ServerInterceptor):
    """Wraps the calls of GuardService; others (health, reflection) pass untouched."""

    def __init__(
        self,
        metrics: Metrics,
        max_calls: int,
        max_call_bytes: int,
        tracer: Tracer | None = None,
        auth: Authenticator | None = None,
    ) -> None:
        """Without `auth` anyone may call."""
        self._auth = auth
        self.state = State.STARTING
        self._metrics = metrics
        self._tracer = tracer
        self.recorder: Recorder | None = None
        self._max_calls = max_calls
        self._max_call_bytes = max_call_bytes
        self._bytes = 0
        self._tasks: set[asyncio.Task[Any]] = set()
        self._empty = asyncio.Event()
        self._empty.set()
        self._expired = False
        self._ended = 0  # calls, however they ended

    async def drained(self, timeout_s: float) -> bool:
        """Wait until the last call has ended; after `timeout_s` the rest is ended."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()
            return True
        except TimeoutError:
            self._expired = True
            for task in self._tasks:
                task.cancel()
            return False

    async def quiet(self, timeout_s: float) -> None:
        """Wait until no call comes to be refused any more: gRPC cancels those that still wait in
        its own queues when it stops, and their callers would not learn why."""
        seen = -1
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while seen != self._ended:
                    seen = self._ended
                    await asyncio.sleep(QUIET_S)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The handler, wrapped; or one that refuses without reading the request."""
        handler: Any = await continuation(handler_call_details)
        service, _, rpc = handler_call_details.method.strip("/").partition("/")
        if handler is None or service != SERVICE:
            return handler
        metadata = tuple(handler_call_details.invocation_metadata or ())
        by_name = dict(metadata)
        call = Call(rpc, _request_id(by_name.get("x-request-id")))
        if self._tracer is not None:
            call.spot = self._tracer.call(rpc, by_name)
        if self._refusal() is not None:
            return grpc.stream_stream_rpc_method_handler(self._refusing(call))
        try:
            self._meet(call, metadata)
        except GuardServiceError as error:
            return grpc.stream_stream_rpc_method_handler(self._refusing(call, error))
        decode = _tolerant(handler.request_deserializer, rpc)
        if handler.stream_stream:
            return grpc.stream_stream_rpc_method_handler(
                self._stream(call, handler.stream_stream), decode, handler.response_serializer
            )
        return grpc.unary_unary_rpc_method_handler(
            self._unary(call, handler.unary_unary), decode, handler.response_serializer
        )

    def _meet(self, call: Call, metadata: Sequence[tuple[str, str | bytes]]) -> None:
        """Who sends the call, by its token; raises when it is nobody who is served."""
        if self._auth is not None:
            said = [value for key, value in metadata if key == "authorization"]
            call.caller = self._auth.by_header(said)

    def _refusing(
        self, call: Call, error: GuardServiceError | None = None
    ) -> Callable[[Any, Context], Awaitable[None]]:
        async def refuse(requests: Any, context: Context) -> None:
            async def nothing() -> None:
                raise error or self._refusal() or Overloaded("try again", CROWDED_RETRY_S)

            await self._serve(call, context, nothing)

        return refuse

    def _unary(self, call: Call, behaviour: Any) -> Callable[[Any, Context], Awaitable[Any]]:
        async def serve(request: Message | _Malformed, context: Context) -> Any:
            async def run() -> Any:
                with self._tenants(call, context):
                    return await behaviour(_decoded(request), context)

            call.size = request.ByteSize() if isinstance(request, Message) else 0
            return await self._serve(call, context, run)

        return serve

    def _stream(self, call: Call, behaviour: Any) -> Callable[[Any, Context], Awaitable[None]]:
        async def serve(requests: AsyncIterator[Any], context: Context) -> None:
            async def run() -> None:
                with self._tenants(call, context, stream=True):
                    async for reply in behaviour(_each_decoded(requests), context):
                        await context.write(reply)

            await self._serve(call, context, run)

        return serve

    @contextlib.contextmanager
    def _tenants(self, call: Call, context: Context, stream: bool = False) -> Iterator[None]:
        """A call as its tenant's while it lasts. Raises when it is nobody's, or one too many."""
        if self._auth is None:
            yield
            return
        if call.caller is None:
            call.caller = self._auth.by_certificate(context.auth_context())
        WHOSE.set(call.tenant)
        with (
            call.caller.usage.call(stream),
            self._auth.metrics.tenant_in_flight.labels(call.tenant).track_inprogress(),
        ):
            yield

    async def _serve(self, call: Call, context: Context, run: Callable[[], Awaitable[Any]]) -> Any:
        """Run a call to its end, whatever that is, and account for it."""
        CALL.set(call)
        SPOT.set(call.spot)
        context.set_trailing_metadata((("x-request-id", call.request_id),))
        began = time.perf_counter()
        error: GuardServiceError | None = None
        code = grpc.StatusCode.OK.name
        self._metrics.in_flight.labels(call.rpc).inc()
        try:
            return await self._admitted(call, run)
        except GuardServiceError as refused:
            error, code = refused, refused.code.name
        except asyncio.CancelledError:
            if not self._expired:
                code = _gone(context).name
                if self.recorder is not None:
                    self.recorder.gone(code)
                raise
            error, code = ShuttingDown(), ShuttingDown.code.name
        except Exception:
            LOG.exception("a call failed", extra={FIELDS: {"request_id": call.request_id}})
            error = InternalError("a defect of the service; its logs tell more by the request id")
            code = error.code.name
        finally:
            self._metrics.in_flight.labels(call.rpc).dec()
            self._account(call, code, error, time.perf_counter() - began)
        if self.recorder is not None:
            await self.recorder.refused(error)
        await _abort(context, error, call.request_id)

    async def _admitted(self, call: Call, run: Callable[[], Awaitable[Any]]) -> Any:
        if refusal := self._refusal(call.size):
            raise refusal
        task = asyncio.current_task()
        assert task is not None
        self._bytes += call.size
        self._tasks.add(task)
        self._empty.clear()
        try:
            return await run()
        finally:
            self._bytes -= call.size
            self._tasks.discard(task)
            if not self._tasks:
                self._empty.set()

    def _refusal(self, size: int = 0) -> GuardServiceError | None:
        """Why no call is taken now."""
        match self.state:
            case State.STARTING:
                return NotReady("the model is still being checked; retry later")
            case State.STUCK:
                return NotReady("the engine does not answer; try another replica")
            case State.DRAINING:
                return ShuttingDown()
        if len(self._tasks) >= self._max_calls:
            return Overloaded("too many calls are in progress; retry later", CROWDED_RETRY_S)
        if self._bytes and self._bytes + size > self._max_call_bytes:
            return Overloaded("too many bytes are in progress; retry later", CROWDED_RETRY_S)
        return None

    def _account(
        self, call: Call, code: str, error: GuardServiceError | None, total_s: float
    ) -> None:
        self._ended += 1
        self._metrics.requests.labels(call.rpc, code).inc()
        self._metrics.request_seconds.labels(call.rpc).observe(total_s, exemplar())
        if self._auth is not None and call.tenant:
            self._auth.metrics.tenant_requests.labels(call.tenant, code).inc()
            self._auth.metrics.tenant_verdicts.labels(call.tenant).inc(call.verdicts)
        if call.spot is not None:
            whose = {"tenant": call.tenant} if call.tenant else {}
            reason = error.reason if error else ""
            call.spot.end(code, reason, request_id=call.request_id, **whose)
        if not LOG.isEnabledFor(logging.INFO):
            return
        fields: dict[str, Any] = {"request_id": call.request_id, "rpc": call.rpc, "code": code}
        if call.spot is not None:
            fields["trace_id"] = call.spot.trace_id
        if call.caller is not None:
            fields |= {"tenant": call.tenant, "caller": call.caller.name}
        if error is not None:
            fields["reason"] = error.reason
        if call.action is not None:
            fields |= {
                "action": call.action.value,
                "policy": call.policy,
                "fired": sorted(call.fired),
                "verdicts": call.verdicts,
                "verdict_id": call.verdict_id,
                "from_cache": call.from_cache,
                "computed_tokens": call.computed_tokens,
                "cached_tokens": call.cached_tokens,
                "queue_s": round(call.queue_s, 6),
                "inference_s": round(call.inference_s, 6),
            }
        if call.tiers:
            fields["tiers"] = sorted(call.tiers)
        fields |= {"request_bytes": call.size, "total_s": round(total_s, 6)}
        LOG.info("call", extra={FIELDS: fields})


def _tolerant(decode: Callable[[bytes], Message], rpc: str) -> Callable[[bytes], object]:
    """A decoder that hands on a stand-in for what it cannot decode: gRPC would say INTERNAL."""

    def tolerant(data: bytes) -> object:
        try:
            return decode(data)
        except (DecodeError, RecursionError):
            return _Malformed(rpc)

    return tolerant


def _decoded(request: object) -> object:
    if isinstance(request, _Malformed):
        raise InvalidRequest(
            f"the request is not a valid {request.name}Request in protobuf encoding "
            "(all text must be UTF-8)"
        )
    return request


async def _each_decoded(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _decoded(request)


def _gone(context: Context) -> grpc.StatusCode:
    """Why a caller is gone: gRPC cancels a call for both reasons."""
    remaining = context.time_remaining()
    late = remaining is not None and remaining <= 0
    return grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED


def _request_id(offered: str | bytes | None) -> str:
    """The caller's id if it is short and plain, else one of ours."""
    if isinstance(offered, str) and REQUEST_ID.fullmatch(offered):
        return offered
    return uuid.uuid4().hex


async def _abort(context: Context, error: GuardServiceError, request_id: str) -> None:
    details = status_of(error, request_id).SerializeToString()
    await context.abort(
        error.code,
        str(error),
        (("grpc-status-details-bin", details), ("x-request-id", request_id)),
    )
