"""Audit logs of guards, one of them on a small disk of its own that can be filled."""

from __future__ import annotations

import secrets
import subprocess
from contextlib import suppress
from pathlib import Path

from guard_service.audit.files import HEAD
from guard_service.audit.keys import read_keys
from guard_service.audit.verifying import Tampered, entries, segments_of, verify

_MIB = 64  # the small disk


class Disks:
    """Folders of audit logs below a folder, and their key."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.key = folder / "audit.key"
        self.key.write_text(secrets.token_hex(32))
        self._small: Path | None = None

    def of(self, name: str) -> Path:
        """Of a guard."""
        return self._folder / f"{name}.audit"

    def mount(self, name: str) -> bool:
        """Give a guard's log a disk of its own; False where that needs rights that we lack."""
        place = self.of(name)
        place.mkdir(mode=0o700, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={_MIB}m,mode=0700", "chaos", str(place)]
        try:
            done = subprocess.run(command, capture_output=True)
        except FileNotFoundError:
            return False
        self._small = place if done.returncode == 0 else None
        return self._small is not None

    @property
    def can_fill(self) -> bool:
        """Whether there is a small disk."""
        return self._small is not None

    def fill(self) -> None:
        """Leave no byte on the small disk."""
        assert self._small is not None
        with suppress(OSError), (self._small / "filling").open("wb", buffering=0) as file:
            while True:
                file.write(b"\0" * 4096)

    def free(self) -> None:
        """Take back what filled it."""
        assert self._small is not None
        (self._small / "filling").unlink(missing_ok=True)

    def close(self) -> None:
        """Take the small disk away, and what is on it."""
        if self._small is not None:
            subprocess.run(["umount", str(self._small)], capture_output=True)
            self._small = None

    def recorded(self, name: str) -> set[str]:
        """The ids of the verdicts in a guard's log. Raises ValueError for one that is not whole."""
        keys, folder = read_keys(self.key), self.of(name)
        segments = segments_of([folder])
        try:
            verify(segments, folder / HEAD, keys)
            lines = list(entries(segments, keys))
        except Tampered as broken:
            raise ValueError(str(broken)) from broken
        return {line["verdict_id"] for line in lines if line["kind"] == "verdict"}
