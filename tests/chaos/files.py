"""The files that guards of a run read and write: all that can be exchanged, spoiled or filled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.disks import Disks
from tests.chaos.keys import Keys
from tests.chaos.models import Models
from tests.chaos.truth import SHIELD, Policies


@dataclass(frozen=True, slots=True)
class Files:
    """Policies and audit logs of all guards; certificate and model of the starter guard."""

    policies: Policies
    keys: Keys
    models: Models
    disks: Disks

    @classmethod
    def below(cls, folder: Path, policies: Policies) -> Files:
        """Made anew."""
        return cls(policies, Keys(folder), Models(folder), Disks(folder))

    def flags(self, name: str, starter: bool) -> Mapping[str, object]:
        """Of guard-service."""
        flags: dict[str, object] = {
            "model": self.models.link if starter else "fake-vision",
            "policies": self.policies.folder,
            "default-policy": SHIELD,
            "audit": self.disks.of(name),
            "audit-key": self.disks.key,
        }
        if starter:
            flags |= {"tls-cert": self.keys.cert, "tls-key": self.keys.key}
        return flags
