"""What `guardctl bench middleware` measures: what a guard in front of a backend costs."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from guard_service.cli import bench_streams, exits
from guard_service.cli.bench_http import Connection, Got
from guard_service.cli.bench_middleware_app import (
    CHAT,
    PLAIN,
    question,
    stream_body,
    whole_reply,
)
from guard_service.cli.bench_middleware_table import show
from guard_service.cli.bench_servers import BARE, STARTER, Server, servers

_PIECES = 60  # of a reply that is not streamed
_STREAM_PIECES = 400
_PACED_PIECES = 100
_FIRST_PIECES = 40
_PACED_MS = 20  # 50 tokens a second, as a backend speaks to one reader


@dataclass(frozen=True, slots=True)
class Plan:
    """How to measure; times in seconds."""

    repeats: int
    requests: int  # one behind another, in each turn
    concurrency: int
    duration_s: float  # of requests side by side, for each server, over all turns
    streams: int  # open at once; 0: none


Figures = dict[str, float]
Measure = Callable[[Plan, Server], Awaitable[Figures]]


def run(plan: Plan, as_json: bool) -> int:
    """Measure and report; the exit code is 1 when a reply was not what the backend said."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the servers must not outlive us
    try:
        with servers() as everyone:
            turns = asyncio.run(_turns(plan, everyone))
            opened = asyncio.run(bench_streams.opened(plan.streams, everyone))
    except (OSError, EOFError) as wrong:
        exits.fail(f"a server broke off: {wrong}")
    report = {
        "cores": len(os.sched_getaffinity(0)),
        "repeats": plan.repeats,
        "concurrency": plan.concurrency,
        "paced_ms": _PACED_MS,
        "variants": [
            {"name": name, **_summary(turns[name], turns[BARE]), **opened.get(name, {})}
            for name in everyone
        ],
        "drain": bench_streams.drained(min(plan.streams, 200)) if plan.streams else None,
    }
    if as_json:
        print(json.dumps(report))
    else:
        show(report)
    return exits.OK if _faithful(report) else exits.NO_VERDICT


async def _turns(plan: Plan, everyone: Mapping[str, Server]) -> dict[str, list[Figures]]:
    """The figures of each server at each turn; who comes first changes from turn to turn."""
    names = list(everyone)
    found: dict[str, list[Figures]] = {name: [] for name in names}
    for turn in range(-1, plan.repeats):  # the first warms up and does not count
        print(f"guardctl: turn {turn + 1} of {plan.repeats}", file=sys.stderr)
        one: dict[str, Figures] = {name: {} for name in names}
        for measure in MEASURES:
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                if name != STARTER or measure is first:
                    one[name] |= await measure(plan, everyone[name])
        for name in names if turn >= 0 else ():
            found[name].append(one[name])
    return found


async def whole(plan: Plan, server: Server) -> Figures:
    """Replies that are not streamed, one behind another."""
    connection = await Connection.open(server.port)
    before_s = server.cpu_s
    took = [(await _asked(connection, CHAT, _PIECES)).whole_s for _ in range(plan.requests)]
    cpu_s = server.cpu_s - before_s
    connection.close()
    return {
        "p50_ms": _percentile_ms(took, 50),
        "p99_ms": _percentile_ms(took, 99),
        "cpu_ms": 1000 * cpu_s / plan.requests,
    }


async def plain(plan: Plan, server: Server) -> Figures:
    """A route that nothing guards."""
    connection = await Connection.open(server.port)
    took = [(await connection.ask(PLAIN)).whole_s for _ in range(plan.requests)]
    connection.close()
    return {"plain_p50_ms": _percentile_ms(took, 50)}


async def crowd(plan: Plan, server: Server) -> Figures:
    """Replies that are not streamed, to several callers at a time."""
    end = time.perf_counter() + plan.duration_s / plan.repeats

    async def caller() -> int:
        connection, answered = await Connection.open(server.port), 0
        while time.perf_counter() < end:
            await _asked(connection, CHAT, _PIECES)
            answered += 1
        connection.close()
        return answered

    began = time.perf_counter()
    answered = sum(await asyncio.gather(*(caller() for _ in range(plan.concurrency))))
    return {"requests_per_s": answered / (time.perf_counter() - began)}


async def stream(plan: Plan, server: Server) -> Figures:
    """Streams of a backend that says all at once: nothing but processor time."""
    connection = await Connection.open(server.port)
    before_s = server.cpu_s
    took = [(await _streamed(connection, _STREAM_PIECES)).whole_s for _ in range(10)]
    cpu_s = server.cpu_s - before_s
    connection.close()
    return {
        "pieces_per_s": _STREAM_PIECES / statistics.median(took),
        "cpu_us_per_piece": 1e6 * cpu_s / (10 * _STREAM_PIECES),
    }


async def paced(plan: Plan, server: Server) -> Figures:
    """Streams of a backend that speaks at a model's pace, several at a time."""

    async def caller() -> float:
        connection = await Connection.open(server.port)
        got = await _streamed(connection, _PACED_PIECES, _PACED_MS)
        connection.close()
        return got.whole_s

    took = await asyncio.gather(*(caller() for _ in range(plan.concurrency)))
    return {"paced_pieces_per_s": _PACED_PIECES * plan.concurrency / statistics.median(took)}


async def first(plan: Plan, server: Server) -> Figures:
    """One stream: the time to its first text, from a backend with and without a model's pace."""
    connection = await Connection.open(server.port)
    at_once = [(await _streamed(connection, _FIRST_PIECES)).first_s for _ in range(5)]
    at_pace = await _streamed(connection, _FIRST_PIECES, _PACED_MS)
    connection.close()
    return {
        "first_ms": 1000 * statistics.median(at_once),
        "paced_first_ms": 1000 * at_pace.first_s,
    }


MEASURES: tuple[Measure, ...] = (whole, plain, crowd, stream, paced, first)


async def _asked(connection: Connection, target: str, pieces: int) -> Got:
    return _checked(await connection.ask(target, question(pieces, False)), whole_reply(pieces))


async def _streamed(connection: Connection, pieces: int, pause_ms: int = 0) -> Got:
    target = f"{CHAT}?pause_ms={pause_ms}" if pause_ms else CHAT
    return _checked(await connection.ask(target, question(pieces, True)), stream_body(pieces))


def _checked(got: Got, expected: bytes) -> Got:
    """A figure of replies that are not what the backend said would be of no use."""
    if got.status != 200 or got.body != expected:
        raise OSError(f"status {got.status}, {len(got.body)} of {len(expected)} bytes")
    return got


def _percentile_ms(times_s: Iterable[float], percent: int) -> float:
    ordered = sorted(times_s)
    return 1000 * ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


_ADDED = ("p50_ms", "p99_ms", "cpu_ms", "cpu_us_per_piece", "first_ms", "paced_first_ms")
_RATIOS = ("requests_per_s", "pieces_per_s", "paced_pieces_per_s", "plain_p50_ms")


def _summary(turns: list[Figures], bare: list[Figures]) -> dict[str, float]:
    """Medians over the turns; what is added to bare, and its ratio to bare, turn by turn."""

    def median(name: str, of: Callable[[float, float], float]) -> float:
        pairs = zip(turns, bare, strict=True)
        return round(statistics.median(of(one[name], other[name]) for one, other in pairs), 4)

    found: dict[str, float] = {}
    for name in turns[0]:
        found[name] = median(name, lambda one, _: one)
        if name in _ADDED:
            found[f"added_{name}"] = median(name, lambda one, other: one - other)
        if name in _RATIOS:
            found[f"{name}_ratio"] = median(name, lambda one, other: one / other)
    return found


def _faithful(report: Mapping[str, Any]) -> bool:
    opened = [one.get("streams", {}) for one in report["variants"]]
    if report["drain"]:
        opened.append(report["drain"])
    return not any(one.get("refused") or one.get("lost") or one.get("unequal") for one in opened)
