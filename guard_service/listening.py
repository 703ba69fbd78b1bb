"""Where the server listens: its address, gRPC's bounds, and what is exposed there."""

from __future__ import annotations

import math
import socket
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import grpc

from guard_service.config import Settings

PENDING_CALLS = 65_536
METADATA_BYTES = 16 * 1024


def bound(
    server: grpc.aio.Server, settings: Settings, credentials: grpc.ServerCredentials | None
) -> str:
    """Bind the settings' address and return what clients connect to; raises OSError."""
    _check_free(settings)
    try:
        if credentials is None:
            port = server.add_insecure_port(settings.address)
        else:
            port = server.add_secure_port(settings.address, credentials)
    except RuntimeError:  # gRPC logs the reason and does not tell it
        raise OSError(f"cannot listen on {settings.address}: it cannot be bound") from None
    unix = settings.host.startswith("unix:")
    return settings.host if unix else replace(settings, port=port).address


def exposed(settings: Settings) -> Iterator[str]:
    """What others on the network could do to a service that listens beyond this machine."""
    host = settings.host
    if host.startswith(("unix:", "127.")) or host in ("::1", "localhost"):
        return
    if settings.tls_cert is None:
        yield f"{settings.address}: texts and tokens travel unencrypted; set tls_cert and tls_key"
    if settings.auth is None and settings.tls_client_ca is None:
        yield f"{settings.address}: anyone who reaches it may call; set auth, or tls_client_ca"


def options(settings: Settings) -> list[tuple[str, Any]]:
    """gRPC's, of a server: bounds of messages, calls and connections."""
    return [
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.so_reuseport", 0),  # a second server on the port must fail, not share it
        # Of one connection. What is over it clients hold back, or, where they do not know it yet,
        # gRPC refuses; neither tells them at once and with a reason that there is no room.
        ("grpc.max_concurrent_streams", max(PENDING_CALLS, 4 * settings.max_calls)),
        # Calls that have arrived and that Python has not looked at yet. Past these bounds (1,000,
        # 3,000 and 30 s by default) gRPC cancels calls, and their callers do not learn why.
        ("grpc.server.max_pending_requests", PENDING_CALLS),
        ("grpc.server.max_pending_requests_hard_limit", PENDING_CALLS),
        ("grpc.server_max_unrequested_time_in_server", math.ceil(settings.max_deadline_s)),
        # The soft and the hard limit: between them gRPC would refuse by chance.
        ("grpc.max_metadata_size", METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", METADATA_BYTES),
        ("grpc.max_allowed_incoming_connections", settings.max_connections),
        ("grpc.server_handshake_timeout_ms", 10_000),  # who connects and says nothing
        ("grpc.keepalive_time_ms", 60_000),  # finds dead peers
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),  # more pings are abuse
        ("grpc.http2.max_ping_strikes", 5),
        ("grpc.max_connection_idle_ms", 30 * 60_000),
        ("grpc.max_connection_age_ms", 30 * 60_000),  # lets load balancers spread anew
        ("grpc.max_connection_age_grace_ms", 5 * 60_000),
    ]


def _check_free(settings: Settings) -> None:
    """Raise OSError that says why an address cannot be had; gRPC's own error does not."""
    if settings.host.startswith("unix:"):
        return
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        socket.create_server((settings.host, settings.port), family=family).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(f"cannot listen on {settings.address}: {reason}") from None
