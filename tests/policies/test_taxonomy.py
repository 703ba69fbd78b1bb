"""The taxonomy says what Llama Guard 3 was trained on."""

import json
from pathlib import Path

import pytest

from guard_policies.taxonomy import BY_CODE, LLAMA_GUARD_3

REFERENCE = Path(__file__).parents[3] / "shared" / "reference" / "taxonomy.json"


def test_codes_are_s1_to_s14_in_order() -> None:
    assert [one.code for one in LLAMA_GUARD_3] == [f"S{n}" for n in range(1, 15)]


def test_prompts_word_three_categories_otherwise_than_cards() -> None:
    differing = {one.code: (one.name, one.prompt_name) for one in LLAMA_GUARD_3}
    assert {code: names for code, names in differing.items() if names[0] != names[1]} == {
        "S3": ("Sex-Related Crimes", "Sex Crimes"),
        "S4": ("Child Sexual Exploitation", "Child Exploitation"),
        "S11": ("Suicide & Self-Harm", "Self-Harm"),
    }


def test_every_category_is_described() -> None:
    assert all(one.description.endswith(".") and one.prompt_name for one in LLAMA_GUARD_3)


@pytest.mark.skipif(not REFERENCE.exists(), reason="reference data is not here")
def test_names_are_those_of_the_model_cards() -> None:
    reference = json.loads(REFERENCE.read_text())["categories"]
    assert [(one["code"], one["card_name"], one["prompt_name"]) for one in reference] == [
        (one.code, one.name, one.prompt_name) for one in BY_CODE.values()
    ]
