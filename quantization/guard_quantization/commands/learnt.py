"""guard-quantize grow, renew and steps: artifacts as a beginning, and what steps cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from guard_quantization.commands.options import Data, Threads

Model = Annotated[str, typer.Argument(help='Artifact folder, or "starter".')]


def grow(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Checkpoint folder to make.")],
    layers: Annotated[int, typer.Option(help="How many it is to have.", min=1)],
    intermediate_size: Annotated[int, typer.Option(help="Width of its MLPs.", min=1)],
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Write an artifact as a checkpoint with more layers and neurons, which computes the same."""
    from guard_quantization.checkpoint.grow import grow_artifact
    from guard_service.artifact import load_named

    grow_artifact(load_named(model), out, layers, intermediate_size, seed)
    typer.echo(f"made {out}")


def renew(
    model: Model, out: Annotated[Path, typer.Argument(help="Artifact folder to make.")]
) -> None:
    """Write an artifact of an earlier version with the graphs of this one, weights untouched."""
    from guard_quantization.export.renew import renewed
    from guard_service.artifact import load_named

    made = renewed(load_named(model), out)
    typer.echo(f"made {out}: {made.manifest.name} {made.digest}")


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
