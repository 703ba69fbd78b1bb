"""Which addresses of images a policy lets be fetched; nothing is asked of the network here."""

from __future__ import annotations

import re
from dataclasses import dataclass

import idna

from guard_policies.schema import ImageUris
from guard_service.images.reasons import Reason, Refused

MOST_CHARS = 4096  # signed addresses of object stores are below 2,048
DEFAULT_PORTS = {"https": 443, "http": 80}
# Stricter than RFC 3986: no user, no quoting in the host, nothing that parsers differ about.
_URI = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://"
    r"(?P<host>[^\x00-\x20\"%/:<>?#@\[\\\]^`{|}\x7f]+|\[[0-9A-Fa-f:.]+\])(:(?P<port>[0-9]{1,5}))?"
    r"(?P<rest>[/?][A-Za-z0-9._~:/?\[\]@!$&'()*+,;=%-]*)?(#[!-~]*)?"
)


@dataclass(frozen=True, slots=True)
class Target:
    """What is asked of whom; `host` in the form that DNS and TLS know."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def url(self) -> str:
        """The address anew, from its checked pieces."""
        return f"{self.scheme}://{self.host}:{self.port}{self.path}"


def allowed(uri: str, uris: ImageUris) -> Target:
    """The target of an address; raises Refused unless the policy lets it be asked."""
    if not uris.hosts:
        raise Refused(Reason.URI_NOT_ALLOWED)
    found = _URI.fullmatch(uri) if len(uri) <= MOST_CHARS else None
    if found is None:
        raise Refused(Reason.URI_MALFORMED)
    scheme = found["scheme"].lower()
    if scheme not in uris.schemes:
        raise Refused(Reason.URI_SCHEME)
    host = _name(found["host"])
    if not any(_is_within(host, pattern) for pattern in uris.hosts):
        raise Refused(Reason.URI_HOST)
    port = int(found["port"] or DEFAULT_PORTS[scheme])
    if port not in uris.ports:
        raise Refused(Reason.URI_PORT)
    path = found["rest"] or "/"
    return Target(scheme, host, port, path if path.startswith("/") else f"/{path}")


def _name(host: str) -> str:
    """The host's name in ASCII (IDNA 2008). Numbers are no names, however they are spelled."""
    if host.startswith("["):
        raise Refused(Reason.URI_HOST)
    try:
        name = idna.encode(host, uts46=True, std3_rules=True).decode("ascii")
    except idna.IDNAError:
        raise Refused(Reason.URI_MALFORMED) from None
    if not any(letter.isalpha() for letter in name.rpartition(".")[2]) or "." not in name:
        raise Refused(Reason.URI_HOST)
    return name


def _is_within(host: str, pattern: str) -> bool:
    return host.endswith(pattern[1:]) if pattern.startswith("*.") else host == pattern
