"""Many streams at once through the servers of `guardctl bench middleware`: what becomes of them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from guard_service.cli.bench_http import Connection
from guard_service.cli.bench_middleware_app import CHAT, GAUGE, GO_ON, question, stream_body
from guard_service.cli.bench_servers import BARE, SIDECAR, STARTER, Server, app, sidecar

# What one core says in a minute or two by the thousand: half of it, once streams are open.
_PIECES, _PACED_PIECES = 24, 100
_PAUSE_MS = 20
_WAITING = f"{CHAT}?pause_ms={_PAUSE_MS}&waits=1"
_PACED = f"{CHAT}?pause_ms={_PAUSE_MS}"
ENDS = ("finished", "filtered", "refused", "lost", "unequal")
_SIGN_OF_LIFE = b":\n\n"  # what the middleware puts between events where verdicts take long
_OPEN_S = 120.0
_SETTLE_S = 30.0  # longer than a sidecar keeps a connection to its upstream that nobody uses


async def opened(number: int, everyone: Mapping[str, Server]) -> dict[str, dict[str, Any]]:
    """For each server: so many streams open at once, then finished; the memory of one; then so
    many whose clients leave."""
    if not number:
        return {}
    found = {}
    for name, server in everyone.items():
        if name != STARTER:
            print(f"guardctl: {number} streams at once, {name}", file=sys.stderr)
            streams = await _held(number, server)
            streams["left"] = await _left(number, server)
            found[name] = {"streams": streams}
    for one in found.values():
        bare = found[BARE]["streams"]["kib_per_stream"]
        one["streams"]["added_kib_per_stream"] = one["streams"]["kib_per_stream"] - bare
    return found


def drained(number: int) -> dict[str, Any]:
    """So many streams through a sidecar that is told to end while they are under way."""
    print(f"guardctl: {number} streams through a sidecar that is told to end", file=sys.stderr)
    with app(BARE, "bare") as bare, sidecar(SIDECAR, bare) as server:
        ended, took_s = asyncio.run(_drained(number, server))
        server.process.wait()
        gauge = asyncio.run(_gauge(bare))
    return {
        **_counted(ended),
        "exit_code": server.process.returncode,
        "seconds": round(took_s, 2),
        "open_at_backend": gauge["open"],
    }


async def _held(number: int, server: Server) -> dict[str, Any]:
    await _Streams(server, CHAT, _PIECES).all(1)  # what the first one opens for all is not counted
    rss_kib, sockets = server.rss_kib, server.sockets
    streams = _Streams(server, _WAITING, _PIECES)
    await streams.open(number)
    await streams.wait()
    held_kib = server.rss_kib
    await _ask(server.backend, GO_ON, b"{}")
    ended = await streams.ended()
    return {
        **_counted(ended),
        "kib_per_stream": round((held_kib - rss_kib) / number, 1),
        "sockets_left": await _settled(lambda: server.sockets - sockets),
        "open_at_backend": (await _gauge(server.backend))["open"],
        "rss_kib": {"before": rss_kib, "held": held_kib, "after": server.rss_kib},
    }


async def _left(number: int, server: Server) -> dict[str, int]:
    before, sockets = (await _gauge(server.backend))["left"], server.sockets
    streams = _Streams(server, _WAITING, _PIECES)
    await streams.open(number)
    await streams.wait()
    streams.leave()
    left = await _settled(lambda: server.sockets - sockets)
    gauge = await _gauge(server.backend)
    return {
        "told_to_backend": gauge["left"] - before,
        "open_at_backend": gauge["open"],
        "sockets_left": left,
    }


async def _drained(number: int, server: Server) -> tuple[Counter[str], float]:
    streams = _Streams(server, _PACED, _PACED_PIECES)
    await streams.open(number)
    began = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    return await streams.ended(), time.monotonic() - began


class _Streams:
    """Clients of one server, each with a connection of its own."""

    def __init__(self, server: Server, target: str, pieces: int) -> None:
        self._server = server
        self._target = target
        self._pieces = pieces
        self._connections: list[Connection] = []
        self._tasks: list[asyncio.Task[str]] = []

    async def open(self, number: int) -> None:
        """Begin so many; returns when each has its first text, or none is to be expected."""
        begun = [asyncio.Event() for _ in range(number)]
        self._tasks = [asyncio.create_task(self._run(one)) for one in begun]
        await asyncio.gather(*(one.wait() for one in begun))

    async def wait(self) -> None:
        """Until all that have not ended are in their middle, and wait there. Raises OSError where
        they do not come there."""
        end = time.monotonic() + _OPEN_S
        while (waiting := (await _gauge(self._server.backend))["waiting"]) < self._under_way:
            if time.monotonic() > end:
                raise OSError(f"{waiting} of {self._under_way} streams came to their middle")
            await asyncio.sleep(0.1)

    @property
    def _under_way(self) -> int:
        return sum(not task.done() for task in self._tasks)

    async def all(self, number: int) -> Counter[str]:
        """Begin so many and see them end."""
        await self.open(number)
        return await self.ended()

    async def ended(self) -> Counter[str]:
        """How each ended."""
        return Counter(await asyncio.gather(*self._tasks))

    def leave(self) -> None:
        """Close all connections, as clients do that crash."""
        for task in self._tasks:
            task.cancel()
        for connection in self._connections:
            connection.close()

    async def _run(self, begun: asyncio.Event) -> str:
        try:
            connection = await Connection.open(self._server.port)
            self._connections.append(connection)
            await connection.send(self._target, question(self._pieces, True))
            got = await connection.receive(time.perf_counter(), begun.set)
            connection.close()
        except (OSError, EOFError):
            return "lost"
        finally:
            begun.set()
        if got.status != 200:
            return "refused"
        said, whole = got.body.replace(_SIGN_OF_LIFE, b""), stream_body(self._pieces)
        if said == whole:
            return "finished"
        return "filtered" if _is_filtered(said, whole) else "unequal"


def _counted(ended: Counter[str]) -> dict[str, int]:
    return {name: ended[name] for name in ENDS}


def _is_filtered(said: bytes, whole: bytes) -> bool:
    """Whether the stream was cut by a refusal, as it is where a guard cannot keep up: a beginning
    of what was said, then the refusal's events and no others."""
    rest = said[len(os.path.commonprefix([said, whole])) :]
    ended = b'"finish_reason":"content_filter"' in rest and rest.endswith(b"data: [DONE]\n\n")
    return ended and rest.count(b"\n\n") <= 3


async def _settled(count: Callable[[], int]) -> int:
    """What is left of the count once it has come down to nothing, or after a while."""
    end = time.monotonic() + _SETTLE_S
    while (left := count()) > 0 and time.monotonic() < end:
        await asyncio.sleep(0.1)
    return max(0, left)


async def _ask(server: Server, target: str, body: bytes | None = None) -> bytes:
    connection = await Connection.open(server.port)
    got = await connection.ask(target, body)
    connection.close()
    return got.body


async def _gauge(server: Server) -> dict[str, int]:
    gauge: dict[str, int] = json.loads(await _ask(server, GAUGE))
    return gauge
