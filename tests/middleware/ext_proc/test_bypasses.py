"""The conformance set's attempts through a real Envoy: each is judged and blocked, or refused.

Requests that two servers might read differently are Envoy's to refuse; what comes behind it is held
to the same record of bytes as behind the sidecar.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import pytest

from guard_middleware.conformance.cases import Case, basics
from guard_middleware.conformance.requests import PROTOCOLS
from guard_middleware.conformance.run import Outcome, read
from guard_middleware.loop_thread import LOOP
from guard_middleware.testing import FakeGuard, forbids
from tests.middleware.asgi_calls import Backend
from tests.middleware.ext_proc.real_envoy import (
    DUPLEX,
    Setup,
    Stage,
    modes,
    needs_envoy,
    stage,
)
from tests.middleware.test_bypasses import ATTEMPTS, PLACE, Lenient, closed
from tests.middleware.wrapped import BAD

pytestmark = needs_envoy


class Recorded:
    """A stage before a lenient backend, which is another for each attempt."""

    def __init__(self) -> None:
        self.lenient = Lenient()
        self.stack = AsyncExitStack()
        self.running: Stage

    async def open(self, folder: Path) -> None:
        server = await asyncio.start_server(self.talk, "127.0.0.1", 0)
        await self.stack.enter_async_context(server)
        host, port = server.sockets[0].getsockname()
        setup = Setup(modes(DUPLEX), backend=f"http://{host}:{port}", lingers="0.1s")
        self.running = await self.stack.enter_async_context(stage(setup, folder, Backend([])))

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self.lenient.talk(reader, writer)

    async def tried(self, case: Case) -> Outcome:
        """What becomes of a case."""
        self.lenient = Lenient()
        self.running.guard = FakeGuard(forbids(BAD))
        clients = str(self.running.folder / "clients")
        reader, writer = await asyncio.open_unix_connection(clients)
        answer = b""
        with suppress(ConnectionError):
            writer.write(case.request)
            async with asyncio.timeout(60):
                await writer.drain()
                answer = await reader.read()
        await closed(writer)
        return read(answer, case.spare)[0]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    made = Recorded()
    LOOP.wait(made.open(tmp_path_factory.mktemp("envoy")))
    yield made
    LOOP.wait(made.stack.aclose())


@pytest.mark.parametrize("name", ATTEMPTS)
def test_attempt_is_judged_and_blocked_or_refused(recorded: Recorded, name: str) -> None:
    outcome = LOOP.wait(recorded.tried(ATTEMPTS[name]))
    assert outcome in (Outcome.BLOCKED, Outcome.REFUSED)
    for seen in recorded.lenient.read():
        assert BAD.encode() not in seen


def test_harmless_request_would_be_served(recorded: Recorded) -> None:
    harmless = next(basics(PLACE, PROTOCOLS[0], BAD))
    assert LOOP.wait(recorded.tried(harmless)) is Outcome.ANSWERED
    assert b"Portugal" in recorded.lenient.sent
