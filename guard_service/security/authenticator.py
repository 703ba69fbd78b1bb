"""Who calls: from a call's credentials to the tenant that it is served as."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.x509.oid import NameOID

from guard_service.errors import (
    ExpiredCredentials,
    GuardServiceError,
    InvalidCredentials,
    NoTenant,
    Unauthenticated,
)
from guard_service.live.watching import Watched
from guard_service.metrics import SecurityMetrics
from guard_service.security.auth_file import AuthFile, read_auth_file
from guard_service.security.jwts import Issuers, Seen
from guard_service.security.tenants import Tenant, Tenants, Usage
from guard_service.security.tokens import MOST_CHARS, KnownTokens, now

LOG = logging.getLogger(__name__)
BEARER = "bearer "


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls. `name` is the credential's in the auth file, where it has one there."""

    usage: Usage
    name: str = ""


class Authenticator:
    """Knows callers by what the auth file says. For one event loop."""

    def __init__(
        self,
        file: Path,
        default_policy: str,
        metrics: SecurityMetrics,
        max_calls: int,
        clock: Callable[[], datetime] = now,
    ) -> None:
        """`max_calls` is the service's: of several tenants, one whose `calls` are not bounded has
        half of them at most. Raises PolicyError with everything that is wrong with the file."""
        self._file, self._default_policy = file, default_policy
        self.metrics, self._clock = metrics, clock
        self._most_calls = max(max_calls // 2, 1)
        self.tenants = Tenants(lambda *labels: metrics.tenant_refused.labels(*labels).inc())
        self._seen = Seen()
        self._put(self._read())

    @property
    def watched(self) -> Watched[AuthFile]:
        """How the file is renewed: as a whole, or not at all."""
        paths = (self._file, *self._said.files)
        return Watched("auth", paths, self._read, self._use, self._failed)

    def by_header(self, said: Sequence[str | bytes]) -> Caller | None:
        """Who sent a bearer token: what the call's `authorization` metadata say, all of them.

        None where there is none, but a certificate may tell. Raises Unauthenticated and its like,
        NoTenant, and Overloaded.
        """
        try:
            if len(said) > 1:  # one of them may be a proxy's, one the caller's own
                raise InvalidCredentials
            if said:
                return self._by_token(said[0])
            if not self._said.certificates:
                raise Unauthenticated
        except GuardServiceError as error:
            raise self._counted(error) from None
        return None

    def by_certificate(self, peer: Mapping[str, Iterable[bytes]]) -> Caller:
        """Who showed a certificate that the TLS layer has checked: gRPC's auth context."""
        names = list(_names(peer))
        found = {self._said.certificates[one] for one in names if one in self._said.certificates}
        try:
            if not names:
                raise Unauthenticated
            if len(found) != 1:  # nobody's, or two tenants'
                raise NoTenant
            return Caller(self.tenants.of(found.pop()))
        except GuardServiceError as error:
            raise self._counted(error) from None

    def may_read_metrics(self, authorization: str) -> bool:
        """Whether whoever sends this HTTP header may. For any thread."""
        if not len(self._readers):
            return True
        token = self._readers.find(_bearer(authorization) or "")
        return token is not None and not token.expired(self._clock())

    def _by_token(self, said: str | bytes) -> Caller:
        token = _bearer(said)
        if token is None:
            raise InvalidCredentials
        if (known := self._known.find(token)) is not None:
            if known.expired(self._clock()):
                raise ExpiredCredentials
            return Caller(self.tenants.of(known.tenant), known.name)
        try:
            return Caller(self.tenants.of(self._issuers.tenant_of(token)))
        except KeyError:
            raise NoTenant from None

    def _counted(self, error: GuardServiceError) -> GuardServiceError:
        self.metrics.credentials_refused.labels(error.reason).inc()
        return error

    def _read(self) -> AuthFile:
        return read_auth_file(self._file, self._default_policy)

    def _put(self, said: AuthFile) -> None:
        self._said = said
        self._known, self._readers = KnownTokens(said.tokens), KnownTokens(said.metrics)
        self._issuers = Issuers(said.issuers, self._seen, lambda: self._clock().timestamp())
        several = len(said.tenants) > 1
        self.tenants.become(map(self._bounded, said.tenants) if several else said.tenants)

    def _bounded(self, tenant: Tenant) -> Tenant:
        """With a bound of calls, so that there is room for others."""
        calls = min(tenant.bounds.calls, self._most_calls)
        return replace(tenant, bounds=replace(tenant.bounds, calls=calls))

    async def _use(self, said: AuthFile) -> None:
        if said == self._said:
            return
        if said.files != self._said.files:
            LOG.warning("the auth file names other files of keys; they are followed from a restart")
        self._put(said)
        self.metrics.reloads.labels("auth", "ok").inc()
        LOG.info("new auth file in use: %d tenants", len(said.tenants))

    def _failed(self, error: Exception) -> None:
        self.metrics.reloads.labels("auth", "failed").inc()
        LOG.error("the auth file before stays in use: %s", error)


def _bearer(said: str | bytes) -> str | None:
    """The token of an authorization header; None for what is none."""
    if not isinstance(said, str) or said[: len(BEARER)].lower() != BEARER:
        return None
    token = said[len(BEARER) :].strip()
    return token if 0 < len(token) <= MOST_CHARS and token.isascii() else None


def _names(peer: Mapping[str, Iterable[bytes]]) -> Iterator[tuple[str, str]]:
    """What a certificate is for, by kind; its common name counts too."""
    for pem in peer.get("x509_pem_cert", ()):
        certificate = x509.load_pem_x509_certificate(pem)
        for attribute in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME):
            yield "cn", str(attribute.value)
        try:
            said = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        except (x509.ExtensionNotFound, ValueError):
            continue
        for kind, of in (
            ("dns", x509.DNSName),
            ("uri", x509.UniformResourceIdentifier),
            ("email", x509.RFC822Name),
        ):
            for name in said.value.get_values_for_type(of):
                yield kind, str(name).lower() if kind == "dns" else str(name)
