"""guard-quantize prune, distill, quantize: one stage of a recipe, from folder to folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from guard_quantization.commands.options import Data, Recipe, Teacher, Threads

Source = Annotated[
    Path, typer.Argument(help="Checkpoint folder, or what another stage made.", exists=True)
]
Out = Annotated[
    Path, typer.Argument(help="Folder to make: the checkpoint in model/, its record, a page.")
]


def prune(recipe: Recipe, source: Source, out: Out, data: Data, threads: Threads = 2) -> None:
    """Take out the layers and neurons that do least on calibration rows."""
    _stage("prune", recipe, source, out, data, threads)


def distill(
    recipe: Recipe,
    source: Source,
    out: Out,
    data: Data,
    teacher: Teacher = None,
    threads: Threads = 2,
) -> None:
    """Teach a checkpoint labels and what a teacher believes."""
    _stage("distill", recipe, source, out, data, threads, teacher)


def quantize(recipe: Recipe, source: Source, out: Out, data: Data, threads: Threads = 2) -> None:
    """Round weights to codes and scales, so that calibration rows change least."""
    _stage("quantize", recipe, source, out, data, threads)


def _stage(
    name: str,
    recipe: Path,
    source: Path,
    out: Path,
    data: Path,
    threads: int,
    teacher: str | None = None,
) -> None:
    import torch

    from guard_quantization.checkpoint.beliefs import open_teacher
    from guard_quantization.checkpoint.pipeline import MODEL, one_stage
    from guard_quantization.recipe import load_checkpoint_recipe

    torch.set_num_threads(threads)
    read = load_checkpoint_recipe(recipe)
    believer = open_teacher(teacher, read.window_tokens) if teacher else None
    source = source / MODEL if (source / MODEL).is_dir() else source
    typer.echo(f"made {one_stage(name, read, source, out, data, believer, typer.echo)}")
