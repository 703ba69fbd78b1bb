"""The auth file: what it says, and every mistake at once with its line."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from guard_policies.positions import PolicyError
from guard_service.security.auth_file import AuthFile, read_auth_file
from guard_service.security.tokens import FEWEST_CHARS, digest_of, new_token
from tests.service.security.callers import SIGNER, jwks

SECRET = "guard_this-is-a-token-that-nobody-may-see-again"
DIGEST = digest_of(SECRET)


def read(folder: Path, text: str) -> AuthFile:
    path = folder / "auth.yaml"
    path.write_text(text, encoding="utf-8")
    return read_auth_file(path, "default")


def problems(folder: Path, text: str) -> list[str]:
    with pytest.raises(PolicyError) as caught:
        read(folder, text)
    assert SECRET not in str(caught.value)
    return [f"{one.line}: {one.message}" for one in caught.value.problems]


WHOLE = f"""\
tenants:
  acme:
    policies: [default, strict]
    default_policy: strict
    limits:
      verdicts_per_s: 50
      characters_per_minute: 2e6
      calls: 16
      batch_items: 64
    tokens:
      - {{digest: "{DIGEST}", name: nightly, expires: 2027-01-31}}
    certificates:
      - dns: Batch.Example.com
      - uri: spiffe://cluster/ns/llm/sa/backend
  beta: {{}}
jwt:
  - issuer: https://kubernetes.default.svc
    audience: guard
    keys: keys.json
    subjects:
      system:serviceaccount:llm:backend: beta
metrics:
  tokens:
    - digest: "{digest_of("x" * 40)}"
"""


def test_a_whole_file_says_who_may_do_what(tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_bytes(jwks(SIGNER))
    found = read(tmp_path, WHOLE)
    acme, beta = found.tenants
    assert acme.policies == frozenset({"default", "strict"}) and acme.default_policy == "strict"
    assert (acme.bounds.verdicts_per_s, acme.bounds.burst) == (50, 50)
    assert acme.bounds.characters_per_minute == 2e6 and acme.bounds.calls == 16
    assert beta.policies is None and beta.default_policy == "" and beta.bounds.calls == float("inf")
    (token,) = found.tokens
    assert (token.tenant, token.name) == ("acme", "nightly")
    last = datetime(2027, 1, 31, 23, 59, tzinfo=UTC)
    assert not token.expired(last) and token.expired(last + timedelta(minutes=1))
    assert found.certificates == {
        ("dns", "batch.example.com"): "acme",
        ("uri", "spiffe://cluster/ns/llm/sa/backend"): "acme",
    }
    (issuer,) = found.issuers
    assert issuer.subjects == {"system:serviceaccount:llm:backend": "beta"}
    assert len(issuer.keys) == 1 and "none" not in issuer.algorithms
    assert [one.tenant for one in found.metrics] == [""]
    assert found.files == (tmp_path / "keys.json",)


def test_every_mistake_is_told_at_once_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_bytes(b"{}")
    text = f"""\
tenants:
  acme:
    policies: [strict]
    limits: {{calls: 0, burst: 3, requests: 1}}
    tokens:
      - {SECRET}
      - digest: {SECRET}
      - {{digest: "{DIGEST}", expires: soon}}
      - digest: "{DIGEST}"
    certificates:
      - {{dns: a, cn: b}}
      - cn: b
  Beta Corp: {{}}
  gamma:
    certificates: [{{cn: b}}]
jwt:
  - issuer: a
    audience: b
    algorithms: [HS256, none]
    keys: keys.json
    tenant: delta
  - issuer: a
    keys: nowhere.json
    tenant_claim: org
    tenant: acme
"""
    found = problems(tmp_path, text)
    told = [
        "2: 'default_policy' is missing: the service's ('default') is not among",
        "4: 'burst' needs 'verdicts_per_s'",
        "4: 'calls' must lie between 1",
        "4: 'limits' has no key 'requests'",
        "6: 'digest' must be sha256:",
        "7: 'digest' must be sha256:",
        "8: 'expires' must be like",
        "9: this token's digest is in the file twice",
        "11: a certificate is told by one of",
        "13: a tenant's name has",
        "15: this certificate is tenant acme's already",
        "19: an algorithm must be one of RS256",
        "19: an algorithm must be one of RS256",
        f"20: 'keys': {tmp_path / 'keys.json'} is no JSON Web Key Set",
        "21: there is no tenant 'delta'",
        "22: 'audience' is missing",
        "22: needs exactly one of tenant",
        "22: this issuer is in the file twice",
    ]
    for one in told:
        assert any(line.startswith(one) for line in found), f"{one} in\n" + "\n".join(found)
    assert any("nowhere.json:1:1: cannot be read" in line for line in found)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "must be a mapping"),
        ("tenants: {a: {}}\n", "nobody could call"),
        ("jwt: []\n", "'tenants' is missing"),
        (f"tokens: [{SECRET}]\n", "has no key 'tokens'"),
        (f"tenants: {{a: {{tokens: {SECRET}}}}}\n", "'tokens' must be a list"),
        ("tenants: {a: {policies: [], tokens: []}}\n", "'policies' is empty"),
        ("tenants: [\n", "not YAML"),
    ],
)
def test_what_is_no_auth_file_is_refused(tmp_path: Path, text: str, told: str) -> None:
    assert any(told in one for one in problems(tmp_path, text))


def test_new_tokens_are_long_and_never_the_same() -> None:
    made = {new_token() for _ in range(100)}
    assert len(made) == 100 and all(len(one) > FEWEST_CHARS for one in made)


def test_the_readmes_example_is_an_auth_file(tmp_path: Path) -> None:
    text = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
    example = text.partition("# auth.yaml\n")[2].partition("```")[0]
    (tmp_path / "jwks.json").write_bytes(jwks(SIGNER))
    for at in range(example.count("sha256:...")):
        example = example.replace("sha256:...", digest_of(str(at)), 1)
    found = read(tmp_path, example)
    assert [one.name for one in found.tenants] == ["shop"] and found.issuers and found.metrics
