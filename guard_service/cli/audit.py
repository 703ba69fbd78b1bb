"""guardctl audit: is an audit log what its server wrote, and what does it say?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

audit = typer.Typer(
    help="Verify and show audit logs; asks no guard.", no_args_is_help=True, rich_markup_mode=None
)
Paths = Annotated[
    list[Path],
    typer.Argument(metavar="FOLDER|FILE...", help="The log's folder, or all of its segments."),
]
Key = Annotated[
    Path, typer.Option("--key", exists=True, dir_okay=False, help="The log's key (audit_key).")
]


@audit.command()
def verify(
    paths: Paths,
    key: Key,
    first: Annotated[
        int, typer.Option(min=1, help="The first segment, where older ones were put away.")
    ] = 1,
    head: Annotated[
        bool, typer.Option(help="--no-head: of copies without audit.head; see the README.")
    ] = True,
    reaches: Annotated[
        str,
        typer.Option(
            metavar="LINES:MAC", help="What the server's own log last said of it: lines and last."
        ),
    ] = "",
) -> None:
    """Check every line of a log; exit code 1 names the first that its server did not write."""
    from guard_service.cli import audit_run

    raise typer.Exit(audit_run.verified(paths, key, first, head, reaches))


@audit.command()
def show(
    paths: Paths,
    key: Key,
    kind: Annotated[str, typer.Option(help="Only these: verdict, unjudged, refused.")] = "",
    action: Annotated[str, typer.Option(help="Only verdicts of this action.")] = "",
    tenant: Annotated[str, typer.Option(help="Only this tenant's.")] = "",
    request: Annotated[str, typer.Option(help="Only the call of this request id.")] = "",
    as_json: Annotated[
        bool, typer.Option("--json", help="Whole lines, as JSON, in place of short ones.")
    ] = False,
) -> None:
    """Print lines of a log, each checked by the key."""
    from guard_service.cli import audit_run

    wanted = {"kind": kind, "action": action, "tenant": tenant, "request_id": request}
    raise typer.Exit(audit_run.shown(paths, key, wanted, as_json))
