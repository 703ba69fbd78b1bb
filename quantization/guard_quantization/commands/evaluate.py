"""guard-quantize evaluate: how well a model judges labelled rows."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from guard_quantization.commands.options import Data


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
