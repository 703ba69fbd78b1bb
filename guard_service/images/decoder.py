"""Decodes images in processes of its own: bounds, deadlines, order of arrival."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from guard_service.conversation import Picture
from guard_service.errors import Overloaded, ShuttingDown
from guard_service.images.process import DecoderProcess, Pixels

RETRY_S = 1.0


@dataclass(frozen=True, slots=True)
class DecoderBounds:
    """What decoding is held to.

    No image is begun while others, decoded and not yet judged, take `held_bytes`.
    """

    workers: int
    pixels: int  # of one image
    timeout_s: float  # for one image
    held_bytes: int


@dataclass(frozen=True, slots=True)
class Decoded:
    """An image's views, the usual one first, and what was found out about the file."""

    views: tuple[Picture, ...]
    digest: str
    mime_type: str
    frames: int


class Decoder:
    """Processes that decode; the first starts when the first image comes. For any event loop."""

    def __init__(self, bounds: DecoderBounds) -> None:
        self._bounds = bounds
        self._threads = ThreadPoolExecutor(bounds.workers, thread_name_prefix="guard-image")
        self._processes: set[DecoderProcess] = set()
        self._idle: list[DecoderProcess] = []
        self._held = 0
        # Pixels may be freed at any moment, by a thread that holds the lock too.
        self._lock = threading.RLock()
        self._closed = False

    @property
    def held_bytes(self) -> int:
        """Bytes of all images, decoded and encoded, whose pixels somebody still has."""
        return self._held

    async def decode(self, data: bytes) -> Decoded:
        """The image.

        Raises Refused with the reason why it is not to be had, Overloaded when too many pixels are
        held, NotAssessed when no process can be started.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._decode, data)

    def close(self) -> None:
        """End the processes; images in progress are refused."""
        self._closed = True
        for process in [*self._processes]:
            process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:  # that started meanwhile
            process.kill()

    def _decode(self, data: bytes) -> Decoded:
        if self._held >= self._bounds.held_bytes:
            raise Overloaded("too many images are in progress; retry later", RETRY_S)
        with self._process() as process:
            found = process.decode(data)
        self._hold(found.views[0], len(data))
        for pixels in found.views:
            self._hold(pixels, pixels.nbytes)
        digest = hashlib.sha256(data)
        return Decoded(
            views=tuple(
                Picture(_digest_of(digest, index), pixels)
                for index, pixels in enumerate(found.views)
            ),
            digest=_digest_of(digest, 0),
            mime_type=f"image/{found.format.lower()}",
            frames=found.frames,
        )

    @contextmanager
    def _process(self) -> Iterator[DecoderProcess]:
        """A process for one image: an idle one, or a new one. One that was lost is replaced."""
        if self._closed:
            raise ShuttingDown
        process = self._idle_one()
        if process is None:
            process = DecoderProcess(self._bounds.pixels, self._bounds.timeout_s)
            self._processes.add(process)
        try:
            yield process
        finally:
            if process.alive:
                self._idle.append(process)
            else:
                self._lose(process)

    def _idle_one(self) -> DecoderProcess | None:
        """One that still lives."""
        while True:
            try:
                process = self._idle.pop()
            except IndexError:
                return None
            if process.alive:
                return process
            self._lose(process)

    def _lose(self, process: DecoderProcess) -> None:
        self._processes.discard(process)
        process.kill()

    def _hold(self, pixels: Pixels, size: int) -> None:
        """Count so many bytes for as long as anybody has the pixels."""
        self._count(size)
        weakref.finalize(pixels, self._count, -size)

    def _count(self, size: int) -> None:
        with self._lock:
            self._held += size


def _digest_of(digest: hashlib._Hash, view: int) -> str:
    """Of the encoded bytes for the usual view; each other view has one of its own."""
    own = digest.copy()
    if view:
        own.update(f"view {view}".encode())
    return f"sha256:{own.hexdigest()}"
