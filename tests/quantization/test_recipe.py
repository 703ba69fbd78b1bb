"""Recipes: the committed one loads, and mistakes are named."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from guard_quantization.recipe import RecipeError, load_recipe, load_starter_recipe, shares

STARTER = Path(__file__).parents[2] / "quantization" / "recipes" / "starter.yaml"


def test_the_starter_recipe_loads_and_fits_its_size() -> None:
    recipe = load_starter_recipe(STARTER)
    shape = recipe.student.llama(recipe.tokenizer.size)
    assert shape.num_attention_heads * shape.head_dim == shape.hidden_size
    assert all(share.rows > 0 for epoch in recipe.student.epochs for share in shares(epoch))


@pytest.mark.parametrize(
    ("section", "field", "value", "told"),
    [
        ("student", "tokens", "many", r"student\.tokens"),
        ("student", "sauce", 1, "unknown field 'sauce'"),
        ("export", "bits", True, r"export\.bits"),
        ("student", "epochs", {}, "must be a list"),
        ("student", "shape", {"width": 3}, "width"),
    ],
)
def test_a_mistake_is_named(
    tmp_path: Path, section: str, field: str, value: object, told: str
) -> None:
    document = yaml.safe_load(STARTER.read_text())
    document[section][field] = value
    path = tmp_path / "broken.yaml"
    path.write_text(yaml.safe_dump(document))
    with pytest.raises(RecipeError, match=told):
        load_recipe(path)


def test_the_digest_depends_on_the_sections_asked_for() -> None:
    recipe = load_starter_recipe(STARTER)
    assert recipe.digest("teacher") == load_starter_recipe(STARTER).digest("teacher")
    assert recipe.digest("teacher") != recipe.digest("student")
