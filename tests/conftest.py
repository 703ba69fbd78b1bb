"""Fixtures for all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from guard_service.config import Settings
from guard_service.server import local_server


@pytest.fixture(scope="session")
def fake_guard() -> Iterator[str]:
    """The gRPC target of a running guard with the fake engine."""
    with local_server(Settings(model="fake")) as target:
        yield target
