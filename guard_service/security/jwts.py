"""JSON Web Tokens: whose signatures count, for what audience, and what they make of a caller."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jwt

from guard_service.errors import ExpiredCredentials, InvalidCredentials, NoTenant, Overloaded
from guard_service.security.keys import Key

# Signatures by a private key only: with a shared secret, whoever may check could also sign, and a
# public key could be taken for the secret.
ALGORITHMS = (
    *("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    *("ES256", "ES384", "ES512", "EdDSA"),
)
MOST_SEEN = 100_000  # ids of tokens that may be used once, about 200 bytes each


@dataclass(frozen=True, slots=True)
class Issuer:
    """Whose tokens count, and how far. Times in seconds."""

    issuer: str
    audiences: tuple[str, ...]
    algorithms: tuple[str, ...]
    keys: tuple[Key, ...]
    leeway_s: float = 30.0
    max_lifetime_s: float = 86_400.0  # that a token may still have
    once: bool = False  # each token is good for one call; it must have an id (jti)
    tenant: str = ""  # of all its tokens; or
    tenant_claim: str = ""  # the claim that names the tenant; or
    subjects: Mapping[str, str] = field(default_factory=dict)  # tenants by `sub`


class Seen:
    """Ids of tokens that were used, until they expire. For one event loop."""

    def __init__(self, most: int = MOST_SEEN) -> None:
        self._most = most
        self._until: dict[tuple[str, str], float] = {}

    def use(self, issuer: str, jti: str, until: float, now: float) -> None:
        """Raises InvalidCredentials for what was used before, Overloaded when there is no room."""
        key = (issuer, jti)
        if self._until.get(key, -1.0) >= now:
            raise InvalidCredentials
        if len(self._until) >= self._most:
            self._until = {one: end for one, end in self._until.items() if end >= now}
        if len(self._until) >= self._most:
            raise Overloaded("too many tokens that may be used once; retry later", 1.0)
        self._until[key] = until


class Issuers:
    """Checks tokens of several issuers."""

    def __init__(
        self,
        issuers: Sequence[Issuer],
        seen: Seen | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._issuers = {one.issuer: one for one in issuers}
        self._seen = seen or Seen()
        self._clock = clock

    def tenant_of(self, token: str) -> str:
        """The name of the tenant. Raises InvalidCredentials, ExpiredCredentials or NoTenant."""
        try:
            header = jwt.get_unverified_header(token)
            said = jwt.decode(token, options={"verify_signature": False})
        except (jwt.PyJWTError, ValueError, RecursionError):
            raise InvalidCredentials from None
        name = said.get("iss")
        issuer = self._issuers.get(name) if isinstance(name, str) else None
        if issuer is None or header.get("alg") not in issuer.algorithms:
            raise InvalidCredentials
        claims = self._verified(token, header, issuer)
        tenant = _tenant(issuer, claims)
        if issuer.once:
            until = float(claims["exp"]) + issuer.leeway_s
            self._seen.use(issuer.issuer, str(claims["jti"]), until, self._clock())
        return tenant

    def _verified(self, token: str, header: dict[str, Any], issuer: Issuer) -> dict[str, Any]:
        """The claims of a token that holds under one of its issuer's keys."""
        for key in _candidates(issuer, header):
            try:
                claims: dict[str, Any] = jwt.decode(
                    token,
                    key.key,
                    algorithms=[str(header["alg"])],
                    audience=issuer.audiences,
                    issuer=issuer.issuer,
                    options={
                        "require": ["iss", "aud", "exp", *(["jti"] if issuer.once else [])],
                        "verify_exp": False,  # by our own clock, below
                        "verify_nbf": False,
                        "verify_iat": False,
                    },
                )
            except (jwt.InvalidSignatureError, jwt.InvalidKeyError, TypeError):
                continue  # another key, or one of another kind
            except (jwt.PyJWTError, ValueError):
                raise InvalidCredentials from None
            self._check_times(claims, issuer)
            return claims
        raise InvalidCredentials

    def _check_times(self, claims: dict[str, Any], issuer: Issuer) -> None:
        now, leeway_s = self._clock(), issuer.leeway_s
        expires, begins = claims["exp"], claims.get("nbf", 0)
        issued = claims.get("iat", 0)
        if not all(type(one) in (int, float) for one in (expires, begins, issued)):
            raise InvalidCredentials
        if expires + leeway_s <= now:
            raise ExpiredCredentials
        if max(begins, issued) > now + leeway_s:
            raise InvalidCredentials
        if expires - now > issuer.max_lifetime_s + leeway_s:
            raise InvalidCredentials


def _candidates(issuer: Issuer, header: dict[str, Any]) -> list[Key]:
    """Keys that may have signed: by id, where the token names one."""
    kid = header.get("kid", "")
    keys = [one for one in issuer.keys if one.algorithm in ("", header["alg"])]
    if not kid:
        return keys
    return [one for one in keys if one.kid in ("", kid)]


def _tenant(issuer: Issuer, claims: dict[str, Any]) -> str:
    if issuer.tenant:
        return issuer.tenant
    named = claims.get(issuer.tenant_claim or "sub")
    if not isinstance(named, str):
        raise NoTenant
    if issuer.tenant_claim:
        return named
    if named not in issuer.subjects:
        raise NoTenant
    return issuer.subjects[named]
