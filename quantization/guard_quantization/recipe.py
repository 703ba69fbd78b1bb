"""Recipes: what is made from what and how, read from YAML and checked field by field.

Two kinds: one with a `student` trains a small guard from nothing (the starter); any other takes a
checkpoint through the stages it names. A recipe with a `base`, the name of a recipe beside it, says
only what differs: mappings are merged, everything else is replaced. A guard whose recipe has a
base begins as the base's, grown to its own shape.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from guard_quantization.checkpoint.distill import DistillPlan
from guard_quantization.checkpoint.prune import PrunePlan
from guard_quantization.checkpoint.quantize_plan import QuantizePlan
from guard_quantization.data import Share
from guard_quantization.evaluation.plan import EvaluatePlan
from guard_quantization.export.decoder import Precision
from guard_quantization.llama import LlamaShape


class RecipeError(ValueError):
    """The recipe is not one; the text names the file and the field."""


Epoch = Mapping[str, tuple[int, float]]  # file -> rows, loss weight


def shares(epoch: Epoch) -> list[Share]:
    """The mix of one epoch."""
    return [Share(file, int(rows), float(weight)) for file, (rows, weight) in epoch.items()]


@dataclass(frozen=True, slots=True)
class TokenizerPlan:
    """How many tokens the student's vocabulary has."""

    size: int


@dataclass(frozen=True, slots=True)
class TeacherPlan:
    """How the sentence encoder is fine-tuned."""

    lr: float
    most_tokens: int
    languages: tuple[str, ...]  # empty: all
    epochs: tuple[Epoch, ...]


@dataclass(frozen=True, slots=True)
class StudentPlan:
    """What the student looks like and how it is taught."""

    template: str
    window_tokens: int
    shape: Mapping[str, float]  # LlamaShape without vocab_size
    dropout: float
    lr: float
    embedding_lr: float
    tokens: int
    quantized_from: float
    trust: float  # share of the teacher's belief in a labelled row's target
    exchanged: int  # how many conversations with exchanged words there are to draw from
    languages: tuple[str, ...]
    epochs: tuple[Epoch, ...]

    def llama(self, vocab_size: int) -> LlamaShape:
        """The decoder's geometry."""
        return LlamaShape(vocab_size=vocab_size, **self.shape)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Recipe:
    """The whole way from data to an artifact."""

    name: str
    seed: int
    held_out: tuple[str, ...]
    tokenizer: TokenizerPlan
    teacher: TeacherPlan
    student: StudentPlan
    export: Precision
    base: Recipe | None = None  # whose student this one has grown from

    def digest(self, *sections: str) -> str:
        """Hash of what the named sections say, together with the seed and the held-out sources."""
        whole = asdict(self)
        chosen = {name: whole[name] for name in ("seed", "held_out", *sections)}
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Teaching:
    """What a checkpoint is taught with: rows of each epoch, and how."""

    plan: DistillPlan
    epochs: tuple[Epoch, ...]
    held: Epoch  # dev rows on which student and teacher are compared
    held_out: tuple[str, ...] = ()  # sources that nothing is trained on
    languages: tuple[str, ...] = ()  # empty: all


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRecipe:
    """A checkpoint's way to an artifact; stages that are left out are skipped."""

    name: str
    seed: int = 0
    template: str
    window_tokens: int = 512
    calibration: Epoch  # training rows that prune and quantize measure on
    prune: PrunePlan | None = None
    distill: Teaching | None = None
    quantize: QuantizePlan | None = None
    export: Precision
    evaluate: EvaluatePlan | None = None


def load_recipe(path: Path) -> Recipe | CheckpointRecipe:
    """Read a recipe. Raises RecipeError for unknown, missing and ill-typed fields."""
    document = _document(path)
    if not isinstance(document, dict) or "base" not in document:
        return _recipe(document, path)
    name = document.pop("base")
    if not isinstance(name, str) or Path(name).name != name:
        raise RecipeError(f"{path}: base must name a recipe in the same folder")
    below = _document(path.with_name(name))
    if not isinstance(below, dict) or "base" in below or below.get("name") == document.get("name"):
        raise RecipeError(f"{path}: base must be a recipe of another name, without a base")
    recipe, base = _recipe(_merged(below, document), path), _recipe(below, path.with_name(name))
    if isinstance(recipe, Recipe) and isinstance(base, Recipe):
        return replace(recipe, base=base)
    return recipe


def load_starter_recipe(path: Path) -> Recipe:
    """`load_recipe` where only a recipe with a student will do."""
    recipe = load_recipe(path)
    if not isinstance(recipe, Recipe):
        raise RecipeError(f"{path}: a recipe without a student")
    return recipe


def load_checkpoint_recipe(path: Path) -> CheckpointRecipe:
    """`load_recipe` where only a recipe that takes a checkpoint will do."""
    recipe = load_recipe(path)
    if not isinstance(recipe, CheckpointRecipe):
        raise RecipeError(f"{path}: a recipe with a student takes no checkpoint")
    return recipe


def _document(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: {error}") from error


def _merged(below: Any, above: Any) -> Any:
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    changed = {name: _merged(below[name], above[name]) for name in above if name in below}
    return {**below, **above, **changed}


def _recipe(document: Any, path: Path) -> Recipe | CheckpointRecipe:
    starter = isinstance(document, dict) and "student" in document
    try:
        recipe: Recipe | CheckpointRecipe = _made(
            Recipe if starter else CheckpointRecipe, document, "recipe"
        )
        for epoch in _epochs(recipe):
            shares(epoch)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{path}: {error}") from error
    return recipe


def _epochs(recipe: Recipe | CheckpointRecipe) -> list[Epoch]:
    if isinstance(recipe, Recipe):
        recipe.student.llama(1)
        return [*recipe.teacher.epochs, *recipe.student.epochs]
    taught, judged = recipe.distill, recipe.evaluate
    return [
        recipe.calibration,
        *((*taught.epochs, taught.held) if taught else ()),
        *((judged.rows,) if judged else ()),
    ]


def _made(kind: Any, value: Any, where: str) -> Any:
    if get_origin(kind) is UnionType:
        if value is None:
            return None
        (kind,) = (choice for choice in get_args(kind) if choice is not NoneType)
    if not (isinstance(kind, type) and is_dataclass(kind)):
        return _plain(kind, value, where)
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be a mapping")
    known = {field.name for field in fields(kind)}
    if unknown := sorted(set(value) - known):
        raise ValueError(
            f"{where}: unknown field {unknown[0]!r}; known: {', '.join(sorted(known))}"
        )
    hints: dict[str, Any] = get_type_hints(kind)
    made = {name: _made(hints[name], value[name], f"{where}.{name}") for name in value}
    make: Callable[..., Any] = kind
    return make(**made)


def _plain(kind: Any, value: Any, where: str) -> Any:
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} must be a list")
        return tuple(value)
    wanted = (int, float) if kind is float else get_origin(kind) or kind
    if wanted is Mapping:
        wanted = dict
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{where} must be {getattr(kind, '__name__', kind)}, not {value!r}")
    return value
