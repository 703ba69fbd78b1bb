"""Fixtures for all tests."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from guard_service.config import Settings
from guard_service.local import local_server


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is kept in, or read from, the user's own cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    """The root logger is left as it was: commands that run in this process set it up."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


@pytest.fixture(scope="session")
def fake_guard() -> Iterator[str]:
    """The gRPC target of a running guard with the fake engine."""
    with local_server(Settings(model="fake")) as target:
        yield target
