"""Callers with credentials, and the auth file that knows them."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jwt
import yaml
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from guard_service.security.tokens import digest_of, new_token

ISSUER, AUDIENCE = "https://issuer.example", "guard"
SIGNER = rsa.generate_private_key(65537, 2048)
STRANGER = rsa.generate_private_key(65537, 2048)
PUBLIC_PEM = SIGNER.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

Metadata = tuple[tuple[str, str], ...]


def bearer(token: str) -> Metadata:
    """The metadata of a call with a token."""
    return (("authorization", f"Bearer {token}"),)


def claims(**other: Any) -> dict[str, Any]:
    """Those of a good token for tenant acme; None takes one out."""
    now = int(time.time())
    usual = {"iss": ISSUER, "aud": AUDIENCE, "sub": "job-1", "iat": now, "exp": now + 600}
    return {name: value for name, value in (usual | other).items() if value is not None}


def signed(algorithm: str = "RS256", key: Any = SIGNER, kid: str = "", **other: Any) -> str:
    """A token signed."""
    headers = {"kid": kid} if kid else None
    return jwt.encode(claims(**other), key, algorithm, headers)


def jwks(*keys: rsa.RSAPrivateKey) -> bytes:
    """Public keys, named "k0", "k1", and so on."""
    return json.dumps(
        {
            "keys": [
                json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(key.public_key()))
                | {"kid": f"k{at}", "use": "sig"}
                for at, key in enumerate(keys)
            ]
        }
    ).encode()


@dataclass
class Auth:
    """An auth file in the making; `write` puts it, and the keys, into a folder."""

    folder: Path
    tenants: dict[str, dict[str, Any]] = field(default_factory=dict)
    issuers: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, Any] | None = None

    @property
    def path(self) -> Path:
        """Of the file."""
        return self.folder / "auth.yaml"

    def tenant(self, name: str, **says: Any) -> str:
        """One more tenant; a token of it."""
        token = new_token()
        self.tenants[name] = {
            "tokens": [{"digest": digest_of(token), "name": f"{name}-job"}]
        } | says
        return token

    def issuer(self, **says: Any) -> None:
        """The issuer whose keys are SIGNER's, with `job-1` as tenant acme's."""
        (self.folder / "keys.json").write_bytes(jwks(SIGNER))
        usual = {"issuer": ISSUER, "audience": AUDIENCE, "algorithms": ["RS256"]}
        self.issuers.append(usual | {"keys": "keys.json", "subjects": {"job-1": "acme"}} | says)

    def write(self) -> Path:
        """Write it; its place."""
        said: dict[str, Any] = {"tenants": self.tenants}
        if self.issuers:
            said["jwt"] = self.issuers
        if self.metrics is not None:
            said["metrics"] = self.metrics
        self.path.write_text(yaml.safe_dump(said), encoding="utf-8")
        return self.path
