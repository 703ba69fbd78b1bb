"""GuardClient and AsyncGuardClient: ask a guard with deadlines, retries, a declared fallback."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, cast

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from guard_api.v1 import guard_pb2, guard_pb2_grpc
from guard_middleware import calls, errors, stream_watch
from guard_middleware.async_client import AsyncGuardClient
from guard_middleware.calls import Item, Piece
from guard_middleware.channel import open_channel
from guard_middleware.errors import GuardError
from guard_middleware.fallback import LEARN_TIMEOUT_S, Fallback
from guard_middleware.retry import Attempts
from guard_middleware.service_info import PolicyList, ServiceInfo, read_info, read_policies
from guard_middleware.stream_watch import ThreadWatch
from guard_middleware.terms import Terms
from guard_middleware.turns import Turns, direction_of
from guard_middleware.verdict import Outcome, SeenImage, StreamOutcome
from guard_policies.assessment import Direction

__all__ = ["AsyncGuardClient", "GuardClient"]

_SERVING = health_pb2.HealthCheckResponse.SERVING


class GuardClient:
    """A blocking client of one guard; thread-safe, meant to be kept and shared.

    Every call has a deadline (`terms.timeout_s`, or its own). UNAVAILABLE and RESOURCE_EXHAUSTED
    are tried again within it. What then follows is `terms.on_unavailable`.
    """

    def __init__(
        self,
        target: str,
        terms: Terms | None = None,
        *,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._terms = terms or Terms()
        self._terms.check(target)
        self._fallback = Fallback(self._terms.on_unavailable, self._terms.clock)
        self._breaker = self._terms.breaker()
        self._sleep = sleep
        self._channel = open_channel(target, self._terms.tls)
        self._stub = guard_pb2_grpc.GuardServiceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)

    def close(self) -> None:
        """Close the channel; calls under way are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def classify(
        self,
        turns: Turns,
        *,
        policy: str = "",
        language: str = "",
        no_cache: bool = False,
        timeout_s: float | None = None,
    ) -> Outcome:
        """The verdict on the last turn, or an Unjudged where `on_unavailable` is not "raise".

        Raises ValueError for what is no conversation, GuardError when there is no verdict.
        """
        request = calls.classify_request(Item(turns, policy, language, no_cache))
        self._learn()
        try:
            return calls.single_outcome(self._call(self._stub.Classify, request, timeout_s))
        except GuardError as error:
            return self._fallback.outcome(error, policy, direction_of(request.conversation))

    def image_at(
        self, url: str, *, policy: str = "", language: str = "", timeout_s: float | None = None
    ) -> SeenImage:
        """What the guard says of the image behind an address, by itself, and the image as it was
        judged: for guards whose policy lets images be fetched. Raises ValueError for a lone
        surrogate, and otherwise what `classify` raises."""
        request = calls.image_request(url, policy, language)
        self._learn()
        try:
            return calls.seen_image(self._call(self._stub.Classify, request, timeout_s))
        except GuardError as error:
            return SeenImage(self._fallback.outcome(error, policy, Direction.PROMPT))

    def classify_batch(
        self, items: Sequence[Item | Turns], *, timeout_s: float | None = None
    ) -> list[Outcome | GuardError]:
        """One entry per item, in order. An item that fails does not fail the others: its GuardError
        stands in its place (`entry.judged` is False for it, as for an Unjudged). Items that failed
        with UNAVAILABLE or RESOURCE_EXHAUSTED are asked again, they alone, within the deadline."""
        batch = calls.Batch(calls.batch_request(items))
        self._learn()
        attempts = self._terms.attempts(timeout_s)
        while True:
            try:
                reply = self._tried(self._stub.ClassifyBatch, batch.request, attempts)
                error = batch.read(reply)
            except GuardError as failed:
                return batch.failed(failed, self._fallback)
            pause = attempts.pause_after(error) if error else None
            if pause is None:
                return batch.outcomes(self._fallback)
            self._sleep(pause)

    def classify_stream(
        self,
        turns: Turns,
        pieces: Iterable[Piece | str],
        *,
        policy: str = "",
        language: str = "",
        timeout_s: float | None = None,
    ) -> Iterator[StreamOutcome]:
        """Outcomes on a growing reply to `turns`, as they come; the last one has `final` set.

        `pieces` is read in another thread. Never retried: a stream has a state. A verdict that was
        asked for comes within `terms.timeout_s`, the whole stream takes `terms.stream_timeout_s` at
        most, or `timeout_s`. An error of `pieces` ends the stream and is raised.
        """
        start = calls.start_step(turns, policy, language)
        self._learn()
        return self._stream(start, pieces, policy, timeout_s)

    def list_policies(self, *, timeout_s: float | None = None) -> PolicyList:
        """The policies that requests may name."""
        request = guard_pb2.ListPoliciesRequest()
        policies = read_policies(self._call(self._stub.ListPolicies, request, timeout_s))
        self._fallback.learn(policies)
        return policies

    def info(self, *, timeout_s: float | None = None) -> ServiceInfo:
        """What is running: version, models, limits."""
        return read_info(self._call(self._stub.GetInfo, guard_pb2.GetInfoRequest(), timeout_s))

    def health(self, *, timeout_s: float | None = None) -> bool:
        """Whether the guard says that it serves; raises GuardError when it cannot be asked."""
        request = health_pb2.HealthCheckRequest(service=calls.SERVICE)
        return bool(self._call(self._health.Check, request, timeout_s).status == _SERVING)

    def _learn(self) -> None:
        if self._fallback.wants_policies:
            try:
                self.list_policies(timeout_s=min(LEARN_TIMEOUT_S, self._terms.timeout_s))
            except GuardError:  # unknown means block, and the call itself will tell what is wrong
                self._fallback.learn(None)

    def _call(self, method: Callable[..., Any], request: Any, timeout_s: float | None) -> Any:
        return self._tried(method, request, self._terms.attempts(timeout_s))

    def _tried(self, method: Callable[..., Any], request: Any, attempts: Attempts) -> Any:
        self._breaker.enter()
        while True:
            try:
                reply = method(
                    request, timeout=attempts.next_s(), metadata=self._terms.call_metadata()
                )
                self._breaker.settle(None)
                return reply
            except grpc.RpcError as failed:
                error = errors.from_rpc(cast(errors.RpcStatus, failed))
            pause = attempts.pause_after(error)
            if pause is None:
                self._breaker.settle(error)
                raise error
            self._sleep(pause)

    def _stream(
        self,
        start: guard_pb2.ClassifyStreamRequest,
        pieces: Iterable[Piece | str],
        policy: str,
        timeout_s: float | None,
    ) -> Iterator[StreamOutcome]:
        watch, broken = ThreadWatch(self._terms.timeout_s), list[Exception]()
        reader = calls.StreamReader()
        try:
            self._breaker.enter()
        except GuardError as shut:
            yield reader.failed(shut, policy, self._fallback)
            return
        limit = self._terms.stream_timeout_s if timeout_s is None else timeout_s
        call = self._stub.ClassifyStream(
            _steps(start, pieces, watch, broken),
            timeout=limit,
            metadata=self._terms.call_metadata(),
        )
        with watch.over(call):
            try:
                for reply in watch.replies(call):
                    self._breaker.settle(None)
                    yield reader.read(reply)
                reader.finish()
            except grpc.RpcError as failed:
                if broken:
                    raise broken[0] from None
                status = cast(errors.RpcStatus, failed)
                broken_off = stream_watch.late() if watch.late else errors.from_rpc(status)
                self._breaker.settle(broken_off)
                yield reader.failed(broken_off, policy, self._fallback)
            except GuardError as error:
                self._breaker.settle(error)
                yield reader.failed(error, policy, self._fallback)


def _steps(
    start: guard_pb2.ClassifyStreamRequest,
    pieces: Iterable[Piece | str],
    watch: ThreadWatch,
    broken: list[Exception],
) -> Iterator[guard_pb2.ClassifyStreamRequest]:
    """The steps of a stream; when `pieces` fails, its error is `broken`'s, and ends the call."""
    yield start
    try:
        for step in map(calls.piece_step, pieces):
            watch.sends(step.piece)
            yield step
    except Exception as error:
        broken.append(error)
        raise
    end = calls.end_step()
    watch.sends(end.piece)
    yield end
