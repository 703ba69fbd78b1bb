"""How clients reach the guard: channel options, TLS, and calls spread over several servers."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio

from guard_middleware.targets import check_reachable, check_target, is_balanced

# A guard's answers are small; a batch of a thousand verdicts is about 2 MB.
MAX_REPLY_BYTES = 64 * 2**20

OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.max_receive_message_length", MAX_REPLY_BYTES),
    ("grpc.max_send_message_length", -1),  # the server's limit counts
    # gRPC's own pauses between connection attempts (1 s and growing) would outlast our deadlines.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
    # A server that takes the connection and does not greet is tried anew after so long.
    ("grpc.min_reconnect_backoff_ms", 5000),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.service_config_disable_resolution", 1),  # who answers for a name does not set our terms
)

# A server whose calls all fail, which is what a hanging one looks like, is left out for a while
# (gRFC A50); never more than half of them, so that no caller's content can shut the way for others.
# One that is overloaded answers some, and stays.
_ALL_FAIL = {"threshold": 99, "enforcementPercentage": 100, "minimumHosts": 2, "requestVolume": 5}


def balanced(watch_s: float = 5.0, leave_out_s: float = 10.0) -> tuple[tuple[str, int | str], ...]:
    """Options that spread calls, in turn, over the servers which say that they serve.

    What calls end with is looked at every `watch_s`; a server is left out for `leave_out_s` the
    first time, longer when it fails again, for a minute at most.
    """
    spread = {
        "interval": f"{watch_s}s",
        "baseEjectionTime": f"{leave_out_s}s",
        "maxEjectionTime": f"{max(60.0, leave_out_s)}s",
        "maxEjectionPercent": 50,
        "failurePercentageEjection": _ALL_FAIL,
        "childPolicy": [{"round_robin": {}}],
    }
    config = {
        # The second is for a gRPC that does not know the first.
        "loadBalancingConfig": [{"outlier_detection_experimental": spread}, {"round_robin": {}}],
        "healthCheckConfig": {"serviceName": "guard_api.v1.GuardService"},
    }
    return (
        ("grpc.service_config", json.dumps(config)),
        # So soon are new servers of a name found; gRPC's own is 30 s.
        ("grpc.dns_min_time_between_resolutions_ms", 5000),
    )


BALANCED = balanced()


@dataclass(frozen=True, slots=True)
class TLS:
    """PEM data for a TLS channel, as bytes or as paths.

    Without `roots` the system's are used; `certificate` and `key` are for servers that ask clients
    for theirs; `server_name` is the name in the server's certificate where it differs from the
    address.
    """

    roots: bytes | Path | None = None
    certificate: bytes | Path | None = None
    key: bytes | Path | None = None
    server_name: str = ""

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("a client certificate needs its key, and a key its certificate")

    def credentials(self) -> grpc.ChannelCredentials:
        """Credentials from the PEM data; raises OSError for a path that cannot be read."""
        return grpc.ssl_channel_credentials(
            _pem(self.roots), _pem(self.key), _pem(self.certificate)
        )


def open_channel(target: str, tls: TLS | None) -> grpc.Channel:
    """A blocking channel. Raises ValueError for what is no target, OSError for a TLS file."""
    options = _options(target, tls)
    if tls is None:
        return grpc.insecure_channel(target, options=options)
    return grpc.secure_channel(target, tls.credentials(), options=options)


def open_aio_channel(target: str, tls: TLS | None) -> grpc.aio.Channel:
    """An asyncio channel, for the running loop; raises as `open_channel`."""
    options = _options(target, tls)
    if tls is None:
        return grpc.aio.insecure_channel(target, options=options)
    return grpc.aio.secure_channel(target, tls.credentials(), options=options)


def _options(target: str, tls: TLS | None) -> tuple[tuple[str, int | str], ...]:
    check_target(target)
    check_reachable(target, os.environ)
    options = (*OPTIONS, *BALANCED) if is_balanced(target) else OPTIONS
    if tls is None or not tls.server_name:
        return options
    return (*options, ("grpc.ssl_target_name_override", tls.server_name))


def _pem(source: bytes | Path | None) -> bytes | None:
    return source.read_bytes() if isinstance(source, Path) else source
