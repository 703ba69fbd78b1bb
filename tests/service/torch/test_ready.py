"""The self-test of the torch engine finds what a checkpoint's files cannot show."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from guard_service.conversation import Image
from guard_service.engines import EngineFailed
from guard_service.engines.torch.engine import TorchEngine
from guard_service.parse import parse_answer
from tests.service.torch.prompts import picture, prompt


def test_sound_model_passes_and_is_warm_for_text_and_images(vision: TorchEngine) -> None:
    vision.self_test()
    (found,) = vision.assess([prompt(vision, "hi")])
    assert found.cached_tokens > 0


@pytest.mark.parametrize("how", ["nan", "drift"])
def test_scores_that_are_no_numbers_or_change_are_found(
    text: TorchEngine, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    logits = text._decoder.logits
    runs: list[int] = []

    def ill(hidden: Any, head: Any) -> Any:
        runs.append(1)
        found = logits(hidden, head)
        return found * torch.nan if how == "nan" else found + len(runs) * torch.randn_like(found)

    torch.manual_seed(0)
    monkeypatch.setattr(text._decoder, "logits", ill)
    with pytest.raises(EngineFailed, match="not finite" if how == "nan" else "differently"):
        text.self_test()


def test_image_that_was_not_decoded_is_not_judged(vision: TorchEngine) -> None:
    shown = prompt(vision, "hi", shown=picture(1))
    with pytest.raises(EngineFailed, match="not decoded"):
        vision.assess([replace(shown, image=Image(data=b"..."))])


def test_words_of_a_verdict_are_read_by_the_parser(
    text: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that writes a verdict, token by token, and ends its turn."""
    tokenizer = text._reading.tokenizer
    tokens = tokenizer.encode("unsafe\nS1,S10").ids + [tokenizer.token_to_id("<|eot_id|>")]
    rows = iter(tokens)

    def writes(hidden: Any) -> Any:
        return torch.nn.functional.one_hot(torch.tensor(next(rows)), 1000).float()

    monkeypatch.setattr(text._decoder, "all_logits", writes)
    answer = parse_answer(text.words(prompt(text, "hi")), text.card.categories)
    assert answer.unsafe and answer.codes == ("S1", "S10")
    assert next(rows, None) is None


def test_tokens_that_the_model_does_not_have_fail(text: TorchEngine) -> None:
    one = prompt(text, "hi")
    with pytest.raises(EngineFailed, match="torch"):
        text.assess([replace(one, body=(10**6,))])
    (found,) = text.assess([one])
    assert 0 < found.assessment.unsafe_score < 1
