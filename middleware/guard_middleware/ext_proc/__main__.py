"""The command guard-ext-proc: an external processor for Envoy."""

from __future__ import annotations

import argparse
import asyncio
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
PREFIX = "GUARD_EXT_PROC_"


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal; returns the exit code."""
    arguments = vars(parser().parse_args(argv))
    set_up_logs(arguments)
    try:
        from guard_middleware.ext_proc.server import Places, Server  # needs the extra
    except ModuleNotFoundError as missing:
        print(f"{missing}; pip install 'llama-guard-service[envoy]'", file=sys.stderr)
        return USAGE
    given = {name: value for name, value in arguments.items() if value is not None}
    try:
        places = take_places(Places, PREFIX, given, os.environ)
        server = Server(places, from_flags(given, {**GUARDS_ALL, **os.environ}))
    except (SettingsError, ValueError, OSError) as wrong:
        print(f"the settings are wrong:\n{wrong}", file=sys.stderr)
        return USAGE
    try:
        asyncio.run(server.until_signal())
    except RuntimeError as wrong:
        print(f"cannot listen: {wrong}", file=sys.stderr)
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    """Its flags."""
    made = argparse.ArgumentParser(
        prog="guard-ext-proc",
        description="Screens, for Envoy, what goes to models and what comes from them.",
        epilog=EPILOG.format(PREFIX),
    )
    place = made.add_argument_group("places")
    place.add_argument("--listen", help="host:port or unix:/path for Envoy (127.0.0.1:9002)")
    place.add_argument("--admin", help="where /livez, /readyz, /metrics listen (127.0.0.1:9091)")
    place.add_argument("--drain-s", type=float, help="time to finish at the end, in seconds (25)")
    place.add_argument("--exchanges", type=int, help="at most so many at once (4096)")
    place.add_argument("--tls-certificate", metavar="FILE", help="PEM file: listen by TLS")
    place.add_argument("--tls-key", metavar="FILE", help="PEM file of its key")
    place.add_argument("--tls-clients", metavar="FILE", help="roots of who may connect; empty: all")
    add_logs(place)
    add_settings(made)
    return made


if __name__ == "__main__":
    sys.exit(main())
