"""Where the guard is: at an address, or our own for as long as it is asked."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guard_middleware.bearer import TokenFile, check_private
from guard_middleware.channel import TLS
from guard_middleware.targets import check_reachable, check_target
from guard_service.cli import exits
from guard_service.cli.apart import guard_apart

SERVER_VARIABLE = "GUARDCTL_SERVER"


def is_checkpoint(model: str) -> bool:
    """Whether a model's folder is a checkpoint in the Hugging Face layout, not an artifact."""
    folder = Path(model)
    return (
        bool(model) and (folder / "config.json").is_file() and not (folder / "guard.json").exists()
    )


@dataclass(frozen=True, slots=True)
class Place:
    """What a verb's options say about the guard to ask."""

    server: str = ""
    model: str = ""
    policies: tuple[Path, ...] = ()
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    token_file: Path | None = None

    @property
    def address(self) -> str:
        """The server to ask; empty when the guard runs in this process."""
        if self.model or self.policies:
            return self.server
        return self.server or os.environ.get(SERVER_VARIABLE, "")

    @contextmanager
    def open(self, apart: bool = False) -> Iterator[tuple[str, TLS | None]]:
        """Target and TLS of the guard; one of our own is stopped on leaving.

        Our own runs in this process, or `apart` in another: slower to start, faster under load.
        """
        if self.address and (self.model or self.policies):
            exits.fail("--model and --policies are for a guard without --server", exits.USAGE)
        if self.address:
            yield self._checked(), self._tls()
            return
        if self.ca or self.cert or self.key:
            exits.fail("--ca, --cert and --key need --server", exits.USAGE)
        start = guard_apart if apart else guard_here
        with start(self.model or "starter", self.policies) as target:
            yield target, None

    @property
    def token(self) -> TokenFile | None:
        """What to send to the server; None for a guard of our own."""
        if self.token_file is None or not self.address:
            return None
        try:
            check_private(self.address, self._tls() is not None)
            return TokenFile(self.token_file)
        except ValueError as wrong:
            exits.fail(str(wrong), exits.USAGE)

    def _checked(self) -> str:
        try:
            check_target(self.address)
            check_reachable(self.address, os.environ)
        except ValueError as wrong:
            exits.fail(str(wrong), exits.USAGE)
        return self.address

    def _tls(self) -> TLS | None:
        if not (self.ca or self.cert or self.key):
            return None
        try:
            return TLS(roots=self.ca, certificate=self.cert, key=self.key)
        except ValueError as wrong:
            exits.fail(str(wrong), exits.USAGE)


@contextmanager
def guard_here(model: str, policies: tuple[Path, ...], **knobs: Any) -> Iterator[str]:
    """A guard in this process, with more settings; stopped on leaving. Yields its target. Ends
    guardctl on failure."""
    from guard_policies.loader import PolicyError
    from guard_service.config import Settings
    from guard_service.engines import EngineFailed
    from guard_service.errors import GuardServiceError
    from guard_service.local import local_server

    try:
        settings = Settings(
            model=model, policies=policies, metrics=False, log_level="error", **knobs
        )
        serving = local_server(settings)
        target = serving.__enter__()
    except PolicyError as wrong:
        exits.fail("\n".join(map(str, wrong.problems)))
    except (EngineFailed, GuardServiceError, ValueError, OSError) as wrong:
        exits.fail(f"cannot run a guard here: {wrong}")
    try:
        yield target
    finally:
        serving.__exit__(None, None, None)
