"""A guard service that answers by a script, for the tests of the clients."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.middleware.fake_service import FakeService, serving, socket_in


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
def target(service: FakeService, tmp_path: Path) -> Iterator[str]:
    with serving(service, socket_in(tmp_path)) as target:
        yield target
