"""A bearer token from a file, as tokens are rotated: read anew whenever the file is another."""

from __future__ import annotations

import ipaddress
import logging
import re
from pathlib import Path

LOG = logging.getLogger(__name__)
MOST_BYTES = 16_384
Metadata = tuple[tuple[str, str], ...]


class TokenFile:
    """The token in a file, without the white space around it. For any thread.

    Kubernetes swaps the link behind a projected token's path some time before the old one expires;
    the next call then sends the new one. While there is nothing to read, the last token is sent.
    """

    def __init__(self, path: Path) -> None:
        """Raises ValueError, which names the file, where there is no token in it now."""
        self.path = path
        self._read: tuple[object, Metadata] = self._now()

    def metadata(self) -> Metadata:
        """For a call. Never raises."""
        try:
            if self._stamp() != self._read[0]:
                self._read = self._now()
        except (OSError, ValueError) as error:
            LOG.warning("the token before is sent: %s", error)
        return self._read[1]

    def _stamp(self) -> object:
        status = self.path.stat()
        return status.st_ino, status.st_size, status.st_mtime_ns

    def _now(self) -> tuple[object, Metadata]:
        try:
            stamp = self._stamp()
            with self.path.open("rb") as file:
                token = file.read(MOST_BYTES + 1).strip()
        except OSError as error:
            raise ValueError(f"token file {self.path}: {error.strerror or error}") from None
        if not token or len(token) > MOST_BYTES or not token.isascii() or len(token.split()) > 1:
            raise ValueError(f"token file {self.path}: does not hold one token")
        return stamp, (("authorization", f"Bearer {token.decode()}"),)


def check_private(target: str, tls: bool) -> None:
    """Raises ValueError where a token would travel unencrypted: without TLS only this machine."""
    if tls or target.startswith(("unix:", "unix-abstract:")):
        return
    places = target.rpartition("/")[2].removeprefix("ipv4:").removeprefix("ipv6:")
    hosts = [re.sub(r":[0-9]+$", "", place) for place in places.split(",")]
    if not all(map(_is_local, hosts)):
        raise ValueError(
            f"a token is sent over TLS, or within this machine; {target} is neither: turn TLS on"
        )


def _is_local(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
