"""A certificate authority for tests, and channels to servers with its certificates."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

DAY = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate and its key, in PEM."""

    cert: bytes
    key: bytes

    def write(self, cert: Path, key: Path) -> None:
        """To the two files of a server."""
        cert.write_bytes(self.cert)
        key.write_bytes(self.key)


@dataclass
class Authority:
    """Issues certificates under its own root."""

    name: str = "ca"
    key: ec.EllipticCurvePrivateKey = field(
        default_factory=lambda: ec.generate_private_key(ec.SECP256R1())
    )

    @property
    def root(self) -> bytes:
        """Its own certificate."""
        return self._signed(self.name, self.key, 0 * DAY, 30 * DAY, ca=True)

    def issue(
        self,
        name: str = "guard",
        *names: x509.GeneralName,
        since: timedelta = 0 * DAY,
        lasts: timedelta = 7 * DAY,
    ) -> Issued:
        """For a common name, and other names; without, the common name is a DNS name too."""
        key = ec.generate_private_key(ec.SECP256R1())
        cert = self._signed(name, key, since, lasts, names or (x509.DNSName(name),))
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return Issued(cert, pem)

    def _signed(
        self,
        name: str,
        key: ec.EllipticCurvePrivateKey,
        since: timedelta,
        lasts: timedelta,
        names: tuple[x509.GeneralName, ...] = (),
        ca: bool = False,
    ) -> bytes:
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self.name)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + since - timedelta(minutes=5))
            .not_valid_after(now + since + lasts)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self.key, hashes.SHA256()).public_bytes(Encoding.PEM)


def secure_channel(target: str, roots: bytes, own: Issued | None = None) -> grpc.aio.Channel:
    """To a server whose certificate is for the name "guard", on a connection of its own."""
    credentials = grpc.ssl_channel_credentials(
        roots, own.key if own else None, own.cert if own else None
    )
    options = [("grpc.ssl_target_name_override", "guard"), ("grpc.use_local_subchannel_pool", 1)]
    return grpc.aio.secure_channel(target, credentials, options=options)
