"""guardctl policies: what requests may name."""

from __future__ import annotations

import typer

from guard_service.cli import options


def policies(
    server: options.Server = "",
    model: options.Model = "",
    folders: options.PolicyFolders = None,
    ca: options.Ca = None,
    cert: options.Cert = None,
    key: options.Key = None,
    token_file: options.TokenPath = None,
    timeout_s: options.Timeout = 10.0,
    as_json: options.AsJson = False,
) -> None:
    """List the policies that requests may name."""
    from guard_service.cli import listing
    from guard_service.cli.place import Place

    place = Place(server, model, tuple(folders or ()), ca, cert, key, token_file)
    raise typer.Exit(listing.policies(place, timeout_s, as_json))
