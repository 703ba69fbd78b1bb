"""Which addresses of images may be asked: decided before anything is asked of the network."""

from __future__ import annotations

from collections import Counter

import pytest

from guard_policies.schema import ImageUris
from guard_service.images.addresses import is_public
from guard_service.images.reasons import Reason, Refused
from guard_service.images.uris import Target, allowed
from tests.service.images.hostile_uris import ALLOWED, KINDS, NOT_PUBLIC, PUBLIC, URIS, HostileUri


def test_there_are_forty_of_many_kinds() -> None:
    assert Counter(one.kind for one in URIS) == KINDS
    assert len({one.uri for one in URIS}) == len(URIS) >= 40


@pytest.mark.parametrize("one", URIS, ids=lambda one: f"{one.kind}: {one.uri[:60]!r}")
def test_each_is_refused_for_its_reason(one: HostileUri) -> None:
    with pytest.raises(Refused) as refused:
        allowed(one.uri, ALLOWED)
    assert refused.value.reason is one.reason


def test_a_policy_without_hosts_allows_none() -> None:
    with pytest.raises(Refused, match="IMAGE_URI_NOT_ALLOWED"):
        allowed("https://images.example/a.png", ImageUris())


@pytest.mark.parametrize(
    ("uri", "target"),
    [
        ("https://images.example", Target("https", "images.example", 443, "/")),
        ("HTTPS://IMAGES.Example:443/A?b=c#d", Target("https", "images.example", 443, "/A?b=c")),
        ("https://a.b.cdn.example/%20", Target("https", "a.b.cdn.example", 443, "/%20")),
        ("https://images.example?q", Target("https", "images.example", 443, "/?q")),
        ("https://images\u3002example/", Target("https", "images.example", 443, "/")),
        ("https://b\xfccher.cdn.example/", Target("https", "xn--bcher-kva.cdn.example", 443, "/")),
    ],
)
def test_what_is_allowed_is_asked_by_its_one_name(uri: str, target: Target) -> None:
    assert allowed(uri, ALLOWED) == target
    assert target.url == f"https://{target.host}:443{target.path}"


def test_ports_and_schemes_are_the_policys() -> None:
    plain = ImageUris(("images.example",), (8080,), ("http",))
    assert allowed("http://images.example:8080/", plain).port == 8080
    for uri, reason in (
        ("http://images.example/", Reason.URI_PORT),
        ("https://images.example:8080/", Reason.URI_SCHEME),
    ):
        with pytest.raises(Refused) as refused:
            allowed(uri, plain)
        assert refused.value.reason is reason


@pytest.mark.parametrize("address", [*NOT_PUBLIC, "", "images.example", "127.1", "0x7f.0.0.1"])
def test_private_and_translated_addresses_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", PUBLIC)
def test_others_are_public(address: str) -> None:
    assert is_public(address)
