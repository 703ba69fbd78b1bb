"""The TLS files of a channel: whether there are new ones, and whether those belong together."""

from __future__ import annotations

import logging
import ssl
import time
from collections.abc import Callable
from pathlib import Path

from guard_middleware.channel import TLS

LOG = logging.getLogger(__name__)
LOOK_S = 5.0


class TlsFiles:
    """Those that a TLS is made of, where it is made of files. gRPC reads them once per channel."""

    def __init__(
        self, tls: TLS | None, look_s: float = LOOK_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        parts = (tls.roots, tls.certificate, tls.key) if tls else ()
        self._tls, self._paths = tls, [one for one in parts if isinstance(one, Path)]
        self._look_s, self._clock = look_s, clock
        self._looked = clock()
        self._stamps = self._now()

    def renewed(self) -> bool:
        """Whether they are others than when last asked, and can be used; looks every `look_s`."""
        if not self._paths or self._clock() - self._looked < self._look_s:
            return False
        self._looked = self._clock()
        stamps = self._now()
        if stamps == self._stamps:
            return False
        try:
            self.check()
        except (OSError, ValueError) as error:  # half written: looked at again
            LOG.warning("new TLS files cannot be used: %s", error)
            return False
        self._stamps = stamps
        return True

    def _now(self) -> list[object]:
        return [_stamp(path) for path in self._paths]

    def check(self) -> None:
        """Raises OSError or ValueError for files that are cut off or do not belong together."""
        assert self._tls is not None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if isinstance(self._tls.roots, Path):
            context.load_verify_locations(self._tls.roots)
        if isinstance(self._tls.certificate, Path) and isinstance(self._tls.key, Path):
            context.load_cert_chain(self._tls.certificate, self._tls.key, lambda: "")


def _stamp(path: Path) -> object:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
