"""Recipes: what is made from what and how, read from YAML and checked field by field.

Two kinds: one with a `student` trains a small guard from nothing (the starter); any other takes a
checkpoint through the stages it names. A recipe with a `base`, the name of a recipe beside it, says
only what differs: mappings are merged, everything else is replaced.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from yaml.nodes import MappingNode, Node, ScalarNode

from guard_policies.positions import PolicyError, Reader
from guard_quantization.checkpoint.distill import DistillPlan
from guard_quantization.checkpoint.prune import PrunePlan
from guard_quantization.checkpoint.quantize_plan import QuantizePlan
from guard_quantization.data import Share
from guard_quantization.evaluation.plan import EvaluatePlan
from guard_quantization.export.decoder import Precision
from guard_quantization.llama import LlamaShape
from guard_quantization.reading import composed, made
from guard_service.templates import BY_NAME

_BASE = "base"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class RecipeError(ValueError):
    """The recipe is not one; the text has every mistake with file, line, column and field."""


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

    def __post_init__(self) -> None:
        if self.template not in BY_NAME:
            raise ValueError(f"template {self.template!r} is unknown; known: {', '.join(BY_NAME)}")
        if self.seed < 0 or self.window_tokens < 16:
            raise ValueError("seed must not be negative, window_tokens 16 at least")


def load_recipe(path: Path) -> Recipe | CheckpointRecipe:
    """Read a recipe. Raises RecipeError with every mistake's line and column."""
    try:
        return _loaded(path)
    except PolicyError as error:
        raise RecipeError(str(error)) from error


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


def _loaded(path: Path) -> Recipe | CheckpointRecipe:
    reader, root = composed(path)
    named = _inner(root).get(_BASE)
    if named is None:
        return _recipe(reader, root)
    name = reader.text(named, _BASE, 200)
    if name is None or Path(name).name != name:
        reader.report(named, f"{_BASE} must name a recipe in the same folder")
    reader.check()
    below_reader, below = composed(path.with_name(str(name)))
    if _BASE in _inner(below):
        reader.report(named, f"{_BASE} must be a recipe without a base")
        reader.check()
    base = _recipe(below_reader, below)  # so that what is wrong in the whole is this file's
    own = [(key, value) for key, value in root.value if value is not named]
    whole = _recipe(reader, _merged(below, MappingNode(root.tag, own, root.start_mark)))
    if whole.name == base.name:
        reader.report(named, f"{_BASE} must be a recipe of another name: {base.name!r} is its")
    reader.check()
    return whole


def _recipe(reader: Reader, root: MappingNode) -> Recipe | CheckpointRecipe:
    recipe = made(reader, Recipe if "student" in _inner(root) else CheckpointRecipe, root, "")
    if recipe is not None:
        _check(reader, root, recipe)
    reader.check()
    read: Recipe | CheckpointRecipe = recipe
    return read


def _check(reader: Reader, root: MappingNode, recipe: Recipe | CheckpointRecipe) -> None:
    if not _NAME.fullmatch(recipe.name):
        named = _inner(root)["name"]
        reader.report(named, "name must be of letters, digits, '.', '_' and '-': folders have it")
    try:
        for epoch in _epochs(recipe):
            shares(epoch)
    except (TypeError, ValueError) as error:
        reader.report(root, str(error))


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


def _inner(mapping: MappingNode) -> dict[str, Node]:
    return {key.value: value for key, value in mapping.value if isinstance(key, ScalarNode)}


def _merged(below: MappingNode, above: MappingNode) -> MappingNode:
    """What `above` says, and what only `below` says; mappings within are merged too."""
    under, names = _inner(below), _inner(above)
    entries = [(key, value) for key, value in below.value if key.value not in names]
    for key, value in above.value:
        known = under.get(key.value) if isinstance(key, ScalarNode) else None
        if isinstance(known, MappingNode) and isinstance(value, MappingNode):
            value = _merged(known, value)
        entries.append((key, value))
    return MappingNode(above.tag, entries, above.start_mark)
