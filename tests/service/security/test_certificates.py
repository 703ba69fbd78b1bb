"""Certificates: renewed under running connections, or not at all."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives import serialization as form

from guard_api.v1 import guard_pb2, guard_pb2_grpc
from guard_service.config import Settings
from guard_service.engines.fake import FakeEngine
from guard_service.live.policies import loaded_policies
from guard_service.security.certificates import CertificateError, TlsFiles
from guard_service.server import GuardServer
from tests.service.asking import Running
from tests.service.conftest import RunGuard
from tests.service.security.issuing import DAY, Authority, Issued, secure_channel

OLD, NEW = Authority("old"), Authority("new")


@pytest.fixture
def files(tmp_path: Path) -> TlsFiles:
    """Those of a server with a certificate of OLD, for clients of OLD."""
    found = TlsFiles(tmp_path / "tls.crt", tmp_path / "tls.key", tmp_path / "ca.crt")
    OLD.issue().write(found.cert, found.key)
    (tmp_path / "ca.crt").write_bytes(OLD.root)
    return found


def settings_of(files: TlsFiles, client_ca: bool = False) -> dict[str, Any]:
    ca = files.client_ca if client_ca else None
    return {
        "host": "127.0.0.1",
        "port": 0,
        "tls_cert": files.cert,
        "tls_key": files.key,
        "tls_client_ca": ca,
    }


async def asked(channel: grpc.aio.Channel) -> grpc.StatusCode:
    """How a call over a channel ends."""
    try:
        stub: Any = guard_pb2_grpc.GuardServiceStub(channel)
        await stub.ListPolicies(guard_pb2.ListPoliciesRequest(), timeout=20)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def met(guard: Running, roots: bytes, own: Issued | None = None) -> bool:
    """Whether a new connection is made."""
    async with secure_channel(guard.server.address, roots, own) as channel:
        return await asked(channel) is grpc.StatusCode.OK


def value(guard: Running, name: str, **labels: str) -> float:
    found = guard.server.registry.get_sample_value(name, labels)
    return found if found is not None else 0.0


def reloads(guard: Running, result: str) -> float:
    return value(guard, "guard_security_reloads_total", what="tls", result=result)


async def test_a_new_certificate_is_shown_to_new_connections_and_old_ones_go_on(
    run_guard: RunGuard, files: TlsFiles
) -> None:
    guard = await run_guard(**settings_of(files))
    async with secure_channel(guard.server.address, OLD.root) as before:
        assert await asked(before) is grpc.StatusCode.OK
        assert not await met(guard, NEW.root)
        NEW.issue().write(files.cert, files.key)
        await guard.server.watcher.reload("tls")
        assert await met(guard, NEW.root)
        assert not await met(guard, OLD.root)
        assert await asked(before) is grpc.StatusCode.OK
    assert reloads(guard, "ok") == 1 and reloads(guard, "failed") == 0


async def test_who_may_connect_follows_the_clients_ca(run_guard: RunGuard, files: TlsFiles) -> None:
    guard = await run_guard(**settings_of(files, client_ca=True))
    of_old, of_new = OLD.issue("client"), NEW.issue("client")
    assert await met(guard, OLD.root, of_old)
    assert not await met(guard, OLD.root, of_new)
    assert not await met(guard, OLD.root)
    assert files.client_ca
    files.client_ca.write_bytes(NEW.root)
    await guard.server.watcher.reload("tls")
    assert await met(guard, OLD.root, of_new)
    assert not await met(guard, OLD.root, of_old)


def _key_of_another(files: TlsFiles) -> None:
    files.key.write_bytes(NEW.issue().key)


def _half_a_certificate(files: TlsFiles) -> None:
    files.cert.write_bytes(files.cert.read_bytes()[:-40])


def _half_a_chain(files: TlsFiles) -> None:
    files.cert.write_bytes(files.cert.read_bytes() + OLD.root[:-40])


def _nothing(files: TlsFiles) -> None:
    files.key.write_bytes(b"")


def _gone(files: TlsFiles) -> None:
    files.cert.unlink()


def _expired(files: TlsFiles) -> None:
    OLD.issue(since=-3 * DAY, lasts=DAY).write(files.cert, files.key)


def _no_ca(files: TlsFiles) -> None:
    assert files.client_ca
    files.client_ca.write_bytes(b"no certificate")


DAMAGE = {
    "the key of another": (_key_of_another, "is not the key of"),
    "half a certificate": (_half_a_certificate, "is cut off"),
    "half a chain": (_half_a_chain, "is cut off"),
    "an empty key": (_nothing, "is no private key"),
    "no file": (_gone, "No such file"),
    "an expired one": (_expired, "has expired"),
    "a CA that is none": (_no_ca, "no certificate in PEM"),
}


@pytest.mark.parametrize(("damage", "told"), DAMAGE.values(), ids=DAMAGE.keys())
async def test_what_cannot_be_used_leaves_the_last_good_one_in_use(
    run_guard: RunGuard, files: TlsFiles, damage: Any, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    guard = await run_guard(reload_s=0, **settings_of(files, client_ca=True))
    own = OLD.issue("client")
    damage(files)
    with caplog.at_level(logging.ERROR):
        await guard.server.watcher.reload("tls")
    assert told in caplog.text and "BEGIN" not in caplog.text
    assert reloads(guard, "failed") == 1
    assert await met(guard, OLD.root, own)


@pytest.mark.parametrize(("damage", "told"), DAMAGE.values(), ids=DAMAGE.keys())
async def test_a_server_does_not_start_with_what_cannot_be_used(
    files: TlsFiles, damage: Any, told: str
) -> None:
    settings = Settings(model="fake", metrics=False, **settings_of(files, client_ca=True))
    damage(files)
    with pytest.raises(OSError, match=f"TLS files cannot be used: .*{told}"):
        await GuardServer(settings, FakeEngine(), loaded_policies(settings)).start()


async def test_the_first_expiry_of_the_chain_is_a_metric(
    run_guard: RunGuard, files: TlsFiles
) -> None:
    files.cert.write_bytes(files.cert.read_bytes() + OLD.issue(lasts=2 * DAY).cert)
    guard = await run_guard(**settings_of(files))
    left = value(guard, "guard_tls_expires_timestamp_seconds") - datetime.now(UTC).timestamp()
    assert left == pytest.approx(2 * DAY.total_seconds(), abs=600)


def test_an_encrypted_key_is_named_as_such(files: TlsFiles) -> None:
    key = form.load_pem_private_key(files.key.read_bytes(), None)
    locked = form.BestAvailableEncryption(b"secret")
    files.key.write_bytes(key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, locked))
    with pytest.raises(CertificateError, match="encrypted"):
        files.read()
