"""What was judged, sealed for whoever has the private key: the service itself cannot read it again.

HPKE (RFC 9180) in base mode, X25519, HKDF-SHA256, ChaCha20-Poly1305, by the library cryptography.
Keys are PEM files: `openssl genpkey -algorithm X25519 -out private.pem`, and
`openssl pkey -in private.pem -pubout -out public.pem`.
"""

from __future__ import annotations

import base64
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from guard_service.audit.keys import AuditError

_SUITE = hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.CHACHA20_POLY1305)
_MAKE = "openssl genpkey -algorithm X25519 -out private.pem; openssl pkey -in private.pem -pubout"


def read_public(file: Path) -> X25519PublicKey:
    """Raises AuditError."""
    key: object = None
    try:
        key = load_pem_public_key(file.read_bytes())
    except (OSError, ValueError) as error:
        raise _unreadable(file, error) from error
    if not isinstance(key, X25519PublicKey):
        raise _unreadable(file, None)
    return key


def read_private(file: Path) -> X25519PrivateKey:
    """Raises AuditError."""
    key: object = None
    try:
        key = load_pem_private_key(file.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise _unreadable(file, error) from error
    if not isinstance(key, X25519PrivateKey):
        raise _unreadable(file, None)
    return key


def seal(payload: bytes, key: X25519PublicKey, of: str) -> str:
    """Base64 of the sealed payload; `of` names the line that it belongs to and no other."""
    return base64.b64encode(_SUITE.encrypt(payload, key, info=_info(of))).decode()


def unseal(sealed: str, key: X25519PrivateKey, of: str) -> bytes:
    """Raises AuditError for another key, or a payload of another line."""
    try:
        return _SUITE.decrypt(base64.b64decode(sealed, validate=True), key, info=_info(of))
    except (InvalidTag, ValueError) as error:
        raise AuditError("the payload was sealed for another key, or belongs elsewhere") from error


def _info(of: str) -> bytes:
    return b"guard-audit 1 payload\0" + of.encode()


def _unreadable(file: Path, error: Exception | None) -> AuditError:
    why = error.strerror if isinstance(error, OSError) else "is no PEM file of an X25519 key"
    return AuditError(f"payload key {file}: {why}; make a pair: {_MAKE}")
