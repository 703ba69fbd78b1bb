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
        ("student", "sauce", 1, "student has no key 'sauce'"),
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


def write(path: Path, **document: object) -> Path:
    path.write_text(yaml.safe_dump(document))
    return path


def test_a_recipe_says_only_how_it_differs_from_its_base(tmp_path: Path) -> None:
    (tmp_path / "starter.yaml").write_text(STARTER.read_text())
    changed = {"shape": {"num_hidden_layers": 8}, "lr": 0.5, "epochs": [{"responses": [3, 1.0]}]}
    path = write(tmp_path / "more.yaml", base="starter.yaml", name="more", student=changed)
    recipe, base = load_starter_recipe(path), load_starter_recipe(STARTER)
    shape = recipe.student.llama(recipe.tokenizer.size)
    assert shape.num_hidden_layers == 8 and shape.hidden_size == base.student.shape["hidden_size"]
    (only,) = recipe.student.epochs
    assert [*only] == ["responses"] and [*only["responses"]] == [3, 1.0]
    assert recipe.student.lr == 0.5
    assert (recipe.teacher, recipe.name) == (base.teacher, "more")


@pytest.mark.parametrize(
    ("base", "name", "told"),
    [
        ("../starter.yaml", "more", "same folder"),
        ([3], "more", "same folder"),
        ("starter.yaml", "starter", "another name"),
        ("more.yaml", "other", "without a base"),
        ("nowhere.yaml", "more", "nowhere"),
    ],
)
def test_a_base_is_a_whole_recipe_beside_it(
    tmp_path: Path, base: object, name: str, told: str
) -> None:
    (tmp_path / "starter.yaml").write_text(STARTER.read_text())
    write(tmp_path / "more.yaml", base="starter.yaml", name="more")
    with pytest.raises(RecipeError, match=told):
        load_recipe(write(tmp_path / "broken.yaml", base=base, name=name))


@pytest.mark.parametrize("path", sorted(STARTER.parent.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_committed_recipe_loads_under_its_own_name(path: Path) -> None:
    others = [load_recipe(other).name for other in STARTER.parent.glob("*.yaml") if other != path]
    assert load_recipe(path).name not in others
