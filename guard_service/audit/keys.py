"""The key of an audit log, and what is made of it: one key for the chain, one for fingerprints."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, field
from pathlib import Path

LEAST_BYTES = 32


class AuditError(Exception):
    """Why there is no audit log. The text says what to do."""


@dataclass(frozen=True, slots=True)
class Keys:
    """Keys of one log. `name` tells keys apart and gives nothing of them away."""

    name: str
    chain: bytes = field(repr=False)
    prints: bytes = field(repr=False)


def read_keys(file: Path) -> Keys:
    """The keys of a file that holds at least 32 bytes: `openssl rand -hex 32 > FILE`.

    White space around them does not count. Raises AuditError.
    """
    try:
        secret = file.read_bytes().strip()
    except OSError as error:
        raise AuditError(f"audit key {file}: {error.strerror}") from error
    if len(secret) < LEAST_BYTES:
        raise AuditError(
            f"audit key {file}: has {len(secret)} bytes; make one of at least {LEAST_BYTES}: "
            f"openssl rand -hex 32 > {file}"
        )
    return keys_of(secret)


def keys_of(secret: bytes) -> Keys:
    """The keys that a secret stands for."""

    def part(name: str) -> bytes:
        return hmac.digest(secret, f"guard-audit 1 {name}".encode(), hashlib.sha256)

    return Keys(part("name").hex()[:16], part("chain"), part("fingerprints"))
