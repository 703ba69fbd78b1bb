"""Where the guard is: at an address, or inside this process for as long as it is asked."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from guard_middleware.channel import TLS
from guard_service.cli import exits

SERVER_VARIABLE = "GUARDCTL_SERVER"


@dataclass(frozen=True, slots=True)
class Place:
    """What a verb's options say about the guard to ask."""

    server: str = ""
    model: str = ""
    policies: tuple[Path, ...] = ()
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    @property
    def address(self) -> str:
        """The server to ask; empty when the guard runs in this process."""
        if self.model or self.policies:
            return self.server
        return self.server or os.environ.get(SERVER_VARIABLE, "")

    @contextmanager
    def open(self) -> Iterator[tuple[str, TLS | None]]:
        """Target and TLS of the guard; one in this process is stopped on leaving."""
        if self.address and (self.model or self.policies):
            exits.fail("--model and --policies are for a guard without --server", exits.USAGE)
        if self.address:
            yield self.address, self._tls()
            return
        if self.ca or self.cert or self.key:
            exits.fail("--ca, --cert and --key need --server", exits.USAGE)
        with _in_process(self.model or "starter", self.policies) as target:
            yield target, None

    def _tls(self) -> TLS | None:
        if not (self.ca or self.cert or self.key):
            return None
        try:
            return TLS(roots=self.ca, certificate=self.cert, key=self.key)
        except ValueError as wrong:
            exits.fail(str(wrong), exits.USAGE)


@contextmanager
def _in_process(model: str, policies: tuple[Path, ...]) -> Iterator[str]:
    from guard_policies.loader import PolicyError
    from guard_service.config import Settings
    from guard_service.errors import GuardServiceError
    from guard_service.server import local_server

    try:
        settings = Settings(model=model, policies=policies, metrics=False, log_level="error")
        serving = local_server(settings)
        target = serving.__enter__()
    except PolicyError as wrong:
        exits.fail("\n".join(map(str, wrong.problems)))
    except (GuardServiceError, ValueError, OSError) as wrong:
        exits.fail(f"cannot run a guard here: {wrong}")
    try:
        yield target
    finally:
        serving.__exit__(None, None, None)
