"""Bearer tokens that the service knows by digest only: made, digested, found in constant time."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

PREFIX = "guard_"  # lets scanners of leaked secrets know one
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
MOST_CHARS = 8_192  # of a bearer token of any kind
FEWEST_CHARS = 32  # a digest without salt protects only what nobody can guess


def new_token() -> str:
    """A token of 256 random bits."""
    return PREFIX + secrets.token_urlsafe(32)


def digest_of(token: str) -> str:
    """What is kept of a token; SHA-256 is enough for what nobody can guess."""
    return "sha256:" + hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True, slots=True)
class Token:
    """A token that is known: to whom it belongs, and until when."""

    digest: str
    tenant: str
    name: str = ""
    expires: datetime | None = None

    def expired(self, now: datetime) -> bool:
        """Whether it counts no more."""
        return self.expires is not None and self.expires <= now


class KnownTokens:
    """Finds a token by its digest, in a time that tells nothing about the tokens that are known.

    The table is keyed by an HMAC under a secret of this process, so that nobody can choose where in
    it a guess falls.
    """

    def __init__(self, tokens: Iterable[Token]) -> None:
        self._secret = secrets.token_bytes(32)
        self._tokens = {self._place(token.digest): token for token in tokens}

    def __len__(self) -> int:
        return len(self._tokens)

    def find(self, presented: str) -> Token | None:
        """The token, expired or not; None for one that is not known."""
        digest = digest_of(presented)
        found = self._tokens.get(self._place(digest))
        if found is None or not hmac.compare_digest(found.digest, digest):
            return None
        return found

    def _place(self, digest: str) -> bytes:
        return hmac.digest(self._secret, digest.encode(), "sha256")


def now() -> datetime:
    """In UTC."""
    return datetime.now(UTC)
