"""The certificate of a guard: renewed, spoiled, and which one it shows."""

from __future__ import annotations

import asyncio
import socket
import ssl
from pathlib import Path

from tests.service.security.issuing import Authority, Issued

NAME = "guard"  # in the certificate


class Keys:
    """A root of our own and the files of one server."""

    def __init__(self, folder: Path) -> None:
        self._authority = Authority("chaos")
        self.cert, self.key = folder / "tls.crt", folder / "tls.key"
        self.root = self._authority.root
        self._issued = self._authority.issue(NAME)
        self._issued.write(self.cert, self.key)

    def renew(self) -> None:
        """Another pair; two files, which for a moment do not belong together."""
        self._issued = self._authority.issue(NAME)
        self._issued.write(self.cert, self.key)

    def spoil(self) -> None:
        """Half of a certificate, and the key of another."""
        other: Issued = self._authority.issue(NAME)
        self.cert.write_bytes(other.cert[: len(other.cert) // 2])

    async def shown(self, port: int) -> bool:
        """Whether a new connection to the port gets the certificate that was issued last."""
        found = await asyncio.to_thread(_served, port)
        return found == ssl.PEM_cert_to_DER_cert(self._issued.cert.decode())


def _served(port: int) -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
        context.wrap_socket(plain) as wrapped,
    ):
        return wrapped.getpeercert(binary_form=True) or b""
