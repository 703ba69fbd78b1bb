"""How the tiny vision guard is trained: by its seed alone, on what the engine reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.vision_guard.learning import Stage, train

pytestmark = pytest.mark.slow


def test_the_same_seed_trains_the_same_weights(tmp_path: Path) -> None:
    stages = Stage(True, 100, 3, 3e-3), Stage(False, 100, 1, 1e-3)
    for name in ("one", "other"):
        train(tmp_path / name, stages)
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "other"))
    assert one == other
