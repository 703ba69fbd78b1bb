"""The asyncio client; `guard_middleware.client` is where it is imported from."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from guard_api.v1 import guard_pb2, guard_pb2_grpc
from guard_middleware import calls, errors
from guard_middleware.calls import Item, Piece
from guard_middleware.channel import open_aio_channel
from guard_middleware.errors import GuardError
from guard_middleware.fallback import LEARN_TIMEOUT_S, Fallback
from guard_middleware.retry import Attempts
from guard_middleware.service_info import (
    PolicyList,
    PolicySummary,
    ServiceInfo,
    read_info,
    read_policies,
)
from guard_middleware.stream_status import Ending
from guard_middleware.stream_watch import Watch
from guard_middleware.terms import Terms
from guard_middleware.tracing import metadata
from guard_middleware.turns import Turns, direction_of
from guard_middleware.verdict import Outcome, PolicyRef, SeenImage, StreamOutcome
from guard_policies.assessment import Direction

_SERVING = health_pb2.HealthCheckResponse.SERVING


class AsyncGuardClient:
    """GuardClient for asyncio: the same calls, awaited. To be made inside the loop that uses it.

    Cancelling a call cancels it at the guard too.
    """

    def __init__(
        self,
        target: str,
        terms: Terms | None = None,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._terms = terms or Terms()
        self._terms.check(target)
        self._fallback = Fallback(self._terms.on_unavailable, self._terms.clock)
        self._breaker = self._terms.breaker()
        self._sleep = sleep
        self._channel = open_aio_channel(target, self._terms.tls)
        self._stub: guard_pb2_grpc.GuardServiceAsyncStub
        self._stub = guard_pb2_grpc.GuardServiceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)

    async def close(self, grace_s: float | None = None) -> None:
        """Close the channel; calls under way are cancelled, after `grace_s`."""
        await self._channel.close(grace_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def classify(
        self,
        turns: Turns,
        *,
        policy: str = "",
        language: str = "",
        no_cache: bool = False,
        timeout_s: float | None = None,
    ) -> Outcome:
        """See GuardClient.classify."""
        request = calls.classify_request(Item(turns, policy, language, no_cache))
        await self._learn()
        try:
            return calls.single_outcome(await self._call(self._stub.Classify, request, timeout_s))
        except GuardError as error:
            return self._fallback.outcome(error, policy, direction_of(request.conversation))

    async def image_at(
        self, url: str, *, policy: str = "", language: str = "", timeout_s: float | None = None
    ) -> SeenImage:
        """See GuardClient.image_at."""
        request = calls.image_request(url, policy, language)
        await self._learn()
        try:
            return calls.seen_image(await self._call(self._stub.Classify, request, timeout_s))
        except GuardError as error:
            return SeenImage(self._fallback.outcome(error, policy, Direction.PROMPT))

    async def classify_batch(
        self, items: Sequence[Item | Turns], *, timeout_s: float | None = None
    ) -> list[Outcome | GuardError]:
        """See GuardClient.classify_batch."""
        batch = calls.Batch(calls.batch_request(items))
        await self._learn()
        attempts = self._terms.attempts(timeout_s)
        while True:
            try:
                reply = await self._tried(self._stub.ClassifyBatch, batch.request, attempts)
                error = batch.read(reply)
            except GuardError as failed:
                return batch.failed(failed, self._fallback)
            pause = attempts.pause_after(error) if error else None
            if pause is None:
                return batch.outcomes(self._fallback)
            await self._sleep(pause)

    async def classify_stream(
        self,
        turns: Turns,
        pieces: AsyncIterable[Piece | str],
        *,
        policy: str = "",
        language: str = "",
        timeout_s: float | None = None,
    ) -> AsyncIterator[StreamOutcome]:
        """See GuardClient.classify_stream."""
        start = calls.start_step(turns, policy, language)
        await self._learn()
        limit = self._terms.stream_timeout_s if timeout_s is None else timeout_s
        reader = calls.StreamReader()
        try:
            self._breaker.enter()
        except GuardError as shut:
            yield reader.failed(shut, policy, self._fallback)
            return
        call = self._stub.ClassifyStream(
            timeout=limit, metadata=(*self._terms.call_metadata(), *metadata())
        )
        ending = Ending(call)
        watch = Watch(self._terms.timeout_s)
        sender = asyncio.create_task(_send(call, start, pieces, watch), name="guard-stream-sender")
        try:
            while (reply := await watch.read(call)) is not None:
                self._breaker.settle(None)
                yield reader.read(reply)
            reader.finish()
        except grpc.aio.AioRpcError:
            broken_off = errors.from_rpc(await ending.status())
            self._breaker.settle(broken_off)
            yield reader.failed(broken_off, policy, self._fallback)
        except asyncio.CancelledError:
            if sender.done() and not sender.cancelled() and (broken := sender.exception()):
                raise broken from None
            raise
        except GuardError as error:
            self._breaker.settle(error)
            yield reader.failed(error, policy, self._fallback)
        finally:
            call.cancel()
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)

    async def list_policies(self, *, timeout_s: float | None = None) -> PolicyList:
        """The policies that requests may name."""
        request = guard_pb2.ListPoliciesRequest()
        policies = read_policies(await self._call(self._stub.ListPolicies, request, timeout_s))
        self._fallback.learn(policies)
        return policies

    async def declared(self, policy: str = "") -> PolicySummary | None:
        """What the policy wants of callers, asked for once; None where the guard does not tell, or
        `on_unavailable` is not "policy"."""
        await self._learn()
        return self._fallback.declared(policy)

    def saw(self, policy: PolicyRef) -> None:
        """A verdict was by this policy: where it has changed, its wishes are asked for again."""
        self._fallback.saw(policy)

    async def info(self, *, timeout_s: float | None = None) -> ServiceInfo:
        """What is running: version, models, limits."""
        request = guard_pb2.GetInfoRequest()
        return read_info(await self._call(self._stub.GetInfo, request, timeout_s))

    async def health(self, *, timeout_s: float | None = None) -> bool:
        """Whether the guard says that it serves; raises GuardError when it cannot be asked."""
        request = health_pb2.HealthCheckRequest(service=calls.SERVICE)
        reply = await self._call(self._health.Check, request, timeout_s)
        return bool(reply.status == _SERVING)

    async def _learn(self) -> None:
        if self._fallback.wants_policies:
            try:
                await self.list_policies(timeout_s=min(LEARN_TIMEOUT_S, self._terms.timeout_s))
            except GuardError:  # unknown means block, and the call itself will tell what is wrong
                self._fallback.learn(None)

    async def _call(self, method: Callable[..., Any], request: Any, timeout_s: float | None) -> Any:
        return await self._tried(method, request, self._terms.attempts(timeout_s))

    async def _tried(self, method: Callable[..., Any], request: Any, attempts: Attempts) -> Any:
        self._breaker.enter()
        while True:
            try:
                reply = await method(
                    request,
                    timeout=attempts.next_s(),
                    metadata=(*self._terms.call_metadata(), *metadata()),
                )
                self._breaker.settle(None)
                return reply
            except grpc.aio.AioRpcError as failed:
                error = errors.from_rpc(failed)
            pause = attempts.pause_after(error)
            if pause is None:
                self._breaker.settle(error)
                raise error
            await self._sleep(pause)


async def _send(call: Any, start: Any, pieces: AsyncIterable[Piece | str], watch: Watch) -> None:
    """Write the steps of a stream; when `pieces` fails, cancel the call and fail with its error."""
    try:
        await call.write(start)
        async for piece in pieces:
            step = calls.piece_step(piece)
            watch.sends(step.piece)
            await call.write(step)
        end = calls.end_step()
        watch.sends(end.piece)
        await call.write(end)
        await call.done_writing()
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
        return  # the call is over; its reader tells why
    except Exception:
        call.cancel()
        raise
