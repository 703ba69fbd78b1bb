"""The options that several commands share, and what becomes of limits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from guard_service.evaluation.gate import Violation

Data = Annotated[Path, typer.Option(help="Folder of labelled .jsonl.gz files.", exists=True)]
Recipe = Annotated[Path, typer.Argument(help="Recipe, for example recipes/llama-guard-3-1b.yaml.")]
Teacher = Annotated[
    str | None,
    typer.Option(help='Teacher of a recipe that distills: a checkpoint, an artifact, "starter".'),
]
Threads = Annotated[int, typer.Option(help="Threads that compute.", min=1)]
Split = Annotated[str, typer.Option(help="Which rows: dev, train or test.")]
Probe = Annotated[bool, typer.Option(help="Judge the packaged probe sets as well.")]
Threshold = Annotated[
    float, typer.Option(help="P(unsafe) at which a row counts as unsafe.", min=0, max=1)
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of text for people.")]


def end_if_broken(broken: Sequence[Violation]) -> None:
    """Say which limits are broken, if any, and end with status 1."""
    for one in broken:
        typer.echo(f"guard-quantize: limit broken: {one}", err=True)
    if broken:
        raise typer.Exit(1)
