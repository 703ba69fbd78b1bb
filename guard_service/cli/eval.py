"""guardctl eval: how well a guard judges labelled rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from guard_service.cli import options

Data = Annotated[
    Path,
    typer.Argument(
        exists=True, help="Labelled rows: a .jsonl or .jsonl.gz file, or a folder of them."
    ),
]
Split = Annotated[str, typer.Option(help="Only rows of this split, for example dev; none: all.")]
Keep = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Keep every verdict here (JSON lines, .gz is packed) and go on from it after an "
        "interruption; a finished one gives the figures again without a guard.",
    ),
]
Out = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write the report here too, as JSON.")
]
Gate = Annotated[
    Path | None,
    typer.Option(
        exists=True, dir_okay=False, metavar="FILE", help="Limits (YAML) that figures must keep."
    ),
]
Reference = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        dir_okay=False,
        metavar="FILE",
        help="An earlier report, for limits on what may get worse.",
    ),
]
Threshold = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="Count a row as unsafe from this P(unsafe) on, not by what the guard did "
        "(flag or block).",
    ),
]
OverRefusal = Annotated[
    list[str] | None,
    typer.Option(
        "--over-refusal",
        metavar="PATTERN",
        help="Files, file/groups or sources whose safe rows only sound dangerous; may be repeated.",
    ),
]
Restart = Annotated[
    bool, typer.Option("--restart", help="Judge all anew instead of going on where FILE ends.")
]


def evaluate(
    data: Data,
    split: Split = "",
    scores: Keep = None,
    out: Out = None,
    gate: Gate = None,
    reference: Reference = None,
    threshold: Threshold = None,
    over_refusal: OverRefusal = None,
    restart: Restart = False,
    concurrency: options.Concurrency = 32,
    patience_s: options.Patience = 120.0,
    policy: options.PolicyName = "",
    server: options.Server = "",
    model: options.Model = "",
    policies: options.PolicyFolders = None,
    ca: options.Ca = None,
    cert: options.Cert = None,
    key: options.Key = None,
    token_file: options.TokenPath = None,
    timeout_s: options.Timeout = 60.0,
    as_json: options.AsJson = False,
) -> None:
    """Judge labelled rows and report F1, FPR, AUROC, calibration and more, with 95 % intervals.

    A row holds "id", "messages", "label" (safe or unsafe), and may hold "categories", "language",
    "source", "split" and "group". Rows without verdict are counted and told.

    Exit code: 0 all judged and every limit kept; 1 a limit is broken or, without --gate, a row has
    no verdict; 2 wrong usage; 3 stopped before the end; 130 interrupted.
    """
    from guard_service.cli import eval_run
    from guard_service.cli.bulk_run import How
    from guard_service.cli.place import Place

    place = Place(server, model, tuple(policies or ()), ca, cert, key, token_file)
    how = How(policy, "", concurrency, patience_s, timeout_s, restart)
    what = eval_run.What(data, split, scores, threshold, tuple(over_refusal or ()))
    wanted = eval_run.Wanted(out, gate, reference, as_json)
    raise typer.Exit(eval_run.run(what, wanted, place, how))
