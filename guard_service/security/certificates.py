"""The server's certificate and the CA of its clients: read whole, renewed without a restart."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
)

from guard_service.live.watching import Watched
from guard_service.metrics import SecurityMetrics

LOG = logging.getLogger(__name__)


class CertificateError(ValueError):
    """What is wrong with the TLS files; names the file, holds nothing of it."""


@dataclass(frozen=True, slots=True)
class Certificates:
    """PEM data that belongs together; `expires` is the first expiry of the chain."""

    chain: bytes
    key: bytes
    client_ca: bytes | None
    expires: datetime

    def configuration(self) -> grpc.ServerCertificateConfiguration:
        """For gRPC."""
        return grpc.ssl_server_certificate_configuration([(self.key, self.chain)], self.client_ca)


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Where they are."""

    cert: Path
    key: Path
    client_ca: Path | None

    @property
    def paths(self) -> tuple[Path, ...]:
        """All of them."""
        return (self.cert, self.key, *((self.client_ca,) if self.client_ca else ()))

    def read(self) -> Certificates:
        """Raises CertificateError for what does not belong together, is cut off or has expired."""
        chain, key = _bytes(self.cert), _bytes(self.key)
        certificates = _parsed(self.cert, chain)
        if _public(self.key, key) != _spki(certificates[0]):
            raise CertificateError(f"{self.key} is not the key of {self.cert}")
        expires = min(one.not_valid_after_utc for one in certificates)
        if expires <= datetime.now(UTC):
            raise CertificateError(f"{self.cert} has expired ({expires:%Y-%m-%d %H:%M} UTC)")
        client_ca = None
        if self.client_ca is not None:
            client_ca = _bytes(self.client_ca)
            _parsed(self.client_ca, client_ca)
        return Certificates(chain, key, client_ca, expires)


class ServerTls:
    """gRPC's credentials, which every handshake takes anew.

    Connections that stand keep the certificate they began with, until they reach their highest age
    (server.py).
    """

    def __init__(self, files: TlsFiles, metrics: SecurityMetrics) -> None:
        """Raises CertificateError."""
        self._files = files
        self._metrics = metrics
        self._used = files.read()
        self._next: Certificates | None = None  # not yet asked for by a handshake
        metrics.tls_expires.set(self._used.expires.timestamp())

    def credentials(self) -> grpc.ServerCredentials:
        """For add_secure_port."""
        return grpc.dynamic_ssl_server_credentials(
            self._used.configuration(),
            self._fetched,  # type: ignore[arg-type]  # gRPC takes None: nothing is new
            self._files.client_ca is not None,
        )

    @property
    def watched(self) -> Watched[Certificates]:
        """How it is renewed."""
        return Watched("tls", self._files.paths, self._files.read, self._use, self._failed)

    async def _use(self, certificates: Certificates) -> None:
        if certificates == self._used:
            return
        self._used = self._next = certificates
        self._metrics.tls_expires.set(certificates.expires.timestamp())
        self._metrics.reloads.labels("tls", "ok").inc()
        LOG.info("new certificate in use, until %s", certificates.expires.isoformat())

    def _failed(self, error: Exception) -> None:
        self._metrics.reloads.labels("tls", "failed").inc()
        LOG.error("the certificate before stays in use: %s", error)

    def _fetched(self) -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC in threads of its own, before each handshake; None: as before."""
        certificates, self._next = self._next, None
        return certificates.configuration() if certificates is not None else None


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CertificateError(f"{path}: {error.strerror or error}") from None


def _parsed(path: Path, pem: bytes) -> Sequence[x509.Certificate]:
    if pem.count(b"-----BEGIN ") != pem.count(b"-----END "):
        raise CertificateError(f"{path} is cut off")
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError:
        raise CertificateError(f"{path} has no certificate in PEM that can be read") from None


def _public(path: Path, pem: bytes) -> bytes:
    try:
        key = load_pem_private_key(pem, password=None)
    except TypeError:
        raise CertificateError(f"{path} is encrypted; give the key without a password") from None
    except (ValueError, UnsupportedAlgorithm):
        raise CertificateError(f"{path} is no private key in PEM that can be read") from None
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _spki(certificate: x509.Certificate) -> bytes:
    public = certificate.public_key()
    return public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
