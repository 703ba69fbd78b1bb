"""guardctl policy: lint, show and test policy files; asks no guard."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from guard_service.cli import options

policy = typer.Typer(
    help="Lint, show and test policy files; asks no guard.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@policy.command()
def lint(
    paths: Annotated[list[Path], typer.Argument(help="Policy files, or folders of them.")],
) -> None:
    """Tell every mistake of policy files as file:line:column; exit code 1 when there is one."""
    from guard_service.cli import policy_files

    raise typer.Exit(policy_files.lint(paths))


@policy.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME|FILE", help="A built-in policy or a file.")],
    as_json: options.AsJson = False,
) -> None:
    """Show what a policy means, with all defaults filled in."""
    from guard_service.cli import policy_files

    raise typer.Exit(policy_files.show(name, as_json))


@policy.command()
def test(
    cases: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Decision tables, or folders of them; policies/cases here if left out.",
            show_default=False,
        ),
    ] = None,
    policies: options.PolicyFolders = None,
) -> None:
    """Run decision tables (scores in, expected decisions out); exit code 1 when a case fails."""
    from guard_service.cli import policy_files

    raise typer.Exit(policy_files.test(cases or [], policies or []))
