"""A server in a thread of this process, for guardctl, for middleware without a guard, for tests."""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from guard_service.config import Settings
from guard_service.hosted import engines_of
from guard_service.live.policies import loaded_policies
from guard_service.server import GuardServer
from guard_service.tracing import Traces

JOIN_S = 5.0


@contextmanager
def local_server(settings: Settings, traces: Traces | None = None) -> Iterator[str]:
    """A server for this process alone, which needs no credentials; yields the gRPC target."""
    with private_server(replace(settings, auth=None), traces) as target:
        yield target


@contextmanager
def private_server(settings: Settings, traces: Traces | None = None) -> Iterator[str]:
    """A server on a private unix socket, in a thread of this process; yields the gRPC target."""
    with tempfile.TemporaryDirectory(prefix="guard-") as folder:  # readable by this user only
        private = replace(
            settings,
            host=f"unix:{Path(folder) / 'socket'}",
            metrics=False,
            tls_cert=None,
            tls_key=None,
            tls_client_ca=None,
        )
        with engines_of(private) as (engine, second):
            server = GuardServer(private, engine, loaded_policies(private), second, traces)
            with _in_thread(server):
                yield server.address


@contextmanager
def _in_thread(server: GuardServer) -> Iterator[None]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="guard-server", daemon=True)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(server.start(), loop).result()
        try:
            yield
        finally:
            asyncio.run_coroutine_threadsafe(server.stop(JOIN_S), loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(JOIN_S)
        loop.close()
