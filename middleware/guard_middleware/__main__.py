"""The command guard-sidecar: a screened reverse proxy in front of one backend."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from guard_middleware.flags import (
    EPILOG,
    GUARDS_ALL,
    add_logs,
    add_settings,
    set_up_logs,
    take_places,
)
from guard_middleware.settings import SettingsError, from_flags

USAGE = 2
PREFIX = "GUARD_SIDECAR_"


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal; returns the exit code."""
    arguments = vars(_parser().parse_args(argv))
    set_up_logs(arguments)
    try:
        from guard_middleware.sidecar import Places, Sidecar  # needs the extra
    except ModuleNotFoundError as missing:
        print(f"{missing}; pip install 'llama-guard-service[sidecar]'", file=sys.stderr)
        return USAGE
    given = {name: value for name, value in arguments.items() if value is not None}
    try:
        places = take_places(Places, PREFIX, given, os.environ)
        sidecar = Sidecar(places, from_flags(given, {**GUARDS_ALL, **os.environ}))
    except (SettingsError, ValueError, OSError) as wrong:
        print(f"the settings are wrong:\n{wrong}", file=sys.stderr)
        return USAGE
    sidecar.run()
    return 0 if sidecar.server.started else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="guard-sidecar",
        description="Screens what goes to a model's server and what comes from it.",
        epilog=EPILOG.format(PREFIX),
    )
    place = parser.add_argument_group("places")
    place.add_argument("--upstream", help="http://host:port or unix:/path; must be given")
    place.add_argument("--listen", help="host:port or unix:/path (127.0.0.1:8080)")
    place.add_argument("--admin", help="where /livez, /readyz, /metrics listen (127.0.0.1:9091)")
    place.add_argument("--drain-s", type=float, help="time to finish at the end, in seconds (25)")
    place.add_argument("--connections", type=int, help="at most so many at once (4096)")
    place.add_argument("--connect-timeout-s", type=float, help="to the upstream, in seconds (5)")
    place.add_argument("--read-timeout-s", type=float, help="of its silence, in seconds (600)")
    add_logs(place)
    add_settings(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
