"""The torch engine scores and writes what transformers computes on the same inputs."""

from __future__ import annotations

from pathlib import Path

import pytest

from guard_service.engines.torch.engine import TorchEngine
from guard_service.prompt import Prompt
from tests.service.torch import reference
from tests.service.torch.prompts import OWN, SIZES, picture, prompt, scores

NOISE = 1e-5  # of float32 sums in another order


def asked(engine: TorchEngine) -> dict[str, Prompt]:
    """Prompts of many kinds."""
    found = {
        "short": prompt(engine, "hi"),
        "reply": prompt(engine, "Which bus goes to the harbour?", "Take the number 42."),
        "long": prompt(engine, "a long story about the harbour and its boats " * 5),
        "own": prompt(engine, "hi", categories=OWN),
    }
    if engine.card.judges_images:
        for at, (name, size) in enumerate(SIZES.items()):
            found[name] = prompt(engine, "What is this?", shown=picture(at, *size))
        found["reply to a picture"] = prompt(engine, "What?", "A cat.", shown=picture(9))
        found["picture, own"] = prompt(engine, "What?", shown=picture(9), categories=OWN)
    return found


@pytest.mark.parametrize("kind", ["text", "vision"])
def test_scores_are_those_of_a_whole_run_of_transformers(
    kind: str, request: pytest.FixtureRequest
) -> None:
    engine: TorchEngine = request.getfixturevalue(kind)
    model = reference.loaded(request.getfixturevalue(f"{kind}_folder"))
    prompts = asked(engine)
    together = engine.assess(list(prompts.values()))
    again = engine.assess(list(prompts.values()))
    for at, (name, one) in enumerate(prompts.items()):
        wanted = reference.expected(model, one)
        expected = [wanted.unsafe_score, *wanted.category_scores.values()]
        for found in (together[at], again[at], engine.assess([one])[0]):
            assert scores(found) == pytest.approx(expected, abs=NOISE), name
            assert tuple(found.assessment.category_scores) == one.categories
    unsafe = {round(found.assessment.unsafe_score, 4) for found in together}
    assert len(unsafe) == len(prompts), "the tiny model says the same of everything"


@pytest.mark.parametrize("kind", ["text", "vision"])
def test_words_are_those_that_generate_writes(kind: str, request: pytest.FixtureRequest) -> None:
    engine: TorchEngine = request.getfixturevalue(kind)
    model = reference.loaded(request.getfixturevalue(f"{kind}_folder"))
    said = set()
    for one in asked(engine).values():
        wanted = reference.written(model, one, most=6)
        assert engine.words(one, most=6) == wanted
        said.add(wanted)
    assert len(said) > 1, "the tiny model writes the same behind everything"


def test_a_picture_in_place_of_another_changes_the_scores(vision: TorchEngine) -> None:
    one, other = (prompt(vision, "What is this?", shown=picture(seed)) for seed in (1, 2))
    none = prompt(vision, "What is this?")
    found = [scores(assessed) for assessed in vision.assess([one, other, none])]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert found[a] != pytest.approx(found[b], abs=1e-3)


def test_folder_of_another_layer_count_has_the_template_of_the_8b(tmp_path: Path) -> None:
    from tests.service.torch.checkpoints import saved, tiny_llama
    from tests.service.torch.conftest import opened

    engine = opened(saved(tiny_llama(num_hidden_layers=32), tmp_path / "deep"))
    assert engine.card.template == "llama-guard-3-8b"
    assert engine.card.categories[-1] == "S14" and not engine.card.custom_categories
    one = prompt(engine, "hi")
    wanted = reference.expected(reference.loaded(tmp_path / "deep"), one)
    (found,) = engine.assess([one])
    assert found.assessment.unsafe_score == pytest.approx(wanted.unsafe_score, abs=NOISE)
    assert tuple(found.assessment.category_scores) == engine.card.categories
