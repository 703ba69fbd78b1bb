"""TLS between Envoy and the processor: files that may be renewed while it serves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc

from guard_middleware.channel import TLS
from guard_middleware.tls_files import LOOK_S, TlsFiles


def credentials(
    certificate: str, key: str, clients: str = "", look_s: float = LOOK_S
) -> grpc.ServerCredentials:
    """Credentials of PEM files. With `clients`, the roots of those that may connect, others may
    not. New files are taken with the next connection, those that cannot be used never. Raises
    OSError and ValueError for files that cannot be used now.
    """
    roots = Path(clients) if clients else None
    files = TlsFiles(TLS(roots, Path(certificate), Path(key)), look_s)
    files.check()

    def read() -> grpc.ServerCertificateConfiguration:
        pair = (Path(key).read_bytes(), Path(certificate).read_bytes())
        return grpc.ssl_server_certificate_configuration(
            [pair], roots.read_bytes() if roots else None
        )

    def fetch() -> Any:  # None: as they were, which the stubs do not know
        return read() if files.renewed() else None

    return grpc.dynamic_ssl_server_credentials(read(), fetch, bool(clients))
