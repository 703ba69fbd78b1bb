"""guardctl bulk: judge a file of conversations, line by line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from guard_service.cli import options


def bulk(
    source: Annotated[
        Path, typer.Argument(metavar="IN", help="JSON lines; .gz is unpacked; - is standard input.")
    ],
    result: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="JSON lines; .gz is packed; - is standard output."),
    ],
    policy: options.PolicyName = "",
    language: options.Language = "",
    restart: Annotated[
        bool, typer.Option("--restart", help="Write OUT anew instead of going on where it ends.")
    ] = False,
    concurrency: options.Concurrency = 32,
    patience_s: options.Patience = 120.0,
    server: options.Server = "",
    model: options.Model = "",
    policies: options.PolicyFolders = None,
    ca: options.Ca = None,
    cert: options.Cert = None,
    key: options.Key = None,
    token_file: options.TokenPath = None,
    timeout_s: options.Timeout = 60.0,
) -> None:
    """Judge a file of conversations: one JSON line in, one JSON line out, in order.

    A line holds "messages" (a list of {"role", "content"}) or "text", and may hold "id",
    "target_role" and "language". A line that cannot be judged gets an "error" and the run goes on.
    Run the same command again to go on after an interruption: what OUT holds already is kept.

    Exit code: 0 all judged, 1 some lines have an error, 2 wrong usage, 3 stopped before the end,
    130 interrupted.
    """
    from guard_service.cli import bulk_run
    from guard_service.cli.place import Place

    place = Place(server, model, tuple(policies or ()), ca, cert, key, token_file)
    how = bulk_run.How(policy, language, concurrency, patience_s, timeout_s, restart)
    raise typer.Exit(bulk_run.run(source, result, place, how))
