"""guardctl info: what is running."""

from __future__ import annotations

import typer

from guard_service.cli import options


def info(
    server: options.Server = "",
    model: options.Model = "",
    ca: options.Ca = None,
    cert: options.Cert = None,
    key: options.Key = None,
    token_file: options.TokenPath = None,
    timeout_s: options.Timeout = 10.0,
    as_json: options.AsJson = False,
) -> None:
    """Tell what is running: version, models, limits, health."""
    from guard_service.cli import listing
    from guard_service.cli.place import Place

    raise typer.Exit(
        listing.info(Place(server, model, (), ca, cert, key, token_file), timeout_s, as_json)
    )
