"""A checkpoint's way to an artifact and its figures, stage by stage."""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from guard_policies.taxonomy import LLAMA_GUARD_3
from guard_quantization.checkpoint.asking import Draw, asked
from guard_quantization.checkpoint.beliefs import Asker, Believer, codes_of
from guard_quantization.checkpoint.distill import distill_checkpoint
from guard_quantization.checkpoint.prune import prune
from guard_quantization.checkpoint.quantize import quantize_checkpoint
from guard_quantization.checkpoint.tensors import read_config
from guard_quantization.data import Row, contrast_rows, read_folder, sample_epoch
from guard_quantization.evaluation.judges import judge_digest, open_judge
from guard_quantization.evaluation.making import PAGE, write_stages_page
from guard_quantization.evaluation.stage import (
    MODEL as ARTIFACT,
)
from guard_quantization.evaluation.stage import (
    REFERENCE,
    broken_limits,
    choose_rows,
    evaluate_model,
)
from guard_quantization.export.artifact import Release
from guard_quantization.export.hf import LLAMA_GUARD_3_1B, export_checkpoint
from guard_quantization.recipe import CheckpointRecipe, Epoch, shares
from guard_quantization.stages import Figures, Origin, Run, digest
from guard_service.evaluation.gate import Violation
from guard_service.templates import BY_NAME

STAGES = ("prune", "distill", "quantize", "export", "evaluate")
MODEL = "model"  # the folder in a stage's folder that the next one reads
_PRUNED = ("num_hidden_layers", "intermediate_size", "num_key_value_heads", "hidden_size")


class CheckpointPipeline:
    """One recipe, one checkpoint, one run folder.

    `data` holds labelled rows; `teacher` is asked for what it believes, when the recipe distills
    with trust in one.
    """

    def __init__(
        self,
        recipe: CheckpointRecipe,
        source: Path,
        data: Path,
        runs: Path,
        teacher: tuple[str, Callable[[], Believer]] | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        """`teacher` is a digest of it and a function that loads it."""
        self.recipe, self.source, self.data, self.teacher = recipe, source, data, teacher
        self.runs, self.run = runs, Run(runs / recipe.name, say)
        self.asker = Asker.of(source, recipe.template, recipe.window_tokens)

    def make(self, last: str = STAGES[-1]) -> Path:
        """Do all stages up to `last`; the model or artifact folder that came of it.

        Each leaves a page of all that is done.
        """
        folder = self.source
        for name in STAGES[: STAGES.index(last) + 1]:
            if getattr(self.recipe, name) is not None:
                there = self.run.place(name).exists()
                made = self.stage(name, folder)
                folder = folder if name == "evaluate" else made
                if not there:
                    self.write_page()
        return folder

    def stage(self, name: str, source: Path) -> Path:
        """Do one stage of the recipe on a model folder; the folder that it made."""
        ways = {
            "prune": self._prune,
            "distill": self._distill,
            "quantize": self._quantize,
            "export": self._export,
            "evaluate": self._evaluate,
        }
        if getattr(self.recipe, name) is None:
            raise ValueError(f"the recipe {self.recipe.name} has no stage {name}")
        made = ways[name](source)
        return made if name == "evaluate" else made / MODEL

    def write_page(self) -> Path:
        """The page of all stages that are done."""
        path = self.run.folder / PAGE
        folders = {name: self.run.place(name) for name in STAGES}
        write_stages_page(path, self.recipe.name, folders, self.broken)
        return path

    @property
    def broken(self) -> list[Violation]:
        """The recipe's limits that the evaluation does not keep."""
        plan, folder = self.recipe.evaluate, self.run.place("evaluate")
        limits = plan.gate if plan else None
        return broken_limits(folder, limits) if limits and folder.exists() else []

    @cached_property
    def rows(self) -> list[Row]:
        """All labelled rows: the data folder and the contrast families of this package."""
        return [*read_folder(self.data), *contrast_rows()]

    @cached_property
    def calibration(self) -> list[list[int]]:
        """Whole prompts of training rows, in random order, with the verdict's tokens behind."""
        chosen = self._drawn([self.recipe.calibration], "train")[0]
        rng = random.Random(self.recipe.seed)
        return [
            self.asker.ids(asked(row, weight, self.asker.known, Draw(), rng))
            for row, weight in chosen
        ]

    def _prune(self, source: Path) -> Path:
        plan, rows, head = self.recipe.prune, self.calibration, self.asker.head
        assert plan is not None

        def make(folder: Path) -> Figures:
            made = prune(source, folder / MODEL, plan, rows, head, progress=folder / "steps.json")
            before, after = read_config(source), read_config(folder / MODEL)
            return {**made, "sizes": {name: [before[name], after[name]] for name in _PRUNED}}

        inputs = {"source": digest(source), "calibration": _digest_of(rows)}
        return self._made(Origin.of("prune", plan, inputs), make)

    def _distill(self, source: Path) -> Path:
        taught = self.recipe.distill
        assert taught is not None
        epochs = self._drawn(taught.epochs, "train", taught.languages, taught.held_out)
        held = [row for row, _ in self._drawn([taught.held], "dev", taught.languages)[0]]

        def make(folder: Path) -> Figures:
            teacher = self.teacher[1]() if self.teacher else None
            kept = None
            if self.teacher:  # whose beliefs serve other recipes in the same runs folder too
                name = self.teacher[0].removeprefix("sha256:")[:16]
                kept = self.runs / "beliefs" / f"{name}-{self.recipe.window_tokens}"
            work = folder / "work"
            return distill_checkpoint(
                source, folder / MODEL, taught.plan, epochs, held, teacher, work, kept
            )

        inputs = {
            "source": digest(source),
            "teacher": self.teacher[0] if self.teacher else "none",
            "rows": _digest_of([[(row.id, row.turns, w) for row, w in epoch] for epoch in epochs]),
        }
        return self._made(Origin.of("distill", taught, inputs), make)

    def _quantize(self, source: Path) -> Path:
        plan, rows = self.recipe.quantize, self.calibration
        assert plan is not None

        def make(folder: Path) -> Figures:
            return quantize_checkpoint(source, folder / MODEL, plan, rows)

        inputs = {"source": digest(source), "calibration": _digest_of(rows)}
        return self._made(Origin.of("quantize", plan, inputs), make)

    def _export(self, source: Path) -> Path:
        recipe, release = self.recipe, release_of(self.recipe)

        def make(folder: Path) -> Figures:
            made = export_checkpoint(source, folder / MODEL, release, recipe.export)
            sizes = {name: file.size / 2**20 for name, file in made.manifest.files.items()}
            return {"mib": sizes, "parameters": made.manifest.parameters}

        settings = {"precision": asdict(recipe.export), "release": [recipe.template, recipe.name]}
        return self._made(Origin.of("export", settings, {"source": digest(source)}), make)

    def _evaluate(self, model: Path) -> Path:
        recipe, plan = self.recipe, self.recipe.evaluate
        assert plan is not None
        chosen = choose_rows(read_folder(self.data), plan, recipe.seed)
        asked: dict[str, tuple[str | Path, str]] = {}  # by name: what judges, and its template
        if plan.reference:
            asked[REFERENCE] = (self.source if plan.reference == "source" else plan.reference, "")
        if plan.steps:
            asked |= {"source": (self.source, "")} if plan.reference != "source" else {}
            stages = [name for name in ("prune", "distill") if getattr(recipe, name) is not None]
            asked |= {name: (self.run.place(name) / MODEL, recipe.template) for name in stages}
        asked[ARTIFACT] = (model, "")
        judges = {
            name: partial(open_judge, place, template, recipe.window_tokens)
            for name, (place, template) in asked.items()
        }

        def make(folder: Path) -> Figures:
            return evaluate_model(folder, plan, chosen, judges)

        inputs = {name: judge_digest(place) for name, (place, _) in asked.items()}
        origin = Origin.of("evaluate", plan.measured(), {**inputs, "rows": chosen.digest})
        return self.run.stage(origin, make)

    def _made(self, origin: Origin, make: Callable[[Path], Figures]) -> Path:
        """A stage that makes a MODEL; one that a kill kept from being recorded is made anew."""

        def anew(folder: Path) -> Figures:
            shutil.rmtree(folder / MODEL, ignore_errors=True)
            return make(folder)

        return self.run.stage(origin, anew)

    def _drawn(
        self,
        mixes: Sequence[Epoch],
        split: str,
        languages: Sequence[str] = (),
        held_out: Sequence[str] = (),
    ) -> list[list[tuple[Row, float]]]:
        rows = [
            row
            for row in self.rows
            if row.split == split
            and row.source not in held_out
            and (not languages or row.language in languages)
        ]
        seed = self.recipe.seed
        return [sample_epoch(rows, shares(mix), seed + at) for at, mix in enumerate(mixes)]


def release_of(recipe: CheckpointRecipe) -> Release:
    """What a recipe's artifact says of itself."""
    known = BY_NAME[recipe.template].wording
    return replace(
        LLAMA_GUARD_3_1B,
        name=recipe.name,
        template=recipe.template,
        window_tokens=recipe.window_tokens,
        categories=tuple(one.code for one in LLAMA_GUARD_3 if one.code in known),
        codes=codes_of(recipe.template),
        custom_categories=BY_NAME[recipe.template].takes_categories,
    )


def one_stage(
    name: str,
    recipe: CheckpointRecipe,
    source: Path,
    out: Path,
    data: Path,
    teacher: tuple[str, Callable[[], Believer]] | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """One stage of a recipe, from the model folder `source` into the stage folder `out`.

    As in a run, `out` is not written over, and an interrupted call goes on. The folder of the model
    that it made.
    """
    pipeline = CheckpointPipeline(recipe, source, data, out.parent, teacher, say)
    pipeline.run = Run(out.parent, say, {name: out.name})
    made = pipeline.stage(name, source)
    write_stages_page(out / PAGE, f"{recipe.name}: {name}", {name: out})
    return made


def _digest_of(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()
