"""Clients with credentials against a guard that wants some: tokens and certificates that rotate."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from guard_middleware import (
    TLS,
    AsyncGuardClient,
    GuardClient,
    NotPermitted,
    Retries,
    Terms,
    Verdict,
)
from guard_middleware.bearer import TokenFile, check_private
from guard_middleware.guards import RemoteGuard
from guard_middleware.settings import Settings
from guard_middleware.tls_files import TlsFiles
from guard_middleware.turns import read_turns
from guard_service.cli.app import app
from guard_service.security.tokens import new_token
from tests.service.conftest import RunGuard
from tests.service.security.callers import Auth
from tests.service.security.issuing import Authority

ONCE = Retries(attempts=1)


@pytest.fixture
def auth(tmp_path: Path) -> Auth:
    return Auth(tmp_path)


def swapped(path: Path, text: str) -> None:
    """As Kubernetes does: another file behind the same name, in one step."""
    new = path.with_suffix(".new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


async def test_a_rotated_token_is_sent_with_the_next_call(run_guard: RunGuard, auth: Auth) -> None:
    file = auth.folder / "token"
    file.write_text(auth.tenant("acme") + "\n", encoding="utf-8")
    next_one = auth.tenant("beta", policies=["strict"], default_policy="strict")
    guard = await run_guard(auth=auth.write())
    terms = Terms(retries=ONCE, token=TokenFile(file))
    async with AsyncGuardClient(guard.server.address, terms) as client:

        async def policy() -> str:
            found = await client.classify("hi")
            assert isinstance(found, Verdict)
            return found.policy.name

        assert await policy() == "default"
        swapped(file, next_one)
        assert await policy() == "strict"
        file.unlink()
        assert await policy() == "strict"
        swapped(file, new_token())
        with pytest.raises(NotPermitted, match="INVALID_CREDENTIALS"):
            await client.classify("hi")


async def test_the_blocking_client_sends_it_too(run_guard: RunGuard, auth: Auth) -> None:
    file = auth.folder / "token"
    file.write_text(auth.tenant("acme"), encoding="utf-8")
    guard = await run_guard(auth=auth.write())

    def ask() -> tuple[str, bool]:
        with GuardClient(guard.server.address, Terms(token=TokenFile(file))) as client:
            streamed = [one.final for one in client.classify_stream("hi", ["a", "b"])]
            return client.list_policies().default_policy, streamed[-1]

    assert await asyncio.to_thread(ask) == ("default", True)


async def test_the_sidecars_guard_is_asked_with_its_token(run_guard: RunGuard, auth: Auth) -> None:
    file = auth.folder / "token"
    file.write_text(auth.tenant("acme"), encoding="utf-8")
    guard = await run_guard(auth=auth.write())
    for settings, judged in (
        (Settings(guard=guard.server.address, guard_token_file=str(file)), True),
        (Settings(guard=guard.server.address), False),
    ):
        remote = RemoteGuard(settings)
        (outcome,) = await remote.judge([read_turns("hi")])
        await remote.close()
        assert outcome.judged is judged and outcome.allowed is judged


async def test_guardctl_sends_it_and_without_it_is_told_so(run_guard: RunGuard, auth: Auth) -> None:
    file = auth.folder / "token"
    file.write_text(auth.tenant("acme"), encoding="utf-8")
    guard = await run_guard(auth=auth.write())
    place = ["--server", guard.server.address]
    for arguments, code, told in (
        (["policies", *place, "--token-file", str(file)], 0, "strict"),
        (["check", *place, "--token-file", str(file), "hello"], 0, "allow"),
        (["policies", *place], 1, "UNAUTHENTICATED"),
    ):
        done = await asyncio.to_thread(CliRunner().invoke, app, arguments)
        assert done.exit_code == code and told in done.output.replace("ALLOW", "allow")


@pytest.mark.parametrize(
    ("target", "private"),
    [
        ("unix:/run/guard", True),
        ("127.0.0.1:50051", True),
        ("[::1]:50051", True),
        ("localhost:50051", True),
        ("ipv4:127.0.0.1:1,127.0.0.2:2", True),
        ("ipv6:[::1]:1", True),
        ("guard:50051", False),
        ("10.0.0.1:50051", False),
        ("127.0.0.1.example.com:50051", False),
        ("ipv4:127.0.0.1:1,10.0.0.1:2", False),
        ("dns:///guard.llama-guard.svc:50051", False),
        ("dns:///localhost:50051", True),
        ("xds:///guard", False),
    ],
)
def test_a_token_leaves_the_machine_only_over_tls(
    target: str, private: bool, tmp_path: Path
) -> None:
    check_private(target, tls=True)
    if private:
        check_private(target, tls=False)
        return
    (tmp_path / "token").write_text(new_token(), encoding="utf-8")
    for make in (
        lambda: check_private(target, tls=False),
        lambda: GuardClient(target, Terms(token=TokenFile(tmp_path / "token"))),
    ):
        with pytest.raises(ValueError, match="TLS"):
            make()


@pytest.mark.parametrize("text", ["", " \n", "two words", "ümlaut", "x" * 20_000, "a\nb"])
def test_what_is_not_one_token_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "token"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="does not hold one token") as caught:
        TokenFile(file)
    assert not text.strip() or text.strip() not in str(caught.value)
    with pytest.raises(ValueError, match="No such file"):
        TokenFile(tmp_path / "none")


async def test_the_sidecar_connects_anew_with_renewed_certificates(
    run_guard: RunGuard, tmp_path: Path
) -> None:
    old, new = Authority("old"), Authority("new")
    paths = {name: tmp_path / name for name in ("crt", "key", "ca", "own.crt", "own.key")}
    old.issue().write(paths["crt"], paths["key"])
    paths["ca"].write_bytes(old.root)
    old.issue("client").write(paths["own.crt"], paths["own.key"])
    tls = {"tls_cert": paths["crt"], "tls_key": paths["key"], "tls_client_ca": paths["ca"]}
    guard = await run_guard(host="127.0.0.1", port=0, reload_s=0, **tls)
    remote = RemoteGuard(
        Settings(
            guard=guard.server.address,
            guard_tls="on",
            guard_tls_roots=str(paths["ca"]),
            guard_tls_certificate=str(paths["own.crt"]),
            guard_tls_key=str(paths["own.key"]),
            guard_tls_name="guard",
        )
    )
    now = 1000.0
    remote._files = TlsFiles(remote._terms.tls, clock=lambda: now)
    assert (await remote.judge([read_turns("hi")]))[0].judged
    new.issue().write(paths["crt"], paths["key"])
    paths["ca"].write_bytes(new.root)
    await guard.server.watcher.reload("tls")
    paths["own.crt"].write_bytes(new.issue("client").cert)  # and its key is still to come
    now += 6
    assert (await remote.judge([read_turns("hi")]))[0].judged  # the connection that stands
    new.issue("client").write(paths["own.crt"], paths["own.key"])
    now += 6
    before = remote._made
    assert (await remote.judge([read_turns("hello")]))[0].judged
    assert remote._made is not before
    await remote.close()


def test_tls_files_are_renewed_once_when_they_change(tmp_path: Path) -> None:
    ca, now = tmp_path / "ca", 0.0
    ca.write_bytes(Authority().root)
    files = TlsFiles(TLS(roots=ca), look_s=5, clock=lambda: now)
    swapped(ca, Authority().root.decode())
    assert not files.renewed()  # too soon to look
    now = 6
    assert files.renewed() and not files.renewed()
    ca.write_bytes(b"half")
    os.utime(ca, (1, 1))
    now = 12
    assert not files.renewed()
    assert not TlsFiles(None).renewed()
