"""The flags of our commands: a setting each."""

from __future__ import annotations

import argparse

from guard_middleware.settings import ENVIRONMENT_PREFIX, FIELDS

EPILOG = f"Each setting can also be given as {ENVIRONMENT_PREFIX}NAME; flags go first."
# All that is behind a sidecar or a processor is a model's, unless told otherwise.
GUARDS_ALL = {f"{ENVIRONMENT_PREFIX}GUARDED": "/"}


def add_settings(parser: argparse.ArgumentParser) -> None:
    """A flag for each setting, with its reason and its default."""
    knobs = parser.add_argument_group("settings")
    for name, knob in FIELDS.items():
        default = ",".join(knob.default) if isinstance(knob.default, tuple) else knob.default
        text = f"{knob.metadata['why']} ({default})".replace("%", "%%")
        knobs.add_argument(f"--{name.replace('_', '-')}", help=text, metavar="VALUE")


def add_log_level(parser: argparse._ArgumentGroup) -> None:
    """--log-level."""
    parser.add_argument(
        "--log-level", default="info", choices=["debug", "info", "warning", "error"]
    )
