"""Servers for the service's tests: the real one, and a fake one for what asks a guard."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

from guard_policies.loader import parse_policy
from guard_service.config import Settings
from guard_service.engines import Engine
from guard_service.engines.fake import FakeEngine
from guard_service.live.models import Open
from guard_service.live.policies import loaded_policies
from guard_service.server import GuardServer
from guard_service.tracing import Traces
from tests.middleware.fake_service import FakeService, serving, socket_in
from tests.service.asking import Running

RunGuard = Callable[..., Awaitable[Running]]


@pytest.fixture
async def run_guard(tmp_path: Path) -> AsyncIterator[RunGuard]:
    """Starts servers on unix sockets: `await run_guard(engine, policies=[yaml, ...], knob=value)`.

    It reloads the policies of `folders`, and models by `open_model`. They stop when the test ends.
    """
    async with AsyncExitStack() as stack:

        async def run(
            engine: Engine | None = None,
            policies: tuple[str, ...] = (),
            second: Engine | None = None,
            traces: Traces | None = None,
            folders: tuple[Path, ...] = (),
            open_model: Open | None = None,
            **knobs: Any,
        ) -> Running:
            engine = engine or FakeEngine()
            private: dict[str, Any] = {"host": f"unix:{tmp_path / 'socket'}", "metrics": False}
            settings = Settings(**(private | knobs), policies=folders)
            own = {policy.name: policy for policy in map(parse_policy, policies)}
            server = GuardServer(
                settings, engine, {**loaded_policies(settings), **own}, second, traces, open_model
            )
            await server.start()
            stack.push_async_callback(server.stop, 0.0)
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(server.address))
            return Running(server, engine, channel)

        yield run


@pytest.fixture
async def guard(run_guard: RunGuard) -> Running:
    """A server as it comes, with the fake engine."""
    return await run_guard()


@pytest.fixture
def service() -> FakeService:
    """The guard behind `server`; a module that wants other answers has a fixture of its own."""
    return FakeService()


@pytest.fixture
def server(service: FakeService, tmp_path: Path) -> Iterator[list[str]]:
    """Options of guardctl that name a running guard."""
    with serving(service, socket_in(tmp_path)) as target:
        yield ["--server", target]
