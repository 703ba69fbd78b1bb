"""The service's side of a process that decodes (`worker`): started, asked, killed when it hangs."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from guard_service.errors import NotAssessed
from guard_service.images.frames import send
from guard_service.images.reasons import Reason, Refused

START_S = 30.0
MOST_VIEWS = 6  # on three grounds, turned and not
ANSWER_BYTES = 4096
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
ENVIRONMENT = ("LD_LIBRARY_PATH",)  # all that the process gets of ours: no tokens, no proxies
CODE = "import sys; sys.path[:] = {}; from guard_service.images.worker import main; main({}, {})"

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Found:
    """What a process found in a file; `views` are uint8 [height, width, 3]."""

    views: tuple[Pixels, ...]
    format: str
    frames: int


class DecoderProcess:
    """One process; for one thread at a time, but for `kill`."""

    def __init__(self, max_pixels: int, timeout_s: float) -> None:
        """Start it and wait until it is ready; raises NotAssessed when it does not come up."""
        self._max_pixels = max_pixels
        self._timeout_s = timeout_s
        code = CODE.format(sys.path, max_pixels, math.ceil(timeout_s))
        self._control, theirs = socket.socketpair()
        self._control.settimeout(START_S)
        try:
            with theirs:
                self._popen = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", code],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
                    start_new_session=True,
                )
        except OSError:
            self._control.close()
            raise NotAssessed("the process that decodes images cannot be started") from None
        if not self._acknowledged():
            self.kill()
            raise NotAssessed("the process that decodes images does not come up")

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._popen.poll() is None

    def decode(self, data: bytes) -> Found:
        """What is in a file. Raises Refused; when the deadline passes the process is killed."""
        deadline = time.monotonic() + self._timeout_s
        mine, theirs = socket.socketpair()
        try:
            with mine:
                with theirs:
                    socket.send_fds(self._control, [b"\0"], [theirs.fileno()])
                found = _exchanged(mine, data, self._max_pixels, deadline)
        except Refused:
            self._ended(deadline)
            raise
        except TimeoutError:
            self.kill()
            raise Refused(Reason.TOO_COSTLY) from None
        except (OSError, EOFError, ValueError, LookupError, TypeError):  # died, or gone mad
            self._ended(deadline)
            raise Refused(Reason.DECODER_DIED) from None
        if not self._ended(deadline):
            raise Refused(Reason.DECODER_DIED)
        return found

    def kill(self) -> None:
        """End the process, and the child that it may have, at once."""
        if self._popen.returncode is None:  # else its number may be another's by now
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()
        # Its orphan is ours where nobody stands above us, as in a container.
        with suppress(ChildProcessError):
            while True:
                os.waitpid(-self._popen.pid, 0)
        self._control.close()

    def _ended(self, deadline: float) -> bool:
        """Whether the image's child has ended, and well; the process is killed if it has not."""
        self._control.settimeout(max(deadline - time.monotonic(), 0.001))
        ended = self._acknowledged()
        if ended is None:
            self.kill()
        return bool(ended)

    def _acknowledged(self) -> bool | None:
        """Whether all is well, as the process says; None when it says nothing."""
        with suppress(OSError):
            if word := self._control.recv(1):
                return word == b"\0"
        return None


def _exchanged(connection: socket.socket, data: bytes, max_pixels: int, deadline: float) -> Found:
    """Send an image, read the answer."""
    connection.settimeout(_left(deadline))
    send(connection, data)
    size = int.from_bytes(_read(connection, 4, deadline), "big")
    if size > ANSWER_BYTES:
        raise ValueError("an answer of that size")
    answer = json.loads(_read(connection, size, deadline))
    if "refused" in answer:
        raise Refused(Reason(answer["refused"]))
    shapes = [_shape(pair, max_pixels) for pair in answer["views"]]
    if not 1 <= len(shapes) <= MOST_VIEWS or answer["format"] not in FORMATS:
        raise ValueError("an answer of that kind")
    views = tuple(_pixels(connection, *shape, deadline) for shape in shapes)
    return Found(views, answer["format"], int(answer["frames"]))


def _shape(pair: Any, max_pixels: int) -> tuple[int, int]:
    width, height = map(int, pair)
    if not (width > 0 < height and width * height <= max_pixels):
        raise ValueError("a view of that size")
    return width, height


def _pixels(connection: socket.socket, width: int, height: int, deadline: float) -> Pixels:
    rows = np.frombuffer(_read(connection, width * height * 3, deadline), np.uint8)
    rows.flags.writeable = False
    return rows.reshape(height, width, 3)


def _read(connection: socket.socket, size: int, deadline: float) -> bytearray:
    """So many bytes; raises TimeoutError, EOFError, OSError."""
    data = bytearray(size)
    rest = memoryview(data)
    while rest:
        connection.settimeout(_left(deadline))
        count = connection.recv_into(rest)
        if not count:
            raise EOFError
        rest = rest[count:]
    return data


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
