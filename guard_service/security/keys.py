"""Public keys that tokens are checked with, from a JWKS or from PEM."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_pem_public_key

FEWEST_RSA_BITS = 2048
MOST_KEYS = 64
PUBLIC = (rsa.RSAPublicKey, ec.EllipticCurvePublicKey, ed25519.Ed25519PublicKey)
END_OF_PEM = b"-----END PUBLIC KEY-----"


class KeysError(ValueError):
    """What is wrong with a file of keys; holds nothing of it."""


@dataclass(frozen=True, slots=True)
class Key:
    """A public key, its id, and the only algorithm it is for; both empty where none is named."""

    kid: str
    algorithm: str
    key: Any


def read_keys(data: bytes) -> tuple[Key, ...]:
    """The keys for signatures in a JWKS, or in PEM one after another. Raises KeysError."""
    keys = _from_jwks(data) if data.lstrip()[:1] == b"{" else _from_pem(data)
    for one in keys:
        if not isinstance(one.key, PUBLIC):
            raise KeysError("a key is not a public one of RSA, EC or Ed25519")
        if isinstance(one.key, rsa.RSAPublicKey) and one.key.key_size < FEWEST_RSA_BITS:
            raise KeysError(f"an RSA key has less than {FEWEST_RSA_BITS} bits")
    if not 0 < len(keys) <= MOST_KEYS:
        raise KeysError(f"holds {len(keys)} keys for signatures; 1 to {MOST_KEYS} are allowed")
    return keys


def _from_jwks(data: bytes) -> tuple[Key, ...]:
    try:
        said = json.loads(data)
        entries = [one for one in said["keys"] if one.get("use", "sig") == "sig"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise KeysError("is no JSON Web Key Set") from None
    if any(one.get("kty") == "oct" or "d" in one for one in entries):
        raise KeysError("holds a secret or private key; the service needs the public ones only")
    try:
        return tuple(
            Key(str(one.get("kid", "")), str(one.get("alg", "")), jwt.PyJWK.from_dict(one).key)
            for one in entries
        )
    except (jwt.PyJWTError, ValueError, TypeError, KeyError):
        raise KeysError("holds a key that cannot be read") from None


def _from_pem(data: bytes) -> tuple[Key, ...]:
    if b"PRIVATE KEY" in data:
        raise KeysError("holds a private key; the service needs the public ones only")
    blocks = [block + END_OF_PEM for block in data.split(END_OF_PEM)[:-1]]
    try:
        return tuple(Key("", "", load_pem_public_key(block.lstrip())) for block in blocks)
    except (ValueError, UnsupportedAlgorithm):
        raise KeysError("holds a key in PEM that cannot be read") from None
