"""The options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Server = Annotated[
    str,
    typer.Option(
        "--server",
        "-s",
        metavar="ADDR",
        help="A running guard, as host:port or unix:/path, or several, as dns:///host:port "
        "[env: GUARDCTL_SERVER]. "
        "Without it a guard runs inside guardctl.",
    ),
]
Model = Annotated[
    str,
    typer.Option(
        metavar="FOLDER", help='The model to run inside guardctl: a model folder or "starter".'
    ),
]
PolicyFolders = Annotated[
    list[Path] | None,
    typer.Option(
        "--policies",
        exists=True,
        metavar="PATH",
        help="Policy file, or folder of them, for the guard inside guardctl.",
    ),
]
Ca = Annotated[
    Path | None,
    typer.Option(
        "--ca",
        exists=True,
        dir_okay=False,
        metavar="FILE",
        help="CA of the server (PEM): turns TLS on.",
    ),
]
Cert = Annotated[
    Path | None,
    typer.Option(
        "--cert", exists=True, dir_okay=False, metavar="FILE", help="Own certificate (PEM)."
    ),
]
Key = Annotated[
    Path | None,
    typer.Option(
        "--key", exists=True, dir_okay=False, metavar="FILE", help="Own certificate's key (PEM)."
    ),
]
TokenPath = Annotated[
    Path | None,
    typer.Option(
        "--token-file",
        exists=True,
        dir_okay=False,
        metavar="FILE",
        envvar="GUARDCTL_TOKEN_FILE",
        help="Bearer token for the server; needs TLS (--ca), or a server on this machine.",
    ),
]
Timeout = Annotated[
    float, typer.Option("--timeout", min=0.001, metavar="SECONDS", help="Deadline of one call.")
]
Concurrency = Annotated[
    int, typer.Option("--concurrency", "-c", min=1, max=1024, help="Calls at a time, at most.")
]
Patience = Annotated[
    float,
    typer.Option(
        "--patience",
        min=0,
        metavar="SECONDS",
        help="How long to wait for a guard that is overloaded or away before stopping.",
    ),
]
PolicyName = Annotated[
    str, typer.Option("--policy", "-p", metavar="NAME", help="Policy to judge by.")
]
Language = Annotated[
    str,
    typer.Option("--language", "-l", metavar="TAG", help='Language of the text: "de", "pt-BR".'),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object instead of text for people.")]
