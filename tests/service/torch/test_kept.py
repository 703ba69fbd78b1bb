"""What the torch engine keeps: it changes what a score costs, never what it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from guard_service.engines.torch.engine import TorchEngine
from guard_service.prompt import Prompt
from tests.service.torch.conftest import opened
from tests.service.torch.prompts import OWN, picture, prompt, scores

NOISE = 1e-5
REPLY = "A cat sits on a wall and looks down at the harbour, where boats come and go"


@pytest.fixture
def looks(vision: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for each run of the vision tower."""
    counted: list[int] = []
    look = vision._decoder.look

    def counting(*arguments: Any) -> Any:
        counted.append(1)
        return look(*arguments)

    monkeypatch.setattr(vision._decoder, "look", counting)
    return counted


def whole(prompt: Prompt) -> int:
    """Tokens of a run that knows nothing."""
    return len(prompt.prefix) + len(prompt.body) + len(prompt.closing) + 3


def fresh(engine: TorchEngine, prompts: list[Prompt], folder: Path) -> Iterator[list[float]]:
    """Scores of each prompt by an engine that keeps nothing."""
    plain = opened(folder, prefix_cache=False, image_cache_bytes=0, session_bytes=0)
    for one in prompts:
        (found,) = plain.assess([one])
        assert (found.computed_tokens, found.cached_tokens) == (whole(one), 0)
        yield scores(found)


def test_prefix_of_text_is_computed_once(text: TorchEngine, text_folder: Path) -> None:
    prompts = [prompt(text, *turns) for turns in (("hi",), ("a longer question",), ("hello",))]
    found = text.assess(prompts)
    assert [one.cached_tokens for one in found] == [0, *[len(prompts[0].prefix)] * 2]
    assert [one.computed_tokens for one in found] == [
        whole(prompts[0]),
        *(whole(one) - len(one.prefix) for one in prompts[1:]),
    ]
    for one, expected in zip(found, fresh(text, prompts, text_folder), strict=True):
        assert scores(one) == pytest.approx(expected, abs=NOISE)


def test_an_image_is_looked_at_once_whatever_the_policy_and_the_text(
    vision: TorchEngine, vision_folder: Path, looks: list[int]
) -> None:
    seen = picture(1)
    prompts = [
        prompt(vision, "What is this?", shown=seen),
        prompt(vision, "What is this, then?", shown=seen),
        prompt(vision, "What is this?", shown=seen, categories=OWN),
        prompt(vision, "What is this?", "A cat.", shown=seen),
    ]
    found = [vision.assess([one])[0] for one in prompts]
    behind_image = prompts[0].prefix.index(128256) + 1
    assert [one.cached_tokens for one in found] == [
        0,
        len(prompts[1].prefix),
        behind_image,
        behind_image,
    ]
    assert len(looks) == 1
    for one, expected in zip(found, fresh(vision, prompts, vision_folder), strict=True):
        assert scores(one) == pytest.approx(expected, abs=NOISE)
    vision.assess([prompt(vision, "What is this?", shown=picture(2))])
    assert len(looks) == 2


@pytest.mark.parametrize("shown", [None, picture(3, 28, 50)], ids=["text", "image"])
def test_growing_conversation_computes_only_what_is_new(
    vision: TorchEngine, vision_folder: Path, looks: list[int], shown: Any
) -> None:
    session = vision.session()
    ends = [8, 24, 25, len(REPLY)]
    prompts = [prompt(vision, "What?", REPLY[:end], shown=shown) for end in ends]
    found = []
    for at, step in enumerate(prompts):
        held = session.held(step)
        (assessed,) = session.assess([step])
        found.append(assessed)
        if at:
            new = len(step.body) - held + len(step.closing) + 3
            assert held > 0 and assessed.computed_tokens == new
            assert assessed.cached_tokens == len(step.prefix) + held
    assert len(looks) == (shown is not None)
    for one, expected in zip(found, fresh(vision, prompts, vision_folder), strict=True):
        assert scores(one) == pytest.approx(expected, abs=NOISE)
    assert vision.session_bytes > 0
    session.close()
    assert vision.session_bytes == 0


def test_conversation_that_goes_on_with_another_image_shares_nothing_behind_it(
    vision: TorchEngine, vision_folder: Path
) -> None:
    session = vision.session()
    one, other = (prompt(vision, "What is this?", shown=picture(seed)) for seed in (1, 2))
    session.assess([one])
    assert session.held(one) == len(one.body) and session.held(other) == 0
    (found,) = session.assess([other])
    (expected,) = fresh(vision, [other], vision_folder)
    assert scores(found) == pytest.approx(expected, abs=NOISE)


@pytest.mark.parametrize("room", [0, 20_000, 80_000])
def test_little_room_costs_runs_and_changes_no_score(vision_folder: Path, room: int) -> None:
    small = opened(vision_folder, image_cache_bytes=room)
    prompts = [prompt(small, "What?", shown=picture(seed)) for seed in (1, 2, 1)]
    session = small.session()
    found = [*small.assess(prompts), *session.assess(prompts)]
    assert small._images.size <= room
    expected = [*fresh(small, prompts, vision_folder)]
    for one, scored in zip(found, expected * 2, strict=True):
        assert scores(one) == pytest.approx(scored, abs=NOISE)


def test_memory_that_runs_out_halves_the_batch(
    text: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [prompt(text, f"question {number}") for number in range(7)]
    expected = [scores(one) for one in text.assess(prompts)]
    run: Callable[..., Any] = text._decoder.run
    sizes: list[int] = []

    def small(rows: list[list[int]], *others: Any) -> Any:
        sizes.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError
        return run(rows, *others)

    monkeypatch.setattr(text._decoder, "run", small)
    found = [scores(one) for one in text.assess(prompts)]
    assert found == [pytest.approx(one, abs=NOISE) for one in expected]
    assert max(sizes) > 2 and sizes.count(1) < len(prompts)
