"""Folders of tiny checkpoints, written once, and engines on them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from guard_service.engines import open_engine
from guard_service.engines.torch.engine import TorchEngine
from tests.service.torch.checkpoints import saved, tiny_llama, tiny_mllama


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of four layers, in shards."""
    return saved(tiny_llama(), tmp_path_factory.mktemp("checkpoints") / "tiny-text")


@pytest.fixture(scope="session")
def vision_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An Mllama of four layers, in shards."""
    return saved(tiny_mllama(), tmp_path_factory.mktemp("checkpoints") / "tiny-vision")


def opened(folder: Path, **options: object) -> TorchEngine:
    """The torch engine on a folder."""
    engine = open_engine(folder, **options)  # type: ignore[arg-type]
    assert isinstance(engine, TorchEngine)
    return engine


@pytest.fixture
def text(text_folder: Path) -> Iterator[TorchEngine]:
    """An engine that has seen nothing yet."""
    engine = opened(text_folder)
    yield engine
    engine.close()


@pytest.fixture
def vision(vision_folder: Path) -> Iterator[TorchEngine]:
    """An engine that has seen nothing yet."""
    engine = opened(vision_folder)
    yield engine
    engine.close()
