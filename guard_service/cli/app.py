"""The verbs of guardctl, put together. What a verb needs is imported when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from guard_service.cli.audit import audit
from guard_service.cli.bench import bench
from guard_service.cli.bulk import bulk
from guard_service.cli.cascade import cascade
from guard_service.cli.check import check
from guard_service.cli.eval import evaluate
from guard_service.cli.expect import expect
from guard_service.cli.info import info
from guard_service.cli.middleware import middleware
from guard_service.cli.policies import policies
from guard_service.cli.policy import policy
from guard_service.cli.replay import replay
from guard_service.cli.token import token

app = typer.Typer(
    name="guardctl",
    help="Ask a guard from the shell: a text, a conversation, a file of thousands.",
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: fast, and the same in every terminal
    pretty_exceptions_enable=False,  # a pretty trace shows local variables, that is, content
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.command()(check)
app.command()(bulk)
app.command()(bench)
app.command("eval")(evaluate)
app.command()(cascade)
app.command()(expect)
app.command()(info)
app.command()(policies)
app.command()(replay)
app.add_typer(audit, name="audit")
app.add_typer(policy, name="policy")
app.add_typer(middleware, name="middleware")
app.add_typer(token, name="token")


def _version(wanted: bool) -> None:
    if wanted:
        from guard_service import __version__

        typer.echo(f"guardctl {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Ask a guard from the shell: a text, a conversation, a file of thousands.

    Without a server the starter guard runs inside guardctl. Name a server with --server or in the
    environment variable GUARDCTL_SERVER, for example 127.0.0.1:50051.
    """
