"""guardctl replay: is a recorded verdict what a guard says today?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from guard_service.cli import options


def replay(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="FOLDER|FILE...", help="An audit log's folder, or its segments."),
    ],
    audit_key: Annotated[
        Path,
        typer.Option("--audit-key", exists=True, dir_okay=False, help="The log's key."),
    ],
    payload_key: Annotated[
        Path,
        typer.Option(exists=True, dir_okay=False, help="The private key that payloads are for."),
    ],
    verdict: Annotated[
        list[str] | None, typer.Option(metavar="ID", help="Only this verdict; repeatable.")
    ] = None,
    server: options.Server = "",
    model: options.Model = "",
    policies: options.PolicyFolders = None,
    ca: options.Ca = None,
    cert: options.Cert = None,
    key: options.Key = None,
    token_file: options.TokenPath = None,
    timeout_s: options.Timeout = 30.0,
) -> None:
    """Judge again what an audit log recorded, and compare, bit for bit.

    Exit code: 0 all the same, 1 something differs or got no verdict, 2 wrong usage. A guard inside
    guardctl multiplies by the kernel plan that was recorded.
    """
    from guard_service.cli import replaying
    from guard_service.cli.place import Place

    place = Place(server, model, tuple(policies or ()), ca, cert, key, token_file)
    recorded = replaying.Recorded(tuple(paths), audit_key, payload_key, frozenset(verdict or ()))
    raise typer.Exit(replaying.run(recorded, place, timeout_s))
