"""guardctl check: judge one text, image or conversation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from guard_service.cli import options


def check(
    text: Annotated[
        str | None,
        typer.Argument(
            metavar="[TEXT|-]",
            show_default=False,
            help="The text to judge; - reads it from standard input (one newline at its end is "
            "not part of it).",
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file",
            "-f",
            metavar="FILE",
            help='A conversation as JSON: a list of {"role", "content"} or {"messages": [...]}; '
            "- reads standard input.",
        ),
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Judge this image, with the text if there is one."),
    ] = None,
    role: Annotated[
        str, typer.Option(metavar="ROLE", help="Whose turn it is: user or assistant.")
    ] = "user",
    context: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT", help="An earlier turn; roles alternate and end before the judged turn."
        ),
    ] = None,
    policy: options.PolicyName = "",
    language: options.Language = "",
    server: options.Server = "",
    model: options.Model = "",
    policies: options.PolicyFolders = None,
    ca: options.Ca = None,
    cert: options.Cert = None,
    key: options.Key = None,
    token_file: options.TokenPath = None,
    timeout_s: options.Timeout = 30.0,
    as_json: options.AsJson = False,
) -> None:
    """Judge one text, image or conversation; the exit code tells the action.

    Exit code: 0 allow, 10 flag, 20 block, 1 could not judge, 2 wrong usage. (With a policy in
    shadow mode the action is always allow.)
    """
    from guard_service.cli import checking
    from guard_service.cli.place import Place

    given = checking.Given(text, file, tuple(image or ()), role, tuple(context or ()))
    place = Place(server, model, tuple(policies or ()), ca, cert, key, token_file)
    raise typer.Exit(checking.run(given, place, checking.Ask(policy, language, timeout_s), as_json))
