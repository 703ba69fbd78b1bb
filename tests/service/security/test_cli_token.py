"""guardctl token: what it prints is what the auth file takes."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from guard_service.cli.app import app
from guard_service.security.auth_file import read_auth_file
from guard_service.security.tokens import KnownTokens, digest_of

RUN = CliRunner()


def known(folder: Path, entry: str) -> KnownTokens:
    path = folder / "auth.yaml"
    path.write_text(f"tenants:\n  acme:\n    tokens:\n      {entry}", encoding="utf-8")
    return KnownTokens(read_auth_file(path, "default").tokens)


def test_a_new_token_is_known_by_the_entry_beside_it(tmp_path: Path) -> None:
    done = RUN.invoke(app, ["token", "new", "--name", 'the "night" job: 1'])
    token = done.stdout.strip()
    assert done.exit_code == 0 and token not in done.stderr
    found = known(tmp_path, done.stderr).find(token)
    assert found is not None and (found.tenant, found.name) == ("acme", 'the "night" job: 1')


def test_a_token_made_elsewhere_is_digested_and_not_shown(tmp_path: Path) -> None:
    token = "another-systems-token-0123456789abcdef"
    done = RUN.invoke(app, ["token", "hash"], input=f"{token}\n")
    assert done.exit_code == 0 and token not in done.output
    assert digest_of(token) in done.stdout
    assert known(tmp_path, done.stdout).find(token)
    assert known(tmp_path, done.stdout).find(token[:-1]) is None


def test_a_token_that_can_be_guessed_is_refused() -> None:
    done = RUN.invoke(app, ["token", "hash"], input="hunter2\n")
    assert done.exit_code == 2 and "hunter2" not in done.output
