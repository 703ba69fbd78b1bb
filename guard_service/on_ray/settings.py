"""Settings of a replica: those of guard-service, from the same three places."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from guard_service.config import Settings, load

CONFIG = "config"


def settings_of(
    given: Mapping[str, Any], cpus: float = 0.0, environment: Mapping[str, str] = os.environ
) -> Settings:
    """From the application's arguments, then GUARD_* of the environment, then a file: that which
    `config` names among the arguments, or GUARD_CONFIG.

    Unless set, the engine has as many threads as the replica has CPUs: Ray reserves these, and a
    process sees all of its node's. Raises ConfigError with every mistake.
    """
    values = {name: value for name, value in given.items() if name != CONFIG}
    variables = {name: value for name, value in environment.items() if name != "GUARD_CONFIG"}
    file = given.get(CONFIG) or environment.get("GUARD_CONFIG")
    loaded = load(values, variables, Path(file) if file else None)
    if "threads" in loaded.sources or cpus < 1:
        return loaded.settings
    return replace(loaded.settings, threads=int(cpus))
