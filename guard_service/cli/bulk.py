"""guardctl bulk: judge a file of conversations, line by line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from guard_service.cli import options


def bulk(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="IN",
            help="JSON lines; .gz is unpacked; - is standard input. Or a Parquet file, or "
            "a folder.",
        ),
    ],
    result: Annotated[
        Path,
        typer.Argument(
            metavar="OUT",
            help="JSON lines; .gz is packed; - is standard output. A folder where IN is one, a "
            "Parquet file, or with --ray.",
        ),
    ],
    policy: options.PolicyName = "",
    language: options.Language = "",
    restart: Annotated[
        bool, typer.Option("--restart", help="Write OUT anew instead of going on where it ends.")
    ] = False,
    ray: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS",
            help='Judge on a Ray cluster: host:port, "auto" on one of its nodes, or "local".',
        ),
    ] = "",
    ray_cpus: Annotated[
        int, typer.Option("--ray-cpus", min=1, metavar="N", help="CPUs of each guard on it.")
    ] = 2,
    block_lines: Annotated[
        int,
        typer.Option(
            "--block-lines", min=1, max=1_000_000, metavar="N", help="Lines of a file of OUT."
        ),
    ] = 1000,
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

    A folder's *.jsonl, *.jsonl.gz and *.parquet are read in blocks; OUT then holds a file for each
    block, whole or not there, and a summary with lines in, out, twice and missing. With --ray the
    blocks are judged on all nodes, which must see IN and OUT under the same paths.

    Exit code: 0 all judged, 1 some lines have an error, 2 wrong usage, 3 stopped before the end,
    130 interrupted.
    """
    from guard_service.cli import bulk_run
    from guard_service.cli.place import Place

    place = Place(server, model, tuple(policies or ()), ca, cert, key, token_file)
    how = bulk_run.How(policy, language, concurrency, patience_s, timeout_s, restart)
    if ray or source.is_dir() or source.suffix == ".parquet":
        from guard_service.cli import bulk_shards

        shards = bulk_shards.Shards(block_lines, ray, ray_cpus)
        raise typer.Exit(bulk_shards.run(source, result, place, how, shards))
    raise typer.Exit(bulk_run.run(source, result, place, how))
