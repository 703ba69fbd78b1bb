"""guard-quantize student and steps: a trained student as a checkpoint, and what steps cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from guard_quantization.commands.options import Data, Recipe, Threads


def student(
    recipe: Recipe,
    out: Annotated[Path, typer.Argument(help="Checkpoint folder to make.")],
    data: Data,
    runs: Annotated[Path, typer.Option(help="Where stages keep their results.")] = Path("runs"),
    encoder: Annotated[
        Path | None, typer.Option(help="Folder of a BERT sentence encoder; none: the packaged one.")
    ] = None,
    threads: Threads = 2,
) -> None:
    """Write the student of a starter's recipe as a checkpoint in the Hugging Face layout."""
    import torch

    from guard_quantization.commands.run import packaged_encoder
    from guard_quantization.recipe import load_starter_recipe
    from guard_quantization.starter.checkpoint import save_student
    from guard_quantization.starter.pipeline import Pipeline

    torch.set_num_threads(threads)
    read = load_starter_recipe(recipe)
    save_student(Pipeline(read, data, runs, encoder or packaged_encoder()), out)
    typer.echo(f"made {out}")


def steps(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Checkpoint, artifact and run folders, or NAME=FOLDER; the first is the reference."
        ),
    ],
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder for scores and tables.")] = Path("runs/steps"),
    most: Annotated[
        int, typer.Option(help="Dev rows of each file, spread evenly; 0: all.", min=0)
    ] = 0,
    threads: Threads = 2,
) -> None:
    """Judge dev rows and probe sets with every model; AUROC and F1 beside the first one's."""
    import torch

    from guard_quantization.checkpoint.steps import (
        compare_steps,
        steps_of,
        thinned,
        write_steps,
    )
    from guard_quantization.data import contrast_rows, probe_rows, read_folder

    torch.set_num_threads(threads)
    dev = [row for row in (*read_folder(data), *contrast_rows()) if row.split == "dev"]
    rows = [*thinned(dev, most), *probe_rows()]
    path = write_steps(out, compare_steps(steps_of(models), rows, out))
    typer.echo(path.read_text("utf-8"))
