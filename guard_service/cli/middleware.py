"""guardctl middleware: try a deployment that has the middleware or the sidecar in front."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from guard_service.cli import options

middleware = typer.Typer(
    help="Try a deployment that has the middleware or the sidecar in front.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@middleware.callback()
def _root() -> None:
    """Try a deployment that has the middleware or the sidecar in front."""


@middleware.command()
def check(
    upstream: Annotated[
        str,
        typer.Option(
            metavar="URL", help="The deployment: http://host:port, with a path in front if any."
        ),
    ],
    name: Annotated[
        str, typer.Option("--model", metavar="NAME", help="The model that requests name.")
    ] = "default",
    unsafe_text: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            metavar="FILE",
            help="A text that the deployment's guard must block, in place of the one built in.",
        ),
    ] = None,
    header: Annotated[
        list[str] | None,
        typer.Option(
            "--header", "-H", metavar="LINE", help='A header of all requests: "Authorization: ...".'
        ),
    ] = None,
    ca: options.Ca = None,
    timeout_s: options.Timeout = 60.0,
    as_json: options.AsJson = False,
) -> None:
    """Send the conformance set to a deployment and tell what became of each case.

    Of each protocol that the deployment answers in, harmless requests must be answered and
    screened, and harmful ones blocked, whole and streamed. Then come attempts to get past the
    guard: each must be refused, or judged. Exit code: 0 all is well, 1 something is not or nothing
    answers, 2 wrong usage.
    """
    from guard_service.cli import middleware_check

    asked = middleware_check.Asked(
        upstream, name, unsafe_text, tuple(header or ()), ca, timeout_s, as_json
    )
    raise typer.Exit(middleware_check.run(asked))
