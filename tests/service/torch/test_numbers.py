"""Weights in fewer bits, and scores in bfloat16: near those of the checkpoint as it is stored."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from guard_service.engines import EngineFailed
from guard_service.engines.torch.engine import TorchEngine
from tests.service.torch.checkpoints import saved, tiny_llama, tiny_mllama
from tests.service.torch.conftest import opened
from tests.service.torch.prompts import picture, prompt

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)

WIDE = {"hidden_size": 64, "intermediate_size": 128}  # 4 bits come in blocks of 64


@pytest.fixture
def loosely() -> Iterator[None]:
    """Without what bitsandbytes warns of on a CPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def margins(engine: TorchEngine) -> list[float]:
    """logit P(unsafe) of some prompts."""
    prompts = [prompt(engine, f"question {number}") for number in range(4)]
    if engine.card.judges_images:
        prompts += [prompt(engine, "What is this?", shown=picture(seed)) for seed in range(4)]
    found = [assessed.assessment.unsafe_score for assessed in engine.assess(prompts)]
    return [math.log(score / (1 - score)) for score in found]


def apart(some: list[float], others: list[float]) -> float:
    """Mean distance."""
    return sum(abs(a - b) for a, b in zip(some, others, strict=True)) / len(some)


def calm(model: Any) -> Any:
    """The model with smaller matrices in its layers, as trained ones have: errors do not grow."""
    for name, weight in model.named_parameters():
        if weight.dim() > 1 and "layers." in name:
            weight.data.mul_(0.4)
    return model


@needs_bitsandbytes
@pytest.mark.usefixtures("loosely")
@pytest.mark.parametrize("make", [tiny_llama, tiny_mllama])
def test_fewer_bits_are_near_and_8_nearer_than_4(make: Callable[..., Any], tmp_path: Path) -> None:
    folder = saved(calm(make(**WIDE)), tmp_path / "wide")
    stored = margins(opened(folder))
    engines = {bits: opened(folder, weights=bits) for bits in ("int8", "int4")}
    away = {bits: apart(stored, margins(engine)) for bits, engine in engines.items()}
    assert 0 < away["int8"] < 0.25 and away["int8"] < away["int4"] < 1.0
    for bits, engine in engines.items():
        assert engine.card.plan == bits
        engine.self_test()


@pytest.mark.parametrize("kind", ["text", "vision"])
def test_bfloat16_is_near_float32(kind: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(f"{kind}_folder")
    half = opened(folder, dtype="bfloat16")
    assert half.card.plan == "bfloat16"
    assert 0 < apart(margins(opened(folder)), margins(half)) < 0.5
    half.self_test()


def test_library_that_is_missing_is_named(
    text_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "transformers.quantizers.quantizer_bnb_8bit.Bnb8BitHfQuantizer.validate_environment",
        _missing,
    )
    with pytest.raises(EngineFailed, match="bitsandbytes"):
        opened(text_folder, weights="int8")


def _missing(*_: object, **__: object) -> None:
    raise ImportError("no bitsandbytes here")
