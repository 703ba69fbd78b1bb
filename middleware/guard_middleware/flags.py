"""Flags and environment of our commands: places, logs, and a setting each."""

from __future__ import annotations

import argparse
import logging
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from guard_middleware.settings import ENVIRONMENT_PREFIX, FIELDS
from guard_service import logs

T = TypeVar("T")

EPILOG = (
    f"Each setting can also be given as {ENVIRONMENT_PREFIX}NAME, a place as {{}}NAME; "
    "flags go first."
)
# All that is behind a sidecar or a processor is a model's, unless told otherwise.
GUARDS_ALL = {f"{ENVIRONMENT_PREFIX}GUARDED": "/"}
# What Kubernetes puts in the environment of pods beside a service that is named like a command.
_LINKS = ("SERVICE_", "PORT")


def add_settings(parser: argparse.ArgumentParser) -> None:
    """A flag for each setting, with its reason and its default."""
    knobs = parser.add_argument_group("settings")
    for name, knob in FIELDS.items():
        default = ",".join(knob.default) if isinstance(knob.default, tuple) else knob.default
        text = f"{knob.metadata['why']} ({default})".replace("%", "%%")
        knobs.add_argument(f"--{name.replace('_', '-')}", help=text, metavar="VALUE")


def take_places(
    kind: type[T], prefix: str, flags: dict[str, Any], environment: Mapping[str, str]
) -> T:
    """A dataclass from flags, which are taken out, and below them from variables that begin with
    `prefix`. Raises ValueError with every mistake."""
    types, known = typing.get_type_hints(kind), {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    found, wrong = {}, []
    for key, text in environment.items():
        name = key.removeprefix(prefix).lower()
        if not key.startswith(prefix) or key.removeprefix(prefix).startswith(_LINKS):
            continue
        if name not in known:
            wrong.append(f"{key}: there is no such place")
        else:
            try:
                found[name] = types[name](text)
            except ValueError:
                wrong.append(f"{key}: is not a number")
    found |= {name: flags.pop(name) for name in known if name in flags}
    for name, one in known.items():
        if one.default is MISSING and name not in found:
            wrong.append(f"{name}: must be given, as --{name} or {prefix}{name.upper()}")
    if wrong:
        raise ValueError("\n".join(wrong))
    return kind(**found)


def add_logs(parser: argparse._ArgumentGroup) -> None:
    """--log-level and --log-format."""
    parser.add_argument(
        "--log-level", default="info", choices=["debug", "info", "warning", "error"]
    )
    styles = "json: an object in each line; text; auto: text on a terminal, else json (auto)"
    parser.add_argument(
        "--log-format", default="auto", choices=["auto", "json", "text"], help=styles
    )


def set_up_logs(flags: dict[str, Any]) -> None:
    """Send the logs of this process to stderr as the two flags say, which are taken out."""
    logs.set_up(flags.pop("log_level"), flags.pop("log_format"), logging.Formatter("%(message)s"))
