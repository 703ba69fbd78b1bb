"""From where a policy lets images be fetched."""

from __future__ import annotations

import pytest

from guard_policies.loader import PolicyError, parse_policy
from guard_policies.schema import ImageUris, Policy

HEAD = 'name: a\nversion: "1"\n'


def policy(image_uris: str) -> Policy:
    return parse_policy(f"{HEAD}image_uris: {image_uris}\n")


def test_without_hosts_nothing_is_fetched() -> None:
    assert parse_policy(HEAD).image_uris == ImageUris() == ImageUris((), (443,), ("https",))


def test_hosts_ports_and_schemes_are_read() -> None:
    found = policy('{hosts: [a.example, "*.b.example"], ports: [443, 8080], schemes: [http]}')
    assert found.image_uris == ImageUris(("a.example", "*.b.example"), (443, 8080), ("http",))


def test_what_may_be_fetched_is_part_of_the_digest_and_its_absence_is_not() -> None:
    assert parse_policy(HEAD).digest == policy("{hosts: []}").digest
    assert parse_policy(HEAD).digest != policy("{hosts: [a.example]}").digest


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "*", "127.0.0.1", "0x7f.1", "[::1]", "A.example", "a.example."),
        *(
            "*.*.example",
            "a..example",
            "-a.example",
            "müller.example",
            "a.example:443",
            "a_b.example",
        ),
    ],
)
def test_what_is_no_host_is_refused(host: str) -> None:
    with pytest.raises(PolicyError, match="is no host like"):
        policy(f'{{hosts: ["{host}"]}}')


@pytest.mark.parametrize(
    ("image_uris", "problem"),
    [
        ("{}", "needs 'hosts'"),
        ("{hosts: a.example}", "hosts must be a list"),
        ("{hosts: [a.example], ports: [0]}", "a port must lie between 1 and 65535"),
        ("{hosts: [a.example], schemes: [file]}", "a scheme must be one of https, http"),
        ("{hosts: [a.example], port: [80]}", "did you mean 'ports'"),
    ],
)
def test_mistakes_are_named(image_uris: str, problem: str) -> None:
    with pytest.raises(PolicyError, match=problem):
        policy(image_uris)
