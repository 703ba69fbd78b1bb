"""guardctl token: bearer tokens for the auth file; asks no guard."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

token = typer.Typer(
    help="Make bearer tokens, and the digests that the auth file has of them; asks no guard.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
Name = Annotated[str, typer.Option(metavar="TEXT", help="Told in the access log as `caller`.")]


@token.command()
def new(name: Name = "") -> None:
    """Make a token: it goes to standard output, once; its entry for the auth file beside it."""
    from guard_service.security.tokens import digest_of, new_token

    made = new_token()
    print(made)
    print(_entry(digest_of(made), name), file=sys.stderr)


@token.command("hash")
def hash_(name: Name = "") -> None:
    """Digest a token from standard input: its entry for the auth file."""
    from guard_service.cli import exits
    from guard_service.security.tokens import FEWEST_CHARS, digest_of

    said = sys.stdin.readline().strip()
    if len(said) < FEWEST_CHARS or not said.isascii():
        exits.fail(
            f"a token has {FEWEST_CHARS} characters at least, all ASCII; guardctl token new makes "
            "one that nobody can guess",
            exits.USAGE,
        )
    print(_entry(digest_of(said), name))


def _entry(digest: str, name: str) -> str:
    """A line for the auth file's `tokens`; JSON strings are YAML ones."""
    import json

    named = f", name: {json.dumps(name)}" if name else ""
    return f'- {{digest: "{digest}"{named}}}'
