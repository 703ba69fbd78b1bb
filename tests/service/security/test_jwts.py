"""JSON Web Tokens: which count, by keys, issuers, audiences and times."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Callable
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from guard_service.errors import (
    ExpiredCredentials,
    InvalidCredentials,
    NoTenant,
    Overloaded,
    Unauthenticated,
)
from guard_service.security.jwts import Issuer, Issuers, Seen
from guard_service.security.keys import KeysError, read_keys
from tests.service.security.callers import (
    AUDIENCE,
    ISSUER,
    PUBLIC_PEM,
    SIGNER,
    STRANGER,
    claims,
    jwks,
    signed,
)


def issuers(keys: bytes = PUBLIC_PEM, seen: Seen | None = None, **says: Any) -> Issuers:
    terms: dict[str, Any] = {
        "issuer": ISSUER,
        "audiences": (AUDIENCE,),
        "algorithms": ("RS256",),
        "keys": read_keys(keys),
        "subjects": {"job-1": "acme"},
    }
    return Issuers([Issuer(**(terms | says))], seen)


def by_hand(header: dict[str, Any], payload: dict[str, Any], secret: bytes = b"") -> str:
    """A token that no library would make."""

    def packed(data: bytes) -> str:
        return base64.urlsafe_b64encode(data).rstrip(b"=").decode()

    body = ".".join(packed(json.dumps(one).encode()) for one in (header, payload))
    signature = hmac.digest(secret, body.encode(), hashlib.sha256) if secret else b""
    return f"{body}.{packed(signature)}"


def now() -> int:
    return int(time.time())


BAD: dict[str, Callable[[], str]] = {
    "another key": lambda: signed(key=STRANGER),
    "another issuer": lambda: signed(iss="https://other.example"),
    "another audience": lambda: signed(aud="other"),
    "no issuer": lambda: signed(iss=None),
    "no audience": lambda: signed(aud=None),
    "no expiry": lambda: signed(exp=None),
    "an expiry that is text": lambda: by_hand({"alg": "RS256"}, claims(exp="later")),
    "not yet valid": lambda: signed(nbf=now() + 600),
    "issued in the future": lambda: signed(iat=now() + 600),
    "far too long": lambda: signed(exp=now() + 400 * 86_400),
    "an algorithm not allowed": lambda: signed("RS512"),
    "alg none": lambda: by_hand({"alg": "none"}, claims()),
    "alg NONE": lambda: by_hand({"alg": "NONE"}, claims()),
    "HS256 with the public key": lambda: by_hand({"alg": "HS256"}, claims(), PUBLIC_PEM),
    "RS256 with a MAC by the public key": lambda: by_hand({"alg": "RS256"}, claims(), PUBLIC_PEM),
    "no signature": lambda: signed().rsplit(".", 1)[0] + ".",
    "a claim changed": lambda: (
        signed().split(".")[0]
        + "."
        + ".".join(signed(sub="job-2").split(".")[1:2])
        + "."
        + signed().split(".")[2]
    ),
    "no token": lambda: "x",
    "dots": lambda: "..",
    "an issuer that is a list": lambda: by_hand({"alg": "RS256"}, claims(iss=[ISSUER])),
    "a payload that is a list": lambda: by_hand({"alg": "RS256"}, [1]),  # type: ignore[arg-type]
    "its own key in the header": lambda: jwt.encode(
        claims(),
        STRANGER,
        "RS256",
        {"jwk": json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(STRANGER.public_key()))},
    ),
    "extensions that must be understood": lambda: jwt.encode(
        claims(), SIGNER, "RS256", {"crit": ["exp2"], "exp2": 1}
    ),
    "expired": lambda: signed(exp=now() - 600),
    "nested deep": lambda: (
        "e30." + base64.urlsafe_b64encode(b"[" * 3000).decode().rstrip("=") + "."
    ),
}


@pytest.mark.parametrize("token", BAD.values(), ids=BAD.keys())
def test_what_is_not_signed_here_for_us_and_now_does_not_count(token: Callable[[], str]) -> None:
    with pytest.raises(Unauthenticated):
        issuers().tenant_of(token())


def test_a_good_token_counts_and_names_its_tenant() -> None:
    assert issuers().tenant_of(signed()) == "acme"
    assert issuers().tenant_of(signed(aud=["other", AUDIENCE])) == "acme"
    assert issuers(tenant="beta", subjects={}).tenant_of(signed()) == "beta"
    claimed = issuers(tenant_claim="org", subjects={})
    assert claimed.tenant_of(signed(org="gamma")) == "gamma"
    with pytest.raises(NoTenant):
        claimed.tenant_of(signed(org=["gamma"]))
    with pytest.raises(NoTenant):
        issuers().tenant_of(signed(sub="job-9"))


def test_leeway_is_for_clocks_that_differ_and_only_so_far() -> None:
    assert issuers().tenant_of(signed(exp=now() - 10, nbf=now() + 10)) == "acme"
    with pytest.raises(ExpiredCredentials):
        issuers(leeway_s=5).tenant_of(signed(exp=now() - 10))


def test_only_who_signed_well_is_told_of_the_expiry() -> None:
    with pytest.raises(ExpiredCredentials):
        issuers().tenant_of(signed(exp=now() - 600))
    for token in (signed(key=STRANGER, exp=now() - 600), signed(aud="x", exp=now() - 600)):
        with pytest.raises(InvalidCredentials):
            issuers().tenant_of(token)


def test_keys_are_found_by_id_and_tried_without() -> None:
    both = issuers(jwks(STRANGER, SIGNER))
    for kid in ("", "k1"):
        assert both.tenant_of(signed(kid=kid)) == "acme"
    for kid in ("k0", "k9"):
        with pytest.raises(InvalidCredentials):
            both.tenant_of(signed(kid=kid))


def test_every_kind_of_key_works() -> None:
    for key, algorithm in (
        (ec.generate_private_key(ec.SECP256R1()), "ES256"),
        (ed25519.Ed25519PrivateKey.generate(), "EdDSA"),
    ):
        pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        mixed = issuers(PUBLIC_PEM + pem, algorithms=("RS256", algorithm))
        assert mixed.tenant_of(signed(algorithm, key)) == "acme"
        assert mixed.tenant_of(signed()) == "acme"


def test_a_token_for_one_call_is_good_for_one() -> None:
    once = issuers(once=True)
    token = signed(jti="a")
    assert once.tenant_of(token) == once.tenant_of(signed(jti="b")) == "acme"
    with pytest.raises(InvalidCredentials):
        once.tenant_of(token)
    with pytest.raises(InvalidCredentials):  # without an id nobody knows whether it was used
        once.tenant_of(signed())


def test_the_memory_of_used_tokens_is_bounded_and_never_forgets_early() -> None:
    seen = Seen(most=2)
    seen.use("i", "a", until=10, now=0)
    seen.use("i", "b", until=20, now=0)
    with pytest.raises(Overloaded):
        seen.use("i", "c", until=20, now=5)
    seen.use("i", "c", until=30, now=11)
    with pytest.raises(InvalidCredentials):
        seen.use("i", "b", until=20, now=12)


def _pem(key: Any) -> bytes:
    return bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


SMALL = rsa.generate_private_key(65537, 1024)
BAD_KEYS = {
    "a secret": (b'{"keys": [{"kty": "oct", "k": "c2VjcmV0"}]}', "secret or private"),
    "a private JWK": (
        json.dumps({"keys": [json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(SIGNER))]}).encode(),
        "secret or private",
    ),
    "a private PEM": (_pem(SIGNER), "private key"),
    "a short key": (jwks(SMALL), "less than 2048 bits"),
    "no keys": (b'{"keys": []}', "0 keys"),
    "only keys for encryption": (jwks(SIGNER).replace(b'"sig"', b'"enc"'), "0 keys"),
    "no key set": (b'{"keys": 3}', "no JSON Web Key Set"),
    "half a key set": (jwks(SIGNER)[:-20], "no JSON Web Key Set"),
    "a key cut off": (b'{"keys": [{"kty": "RSA", "e": "AQAB"}]}', "cannot be read"),
    "an unknown kind": (b'{"keys": [{"kty": "XYZ"}]}', "cannot be read"),
    "half a PEM": (PUBLIC_PEM[:-30], "0 keys"),
    "nonsense": (b"nonsense", "0 keys"),
    "nothing": (b"", "0 keys"),
}


@pytest.mark.parametrize(("data", "told"), BAD_KEYS.values(), ids=BAD_KEYS.keys())
def test_files_of_keys_are_refused_for_what_is_wrong(data: bytes, told: str) -> None:
    with pytest.raises(KeysError, match=told):
        read_keys(data)
