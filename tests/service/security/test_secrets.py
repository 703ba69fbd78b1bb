"""Secrets: in no setting that is printed, and in no line that a service writes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from guard_service.__main__ import main
from guard_service.config import Settings
from guard_service.listening import exposed
from tests.service.security.callers import Auth
from tests.service.security.issuing import Authority


def test_no_secret_is_printed_or_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    auth, ca = Auth(tmp_path), Authority()
    token = auth.tenant("acme")
    digest = auth.tenants["acme"]["tokens"][0]["digest"]
    issued = ca.issue()
    issued.write(tmp_path / "crt", tmp_path / "key")
    flags = [f"--auth={auth.write()}", f"--tls-cert={tmp_path}/crt", f"--tls-key={tmp_path}/key"]
    assert main([*flags, "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert str(auth.path) in printed
    auth.path.write_text(auth.path.read_text().replace(digest, token), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "guard_service", *flags, "--model=fake", "--port=0"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2 and "the auth file is broken" in done.stderr
    assert f"{auth.path}:" in done.stderr and "'digest' must be" in done.stderr
    body = issued.key.decode().splitlines()[1]
    for text in (printed, done.stdout, done.stderr):
        assert token not in text and digest not in text and body not in text


def test_a_service_that_others_reach_is_warned_of(tmp_path: Path) -> None:
    for host in ("127.0.0.1", "::1", "localhost", "unix:/run/guard"):
        assert not [*exposed(Settings(host=host))]
    told = " ".join(exposed(Settings(host="0.0.0.0")))
    assert "unencrypted" in told and "anyone" in told
    auth, ca = Auth(tmp_path), Authority()
    auth.tenant("acme")
    ca.issue().write(tmp_path / "crt", tmp_path / "key")
    known = Settings(host="0.0.0.0", auth=auth.write())
    assert ["unencrypted" in one for one in exposed(known)] == [True]
    assert not [*exposed(replace(known, tls_cert=tmp_path / "crt", tls_key=tmp_path / "key"))]
