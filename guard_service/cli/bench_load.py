"""A closed loop of callers, and what it measured."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import grpc.aio

from guard_api.v1 import guard_pb2, guard_pb2_grpc, verdict_pb2
from guard_middleware.bearer import TokenFile
from guard_middleware.channel import TLS, open_aio_channel
from guard_middleware.errors import from_rpc
from guard_middleware.verdict import seconds

Requests = Iterator[guard_pb2.ClassifyRequest]


@dataclass(slots=True)
class Tally:
    """Times in seconds. `elapsed_s` is the wall time in which the calls were made."""

    latencies_s: list[float] = field(default_factory=list)
    elapsed_s: float = 0.0
    queue_s: float = 0.0
    inference_s: float = 0.0
    tokens: int = 0
    from_cache: int = 0
    errors: Counter[str] = field(default_factory=Counter)

    @property
    def rate(self) -> float:
        """Verdicts per second."""
        return len(self.latencies_s) / self.elapsed_s if self.elapsed_s else 0.0

    def percentile_ms(self, percent: float) -> float:
        """The latency that `percent` of the calls did not exceed, in ms; 0 without calls."""
        return percentile(self.latencies_s, percent) * 1000

    def add(self, latency_s: float, verdict: verdict_pb2.Verdict) -> None:
        """Count a verdict."""
        self.latencies_s.append(latency_s)
        self.queue_s += seconds(verdict.timing.queue)
        self.inference_s += seconds(verdict.timing.inference)
        self.tokens += verdict.timing.computed_tokens
        self.from_cache += verdict.from_cache


def percentile(values: Sequence[float], percent: float) -> float:
    """Nearest rank: the smallest value that `percent` of them do not exceed; 0 without values."""
    if not values:
        return 0.0
    ranked = sorted(values)
    rank = -(-len(ranked) * percent // 100)
    return ranked[min(len(ranked), max(1, int(rank))) - 1]


@dataclass(frozen=True, slots=True)
class Load:
    """How much to ask: `calls` 0 means as many as fit into the time."""

    callers: int
    duration_s: float
    calls: int = 0
    timeout_s: float = 30.0


async def drive(
    target: str,
    tls: TLS | None,
    requests: Requests,
    loads: Sequence[Load],
    token: TokenFile | None = None,
) -> Tally:
    """Put the loads on the guard, one after the other, on one channel; the last one's tally."""
    tally = Tally()
    async with open_aio_channel(target, tls) as channel:
        stub: guard_pb2_grpc.GuardServiceAsyncStub = guard_pb2_grpc.GuardServiceStub(channel)
        for load in loads:
            tally = await _loop(stub, requests, load, time.perf_counter, token)
    return tally


async def _loop(
    stub: guard_pb2_grpc.GuardServiceAsyncStub,
    requests: Requests,
    load: Load,
    clock: Callable[[], float],
    token: TokenFile | None,
) -> Tally:
    tally, begun = Tally(), clock()
    left = load.calls or 2**63

    async def caller() -> None:
        nonlocal left
        while left > 0 and clock() - begun < load.duration_s:
            left -= 1
            request, start = next(requests), clock()
            try:
                metadata = token.metadata() if token else ()
                reply = await stub.Classify(request, timeout=load.timeout_s, metadata=metadata)
                tally.add(clock() - start, reply.verdict)
            except grpc.aio.AioRpcError as failed:
                tally.errors[from_rpc(failed).reason] += 1

    await asyncio.gather(*(caller() for _ in range(load.callers)))
    tally.elapsed_s = clock() - begun
    return tally
