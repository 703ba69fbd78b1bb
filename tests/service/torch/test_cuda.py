"""The torch engine on a GPU: the scores of the CPU, and memory that really runs out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from guard_service.engines import EngineOverloaded
from tests.service.torch.conftest import opened
from tests.service.torch.prompts import picture, prompt, scores

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]


@pytest.mark.parametrize(("dtype", "noise"), [("float32", 1e-3), ("bfloat16", 0.1)])
def test_scores_on_a_gpu_are_near_those_of_the_cpu(
    vision_folder: Path, dtype: str, noise: float
) -> None:
    here, there = opened(vision_folder), opened(vision_folder, device="cuda", dtype=dtype)
    prompts = [prompt(here, f"question {number}") for number in range(5)]
    prompts += [prompt(here, "What is this?", shown=picture(seed)) for seed in (1, 2, 1)]
    for _ in range(2):  # the second time from what is kept
        pairs = zip(here.assess(prompts), there.assess(prompts), strict=True)
        assert all(scores(a) == pytest.approx(scores(b), abs=noise) for a, b in pairs)
    there.self_test()


def test_memory_that_runs_out_is_an_answer_and_comes_back(text_folder: Path) -> None:
    engine = opened(text_folder, device="cuda")
    one = prompt(engine, "hi")
    expected = scores(engine.assess([one])[0])
    torch.cuda.set_per_process_memory_fraction(1e-9)
    try:
        torch.cuda.empty_cache()
        with pytest.raises(EngineOverloaded):
            engine.assess([prompt(engine, "a long question " * 60)])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert scores(engine.assess([one])[0]) == pytest.approx(expected, abs=1e-3)
