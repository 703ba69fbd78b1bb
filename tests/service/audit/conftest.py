"""Settings of an audit log, and a pair of keys for its payloads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)


@pytest.fixture
def logged(tmp_path: Path) -> dict[str, Any]:
    """Settings with an audit log."""
    (tmp_path / "key").write_text("k" * 64 + "\n")
    folder = tmp_path / "audit"
    return {"audit": folder, "audit_key": tmp_path / "key", "audit_fsync": False}


@pytest.fixture
def pair(tmp_path: Path) -> X25519PrivateKey:
    key = X25519PrivateKey.generate()
    (tmp_path / "private.pem").write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "public.pem").write_bytes(public)
    return key
