"""A guard in this process: the one module here that knows the service."""

from __future__ import annotations

from contextlib import AbstractContextManager

from guard_service.config import MIB, Settings
from guard_service.server import local_server

MESSAGE_BYTES = 64 * MIB  # images; nothing crosses a network


def served(model: str) -> AbstractContextManager[str]:
    """A guard in a thread, on a private socket; entering yields its target."""
    return local_server(Settings(model=model, max_message_bytes=MESSAGE_BYTES))
