"""A guard that has learnt what is drawn, broken on purpose: what its images do is noticed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from guard_service.conversation import Picture
from guard_service.engines.torch.engine import TorchEngine
from guard_service.prompt import Prompt
from tests.service.torch.conftest import opened
from tests.service.torch.prompts import prompt
from tests.vision_guard.drawings import CIRCLE, SQUARE
from tests.vision_guard.examples import LOOK, Examples

pytestmark = pytest.mark.slow


@pytest.fixture
def engine(learnt_folder: Path) -> Iterator[TorchEngine]:
    """An engine that has seen nothing yet."""
    made = opened(learnt_folder, threads=1)
    yield made
    made.close()


def asked(engine: TorchEngine, examples: Examples, one_digest: bool = False) -> list[Prompt]:
    """Squares and circles by turns."""
    pairs = zip(examples.of(SQUARE, 4), examples.of(CIRCLE, 4), strict=True)
    return [
        prompt(engine, LOOK, shown=Picture("" if one_digest else str(at), np.asarray(picture)))
        for at, picture in enumerate(picture for pair in pairs for picture in pair)
    ]


def blocked(engine: TorchEngine, prompts: list[Prompt]) -> list[bool]:
    return [one.assessment.unsafe_score > 0.5 for one in engine.assess(prompts)]


def test_alone_in_company_first_and_again_each_image_is_judged_by_itself(
    engine: TorchEngine, examples: Examples
) -> None:
    prompts = asked(engine, examples)
    wanted = [True, False] * 4
    assert blocked(engine, prompts) == wanted
    assert blocked(engine, prompts[::-1]) == wanted[::-1]  # now each image is known
    assert [blocked(engine, [one])[0] for one in prompts] == wanted


def test_images_that_share_a_key_of_the_cache_are_taken_for_each_other(
    engine: TorchEngine, examples: Examples
) -> None:
    """So a key that does not tell images apart cannot pass the test above."""
    assert blocked(engine, asked(engine, examples, one_digest=True)) == [True] * 8


def test_with_its_gates_to_the_image_shut_nothing_is_told_apart(
    engine: TorchEngine, examples: Examples
) -> None:
    """So what is told apart above is told by what text sees of the image, and by nothing else."""
    text = engine._decoder._base.language_model
    with torch.inference_mode():
        for at in text.cross_attention_layers:
            text.layers[at].cross_attn_attn_gate.zero_()
            text.layers[at].cross_attn_mlp_gate.zero_()
    found = engine.assess(asked(engine, examples))
    scores = [one.assessment.unsafe_score for one in found]
    assert scores == pytest.approx([scores[0]] * 8, abs=1e-6)
