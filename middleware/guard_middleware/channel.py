"""How clients reach the guard: channel options and TLS."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio

# A guard's answers are small; a batch of a thousand verdicts is about 2 MB.
MAX_REPLY_BYTES = 64 * 2**20

OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.max_receive_message_length", MAX_REPLY_BYTES),
    ("grpc.max_send_message_length", -1),  # the server's limit counts
    # gRPC's own pauses between connection attempts (1 s and growing) would outlast our deadlines.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 10_000),
)


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
    """A blocking channel."""
    if tls is None:
        return grpc.insecure_channel(target, options=OPTIONS)
    return grpc.secure_channel(target, tls.credentials(), options=_with_name(tls))


def open_aio_channel(target: str, tls: TLS | None) -> grpc.aio.Channel:
    """An asyncio channel, for the running loop."""
    if tls is None:
        return grpc.aio.insecure_channel(target, options=OPTIONS)
    return grpc.aio.secure_channel(target, tls.credentials(), options=_with_name(tls))


def _with_name(tls: TLS) -> tuple[tuple[str, int | str], ...]:
    if not tls.server_name:
        return OPTIONS
    return (*OPTIONS, ("grpc.ssl_target_name_override", tls.server_name))


def _pem(source: bytes | Path | None) -> bytes | None:
    return source.read_bytes() if isinstance(source, Path) else source
