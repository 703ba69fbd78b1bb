"""Signed model folders: what is signed is served, and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from guard_service.__main__ import main
from guard_service.artifact import MANIFEST_FILE, SIGNATURE_FILE, ArtifactError
from guard_service.config import Settings
from guard_service.hosted import opened
from guard_service.manifest import File
from guard_service.pulled import PULLED_FILE, Pulled, damage, read_pulled, sha256_of
from guard_service.security.signatures import check_signed, sign
from tests.service.tiny_artifact import tiny_artifact

OURS, THEIRS = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()


def pem(key: Any) -> bytes:
    return bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def public(*keys: Any) -> bytes:
    parts = (Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return b"".join(key.public_key().public_bytes(*parts) for key in keys)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "model"
    tiny_artifact(folder)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "model"))


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "sign.pub"
    path.write_bytes(public(OURS))
    return path


def test_a_folder_is_served_once_it_is_signed(folder: Path, key: Path, tmp_path: Path) -> None:
    settings = Settings(model=str(folder), model_key=key, kernel_plan="stored", prepared="none")
    with pytest.raises(ArtifactError, match="is not signed"):
        opened(settings, settings.model)
    (tmp_path / "sign.pem").write_bytes(pem(OURS))
    assert main(["sign", str(folder), "--key", str(tmp_path / "sign.pem")]) == 0
    engine = opened(settings, settings.model)
    engine.self_test()
    engine.close()
    assert main(["verify", str(folder)]) == 0


def _unsigned(folder: Path) -> None:
    (folder / SIGNATURE_FILE).unlink()


def _by_another(folder: Path) -> None:
    sign(folder, THEIRS)


def _another_model(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    manifest["name"] = "other"
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))


def _golden_added(folder: Path) -> None:
    (folder / "golden.json").write_text("{}")


def _cut_off(folder: Path) -> None:
    path = folder / SIGNATURE_FILE
    path.write_bytes(path.read_bytes()[:-20])


def _nonsense(folder: Path) -> None:
    (folder / SIGNATURE_FILE).write_bytes(b"\xff" * 100)


def _huge(folder: Path) -> None:
    (folder / SIGNATURE_FILE).write_bytes(b"x" * 10_000)


BAD = {
    "unsigned": (_unsigned, "is not signed"),
    "signed by another": (_by_another, "is not a signature of this folder"),
    "another manifest": (_another_model, "is not a signature of this folder"),
    "golden scores added": (_golden_added, "is not a signature of this folder"),
    "half a signature": (_cut_off, "is (not a|no) signature"),
    "nonsense": (_nonsense, "is no signature of format"),
    "a huge one": (_huge, "too large"),
}


@pytest.mark.parametrize(("damaged", "told"), BAD.values(), ids=BAD.keys())
def test_what_is_not_signed_as_it_is_is_refused(
    folder: Path, key: Path, damaged: Callable[[Path], None], told: str
) -> None:
    sign(folder, OURS)
    check_signed(str(folder), key)
    damaged(folder)
    with pytest.raises(ArtifactError, match=told):
        check_signed(str(folder), key)


def test_files_changed_behind_a_good_signature_are_refused_by_their_digests(
    folder: Path, key: Path
) -> None:
    sign(folder, OURS)
    model = folder / "tokenizer.json"
    model.write_bytes(model.read_bytes()[::-1])
    check_signed(str(folder), key)
    settings = Settings(model=str(folder), model_key=key, prepared="none")
    with pytest.raises(ArtifactError, match="its sha256 is not the manifest's"):
        opened(settings, settings.model)


def test_a_pulled_checkpoint_is_signed_by_its_list(tmp_path: Path, key: Path) -> None:
    folder = tmp_path / "pulled"
    folder.mkdir()
    config = folder / "config.json"
    config.write_text("{}")
    files = {config.name: File(config.stat().st_size, sha256_of(config))}
    Pulled("o/n", "0" * 40, "https://hub", "2026-01-01", files).write(folder)
    sign(folder, OURS)
    check_signed(str(folder), key)
    assert not damage(folder, read_pulled(folder))
    said = (folder / PULLED_FILE).read_text()
    (folder / PULLED_FILE).write_text(said.replace("o/n", "o/m"))
    with pytest.raises(ArtifactError, match="is not a signature of this folder"):
        check_signed(str(folder), key)
    config.write_text("[]")
    with pytest.raises(ArtifactError, match="not what was pulled"):
        sign(folder, OURS)


def test_old_and_new_keys_count_while_they_are_changed(folder: Path, key: Path) -> None:
    sign(folder, OURS)
    key.write_bytes(public(THEIRS, OURS))
    check_signed(str(folder), key)


def test_only_ed25519_keys_are_taken(
    folder: Path, key: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sign(folder, OURS)
    for data in (b"", b"nonsense", public(ec.generate_private_key(ec.SECP256R1())), pem(OURS)):
        key.write_bytes(data)
        with pytest.raises(ArtifactError, match="Ed25519 public keys"):
            check_signed(str(folder), key)
    for data in (b"nonsense", public(OURS), pem(ec.generate_private_key(ec.SECP256R1()))):
        key.write_bytes(data)
        assert main(["sign", str(folder), "--key", str(key)]) == 1
        said = capsys.readouterr().err
        assert "Ed25519 private key" in said and "BEGIN" not in said


def test_the_starter_is_part_of_the_package_and_needs_no_signature(key: Path) -> None:
    check_signed("starter", key)
