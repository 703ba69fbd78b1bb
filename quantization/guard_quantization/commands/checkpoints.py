"""guard-quantize export and random: checkpoints to artifacts, and checkpoints to try them on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    source: Annotated[
        Path,
        typer.Argument(help="Checkpoint folder in the Hugging Face layout, or what a stage made."),
    ],
    out: Annotated[Path, typer.Argument(help="Artifact folder to make.")],
    bits: Annotated[int, typer.Option(help="4, 8 or 32 bits per weight; without a recipe.")] = 4,
    recipe: Annotated[
        Path | None, typer.Option(help="Take name, template, window and precision of this one.")
    ] = None,
) -> None:
    """Make an artifact of a Llama Guard 3 1B checkpoint on this disk."""
    from guard_quantization.checkpoint.pipeline import MODEL, release_of
    from guard_quantization.export.decoder import Precision
    from guard_quantization.export.hf import LLAMA_GUARD_3_1B, export_checkpoint
    from guard_quantization.recipe import load_checkpoint_recipe

    release, precision = LLAMA_GUARD_3_1B, Precision(bits=bits, embedding_bits=bits)
    if recipe:
        read = load_checkpoint_recipe(recipe)
        release, precision = release_of(read), read.export
    source = source / MODEL if (source / MODEL).is_dir() else source
    artifact = export_checkpoint(source, out, release, precision)
    typer.echo(f"made {out}: {artifact.manifest.name} {artifact.manifest.digest}")


def random_checkpoint(
    out: Annotated[Path, typer.Argument(help="Checkpoint folder to make.")],
    tokenizer: Annotated[Path, typer.Option(help="tokenizer.json, or a rank file.", exists=True)],
    seed: Annotated[int, typer.Option(min=0)] = 0,
    geometry: Annotated[
        str, typer.Option(help="1b, 8b or 11b-vision, as published (3, 16 and 21 GB).")
    ] = "1b",
    config: Annotated[
        Path | None, typer.Option(help="Another geometry: this config.json.", exists=True)
    ] = None,
) -> None:
    """Write a checkpoint of a Llama Guard 3's geometry with random weights: to try recipes, size
    and speed on."""
    from guard_quantization.checkpoint.random_weights import (
        tensor_shapes,
        write_random_checkpoint,
    )
    from guard_quantization.folders import read_json
    from guard_quantization.training import Report
    from guard_service.engines.torch.published import PUBLISHED

    if geometry not in PUBLISHED:
        raise typer.BadParameter(f"must be one of {', '.join(PUBLISHED)}", param_hint="--geometry")
    chosen = read_json(config) if config else PUBLISHED[geometry]
    sees = "vision_config" in chosen
    report = Report("writing", len(tensor_shapes(chosen)))
    try:
        count = write_random_checkpoint(
            out,
            chosen,
            tokenizer,
            seed,
            outliers=0 if sees else 8,
            done=lambda n: report.at(n, ""),
        )
    finally:
        report.close()
    typer.echo(f"made {out}: {count} random parameters; it judges nothing")
