"""The tiny vision guard: trained once, kept in pytest's cache, served; drawings it is sure of."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from guard_api.v1 import guard_pb2_grpc
from guard_service.config import Settings
from guard_service.local import local_server
from tests.vision_guard.examples import Examples
from tests.vision_guard.learning import fingerprint, train


@pytest.fixture(scope="session")
def learnt_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that has learnt; a later run finds it while nothing it learnt from changes."""
    cache = getattr(request.config, "cache", None)  # None without pytest's plugin for it
    kept = cache.mkdir("vision-guard") if cache else tmp_path_factory.mktemp("kept")
    place: Path = kept / fingerprint()
    if not place.exists():
        draft = tmp_path_factory.mktemp("learning") / "tiny-vision-guard"
        train(draft)
        draft.rename(place)
    return place


@pytest.fixture(scope="session")
def target(learnt_folder: Path) -> Iterator[str]:
    """The gRPC target of a server with that guard."""
    with local_server(Settings(model=str(learnt_folder), threads=1)) as address:
        yield address


@pytest.fixture
async def stub(target: str) -> AsyncIterator[Any]:
    """A client of it."""
    async with grpc.aio.insecure_channel(target) as channel:
        yield guard_pb2_grpc.GuardServiceStub(channel)


@pytest.fixture(scope="session")
def examples(learnt_folder: Path) -> Examples:
    """Drawings that transformers itself judges right with that checkpoint."""
    return Examples(learnt_folder)
