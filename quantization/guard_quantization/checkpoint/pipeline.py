"""A checkpoint's way to an artifact: prune, distill, quantize, export, stage by stage."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from guard_policies.taxonomy import LLAMA_GUARD_3
from guard_quantization.checkpoint.asking import Draw, asked
from guard_quantization.checkpoint.beliefs import Asker, Believer
from guard_quantization.checkpoint.distill import distill_checkpoint
from guard_quantization.checkpoint.prune import prune
from guard_quantization.checkpoint.quantize import quantize_checkpoint
from guard_quantization.data import Row, contrast_rows, read_folder, sample_epoch
from guard_quantization.export.hf import LLAMA_GUARD_3_1B, export_checkpoint
from guard_quantization.recipe import CheckpointRecipe, Epoch, shares
from guard_quantization.stages import Figures, Origin, Run, digest
from guard_service.templates import BY_NAME

STAGES = ("prune", "distill", "quantize", "export")
MODEL = "model"  # the folder in a stage's folder that the next one reads


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
        self.run = Run(runs / recipe.name, say)
        self.asker = Asker.of(source, recipe.template, recipe.window_tokens)

    def make(self, last: str = STAGES[-1]) -> Path:
        """Do all stages up to `last`; the folder that it made."""
        ways = {"prune": self._prune, "distill": self._distill, "quantize": self._quantize}
        plans = {name: getattr(self.recipe, name) for name in ways}
        folder = self.source
        for name in STAGES[: STAGES.index(last) + 1]:
            if name == "export":
                folder = self._export(folder)
            elif plans[name] is not None:
                folder = ways[name](folder) / MODEL
        return folder

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
            return prune(source, folder / MODEL, plan, rows, head, progress=folder / "steps.json")

        inputs = {"source": digest(source), "calibration": _digest_of(rows)}
        return self.run.stage(Origin.of("prune", plan, inputs), make)

    def _distill(self, source: Path) -> Path:
        taught = self.recipe.distill
        assert taught is not None
        epochs = self._drawn(taught.epochs, "train", taught.languages, taught.held_out)
        held = [row for row, _ in self._drawn([taught.held], "dev", taught.languages)[0]]

        def make(folder: Path) -> Figures:
            teacher = self.teacher[1]() if self.teacher else None
            return distill_checkpoint(
                source, folder / MODEL, taught.plan, epochs, held, teacher, folder / "work"
            )

        inputs = {
            "source": digest(source),
            "teacher": self.teacher[0] if self.teacher else "none",
            "rows": _digest_of([[(row.id, row.turns, w) for row, w in epoch] for epoch in epochs]),
        }
        return self.run.stage(Origin.of("distill", taught, inputs), make)

    def _quantize(self, source: Path) -> Path:
        plan, rows = self.recipe.quantize, self.calibration
        assert plan is not None

        def make(folder: Path) -> Figures:
            return quantize_checkpoint(source, folder / MODEL, plan, rows)

        inputs = {"source": digest(source), "calibration": _digest_of(rows)}
        return self.run.stage(Origin.of("quantize", plan, inputs), make)

    def _export(self, source: Path) -> Path:
        recipe = self.recipe
        release = replace(
            LLAMA_GUARD_3_1B,
            name=recipe.name,
            template=recipe.template,
            window_tokens=recipe.window_tokens,
            categories=tuple(
                category.code
                for category in LLAMA_GUARD_3
                if category.code in BY_NAME[recipe.template].wording
            ),
        )

        def make(folder: Path) -> Figures:
            made = export_checkpoint(source, folder / MODEL, release, recipe.export)
            sizes = {name: file.size / 2**20 for name, file in made.manifest.files.items()}
            return {"mib": sizes, "parameters": made.manifest.parameters}

        settings = {"precision": asdict(recipe.export), "release": [recipe.template, recipe.name]}
        origin = Origin.of("export", settings, {"source": digest(source)})
        return self.run.stage(origin, make) / MODEL

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


def _digest_of(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()
