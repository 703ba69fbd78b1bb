"""Model folders signed by whoever vouches for them: Ed25519 over what lists a folder's digests.

guard.sig stands beside guard.json (or pulled.json), which has the size and sha256 of every other
file; golden.json, which is recorded after a pull, is signed with it. What the files are is checked
against those lists when a model is loaded; the signature says whose lists they are.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from guard_service.artifact import (
    GOLDEN_FILE,
    MANIFEST_FILE,
    SIGNATURE_FILE,
    STARTER,
    ArtifactError,
    load,
)
from guard_service.engines import FAKE, FAKE_VISION
from guard_service.pulled import PULLED_FILE, damage, read_pulled

FORMAT = "llama-guard-signature/1"
MOST_LIST_BYTES = 4 * 2**20
MOST_SIGNATURE_BYTES = 1024
_END = b"-----END PUBLIC KEY-----"
_PROG = "guard-service sign"


def check_signed(model: str, key_file: Path) -> None:
    """Raises ArtifactError unless a folder is signed with a key of the file (PEM, one or more).

    The starter is part of this package, which is trusted as a whole; the fakes are code.
    """
    if model in (STARTER, FAKE, FAKE_VISION):
        return
    folder = Path(model)
    signature = _signature(folder)
    said = statement(folder)
    for key in public_keys(key_file):
        try:
            key.verify(signature, said)
            return
        except InvalidSignature:
            continue
    raise ArtifactError(
        f"{folder / SIGNATURE_FILE}: is not a signature of this folder with a key of {key_file}; "
        "get the folder anew, or have it signed"
    )


def sign(folder: Path, key: Ed25519PrivateKey) -> Path:
    """Check the folder against its list, sign it, and tell where the signature is.

    Raises ArtifactError or PulledError for a folder that is not what its list says.
    """
    if (folder / MANIFEST_FILE).is_file():
        load(folder)
    elif problems := damage(folder, read_pulled(folder)):
        raise ArtifactError(f"{folder} is not what was pulled: {'; '.join(problems)}")
    made = base64.b64encode(key.sign(statement(folder))).decode()
    path = folder / SIGNATURE_FILE
    path.write_text(f"{FORMAT}\n{made}\n", encoding="ascii")
    return path


def statement(folder: Path) -> bytes:
    """What is signed: the digest of the folder's list, and of its golden scores. ArtifactError for
    a folder that has no list."""
    lists = [name for name in (MANIFEST_FILE, PULLED_FILE) if (folder / name).is_file()]
    if not lists:
        raise ArtifactError(
            f"{folder}: neither {MANIFEST_FILE} nor {PULLED_FILE} is there: nothing lists what a "
            "signature would be for"
        )
    names = [*lists, *([GOLDEN_FILE] if (folder / GOLDEN_FILE).is_file() else [])]
    lines = [FORMAT, *(f"{_sha256(folder / name)}  {name}" for name in names)]
    return "\n".join(lines).encode()


def public_keys(path: Path) -> list[Ed25519PublicKey]:
    """The keys of a PEM file, one or more. Raises ArtifactError."""
    blocks = [block.lstrip() + _END for block in _read(path, MOST_LIST_BYTES).split(_END)[:-1]]
    try:
        keys = [load_pem_public_key(block) for block in blocks]
    except (ValueError, UnsupportedAlgorithm):
        keys = []
    found = [key for key in keys if isinstance(key, Ed25519PublicKey)]
    if not found or len(found) < len(keys):
        raise ArtifactError(f"{path}: must hold Ed25519 public keys in PEM, and nothing else")
    return found


def private_key(path: Path) -> Ed25519PrivateKey:
    """The key of a PEM file. Raises ArtifactError, which holds nothing of it."""
    try:
        key = load_pem_private_key(_read(path, MOST_LIST_BYTES), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise ArtifactError(
            f"{path}: must be an Ed25519 private key in PEM without a password; "
            "openssl genpkey -algorithm ed25519 makes one"
        )
    return key


def main(argv: Sequence[str]) -> int:
    """Run `guard-service sign`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog=_PROG,
        description="Sign a model folder, once its files are what its list says. A service with "
        "--model-key takes only folders that are signed.",
        epilog="A pair of keys: openssl genpkey -algorithm ed25519 -out sign.pem; "
        "openssl pkey -in sign.pem -pubout -out sign.pub",
        allow_abbrev=False,
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="an artifact or a pulled one")
    parser.add_argument(
        "--key", metavar="FILE", type=Path, required=True, help="Ed25519 private key (PEM)"
    )
    asked = parser.parse_args(argv)
    try:
        made = sign(asked.folder, private_key(asked.key))
    except (ValueError, OSError) as error:
        print(f"{_PROG}: {error}", file=sys.stderr)
        return 1
    print(f"{made}: signed")
    return 0


def _signature(folder: Path) -> bytes:
    path = folder / SIGNATURE_FILE
    if not path.is_file():
        raise ArtifactError(
            f"{folder}: is not signed and --model-key is set; guard-service sign does it, where "
            "the key is"
        )
    head, _, body = _read(path, MOST_SIGNATURE_BYTES).decode("ascii", "replace").partition("\n")
    try:
        if head == FORMAT:
            return base64.b64decode(body.strip(), validate=True)
    except binascii.Error:
        pass
    raise ArtifactError(f"{path}: is no signature of format {FORMAT}")


def _sha256(path: Path) -> str:
    return hashlib.sha256(_read(path, MOST_LIST_BYTES)).hexdigest()


def _read(path: Path, most: int) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror})") from None
    if len(content) > most:
        raise ArtifactError(f"{path}: too large")
    return content
