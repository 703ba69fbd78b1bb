"""Addresses of images that must not be asked, by kind, each with the reason to refuse it."""

from __future__ import annotations

from typing import NamedTuple

from guard_policies.schema import ImageUris
from guard_service.images.reasons import Reason

ALLOWED = ImageUris(hosts=("images.example", "*.cdn.example"))


class HostileUri(NamedTuple):
    """One address; `kind` for people."""

    kind: str
    uri: str
    reason: Reason


def _of(kind: str, reason: Reason, *uris: str) -> list[HostileUri]:
    return [HostileUri(kind, uri, reason) for uri in uris]


URIS = [
    *_of(
        "another scheme",
        Reason.URI_SCHEME,
        "http://images.example/a.png",
        "ftp://images.example/a.png",
        "file://images.example/etc/passwd",
        "gopher://images.example/_GET",
        "wss://images.example/a.png",
    ),
    *_of(
        "no address of the kind",
        Reason.URI_MALFORMED,
        "",
        "images.example/a.png",
        "//images.example/a.png",
        "https:images.example/a.png",
        "https:///a.png",
        "file:///etc/passwd",
        "javascript:alert(1)",
        "https://images.example/" + "a" * 5000,
    ),
    *_of(
        "what programs read in two ways",
        Reason.URI_MALFORMED,
        "https://images.example@evil.example/a.png",
        "https://evil.example:443@images.example/a.png",
        "https://images.example\\@evil.example/a.png",
        "https://images.example\t.evil.example/a.png",
        "https://images.example/a.png\r\nHost: evil.example",
        "https://images.example /a.png",
        " https://images.example/a.png",
        "https://images.example\0.evil.example/a.png",
        "https://%69mages.example/a.png",
        "https://images.example:https/a.png",
        "https://images.example:443:80/a.png",
        "https://-images.example/a.png",
    ),
    *_of(
        "a host that is not on the list",
        Reason.URI_HOST,
        "https://evil.example/a.png",
        "https://evil.example#@images.example/a.png",
        "https://evil.example?@images.example/a.png",
        "https://images.example.evil.example/a.png",
        "https://evilimages.example/a.png",
        "https://sub.images.example/a.png",
        "https://cdn.example/a.png",
        "https://evilcdn.example/a.png",
        "https://\u0456mages.example/a.png",  # of Cyrillic letters, one
        "https://images.example./a.png",
        "https://localhost/a.png",
        "https://metadata/a.png",
    ),
    *_of(
        "a number for a host",
        Reason.URI_HOST,
        "https://127.0.0.1/a.png",
        "https://127.1/a.png",
        "https://2130706433/a.png",
        "https://0x7f000001/a.png",
        "https://0x7f.0.0.1/a.png",
        "https://017700000001/a.png",
        "https://169.254.169.254/latest/meta-data/",
        "https://\uff11\uff12\uff17.\uff10.\uff10.\uff11/a.png",
        "https://[::1]/a.png",
        "https://[::ffff:127.0.0.1]/a.png",
        "https://[fd00:ec2::254]/latest/meta-data/",
    ),
    *_of(
        "another port",
        Reason.URI_PORT,
        "https://images.example:22/a.png",
        "https://images.example:80/a.png",
        "https://images.example:6379/a.png",
        "https://images.example:0/a.png",
        "https://images.example:65979/a.png",  # 443 in 16 bits
    ),
]
KINDS = {
    "another scheme": 5,
    "no address of the kind": 8,
    "what programs read in two ways": 12,
    "a host that is not on the list": 12,
    "a number for a host": 11,
    "another port": 5,
}
NOT_PUBLIC = [
    *("127.0.0.1", "127.255.255.254", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1"),
    *("169.254.169.254", "100.64.0.1", "0.0.0.0", "192.0.0.192", "192.0.2.1", "192.88.99.1"),
    *("198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "240.0.0.1", "255.255.255.255"),
    *("168.63.129.16", "::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:93.184.216.34"),
    *("64:ff9b::7f00:1", "64:ff9b:1::1", "100::1", "2001::1", "2001:db8::1", "2002:7f00:1::"),
    *("3fff::1", "fc00::1", "fd00:ec2::254", "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1"),
]
PUBLIC = ["93.184.216.34", "1.1.1.1", "172.32.0.1", "2606:4700::1111", "2a00:1450:4001::1"]
