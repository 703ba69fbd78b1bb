"""guardctl cascade: the band in which a second guard should decide."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from guard_service.cli import options
from guard_service.cli.eval import Data, Out, Split

First = Annotated[
    Path,
    typer.Argument(
        exists=True, dir_okay=False, help="What `eval --scores` kept of the first guard."
    ),
]
Second = Annotated[
    Path, typer.Argument(exists=True, dir_okay=False, help="The same of the second guard.")
]
Tolerance = Annotated[
    float,
    typer.Option(min=0, max=1, help="How much of the second guard's recall and FPR to give up."),
]


def cascade(
    data: Data,
    first: First,
    second: Second,
    split: Split = "",
    tolerance: Tolerance = 0.01,
    out: Out = None,
    as_json: options.AsJson = False,
) -> None:
    """Fit the band of a cascade: which rows the second guard must judge to be as good as alone.

    Both guards judge the same rows first, with `guardctl eval DATA --scores FILE`. Told are both
    alone, the cheapest band that keeps the second's recall and FPR, and what other bands buy. Asks
    no guard. Exit code: 0, or 2 for files that do not belong together.
    """
    from guard_service.cli import cascade_run

    what = cascade_run.What(data, first, second, split, tolerance)
    raise typer.Exit(cascade_run.run(what, out, as_json))
