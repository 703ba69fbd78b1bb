"""The command guard-ext-proc: an external processor for Envoy."""

from __future__ import annotations

import argparse
import asyncio
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
    arguments = vars(parser().parse_args(argv))
    logging.basicConfig(level=arguments.pop("log_level").upper(), format="%(message)s")
    try:
        from guard_middleware.ext_proc.server import Places, Server  # needs the extra
    except ModuleNotFoundError as missing:
        print(f"{missing}; pip install 'llama-guard-service[envoy]'", file=sys.stderr)
        return USAGE
    given = {name: value for name, value in arguments.items() if value is not None}
    places = {f.name: given.pop(f.name) for f in fields(Places) if f.name in given}
    try:
        settings = from_flags(given, {**GUARDS_ALL, **os.environ})
        server = Server(Places(**places), settings)
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
        epilog=EPILOG,
    )
    place = made.add_argument_group("places")
    place.add_argument("--listen", help="host:port or unix:/path for Envoy (127.0.0.1:9002)")
    place.add_argument("--admin", help="where /livez, /readyz, /metrics listen (127.0.0.1:9091)")
    place.add_argument("--drain-s", type=float, help="time to finish at the end, in seconds (25)")
    place.add_argument("--exchanges", type=int, help="at most so many at once (4096)")
    place.add_argument("--tls-certificate", metavar="FILE", help="PEM file: listen by TLS")
    place.add_argument("--tls-key", metavar="FILE", help="PEM file of its key")
    place.add_argument("--tls-clients", metavar="FILE", help="roots of who may connect; empty: all")
    add_log_level(place)
    add_settings(made)
    return made


if __name__ == "__main__":
    sys.exit(main())
