"""The command guard-sidecar: a screened reverse proxy in front of one backend."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import fields

from guard_middleware.flags import EPILOG, GUARDS_ALL, add_log_level, add_settings
from guard_middleware.settings import SettingsError, from_flags

USAGE = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal; returns the exit code."""
    arguments = vars(_parser().parse_args(argv))
    logging.basicConfig(level=arguments.pop("log_level").upper(), format="%(message)s")
    try:
        from guard_middleware.sidecar import Places, Sidecar  # needs the extra
    except ModuleNotFoundError as missing:
        print(f"{missing}; pip install 'llama-guard-service[sidecar]'", file=sys.stderr)
        return USAGE
    given = {name: value for name, value in arguments.items() if value is not None}
    places = {f.name: given.pop(f.name) for f in fields(Places) if f.name in given}
    try:
        settings = from_flags(given, {**GUARDS_ALL, **os.environ})
        sidecar = Sidecar(Places(**places), settings)
    except (SettingsError, ValueError, OSError) as wrong:
        print(f"the settings are wrong:\n{wrong}", file=sys.stderr)
        return USAGE
    sidecar.run()
    return 0 if sidecar.server.started else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="guard-sidecar",
        description="Screens what goes to a model's server and what comes from it.",
        epilog=EPILOG,
    )
    place = parser.add_argument_group("places")
    place.add_argument("--upstream", required=True, help="http://host:port or unix:/path")
    place.add_argument("--listen", help="host:port or unix:/path (127.0.0.1:8080)")
    place.add_argument("--admin", help="where /livez, /readyz, /metrics listen (127.0.0.1:9091)")
    place.add_argument("--drain-s", type=float, help="time to finish at the end, in seconds (25)")
    place.add_argument("--connections", type=int, help="at most so many at once (4096)")
    place.add_argument("--connect-timeout-s", type=float, help="to the upstream, in seconds (5)")
    place.add_argument("--read-timeout-s", type=float, help="of its silence, in seconds (600)")
    add_log_level(place)
    add_settings(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
