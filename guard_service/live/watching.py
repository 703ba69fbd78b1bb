"""Files that change while the service runs: noticed by what they hold, loaded whole or not."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import stat
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

LOG = logging.getLogger(__name__)
LOOKED_INTO = 4 * 2**20  # bytes; of a larger file its place, size and time stand for its content
SETTLE_S = 0.1  # files that still change after this are being written, and are looked at again
ATTEMPTS = 50  # to find them at rest

T = TypeVar("T")


class Unsettled(OSError):
    """Files that changed whenever they were looked at."""


@dataclass(frozen=True, slots=True)
class Watched(Generic[T]):
    """Something made of files, and how it is made anew.

    `load` runs in a thread and its result is dropped where the files changed meanwhile, so that
    `use`, in the event loop, gets what was there at one time. `failed` gets whatever these two
    raise; what is in use then stays so.
    """

    name: str
    paths: Sequence[Path]
    load: Callable[[], T]
    use: Callable[[T], Awaitable[None]]
    failed: Callable[[Exception], None]
    fingerprint: Callable[[Sequence[Path]], bytes] | None = None  # default: `contents`


class Watcher:
    """Looks at files every `period_s` seconds (0: only when told) and has loaded what changed.

    Each thing is followed by a task of its own: one that loads for minutes holds up no other. The
    first look always loads, since the files may have changed after the service read them; `use`
    must find out by itself that nothing is new. For one event loop.
    """

    def __init__(self, period_s: float, settle_s: float = SETTLE_S) -> None:
        self._period_s = period_s
        self._settle_s = settle_s
        self._followed: list[_Followed] = []
        self._tasks: list[asyncio.Task[None]] = []

    def add(self, watched: Watched[Any]) -> None:
        """Follow one more thing; before `start`."""
        self._followed.append(_Followed(watched, self._settle_s))

    def start(self) -> None:
        """Begin to look; in the event loop that `use` belongs to."""
        self._tasks = [asyncio.create_task(self._follow(one)) for one in self._followed]

    def now(self) -> None:
        """Load everything anew soon, changed or not: what SIGHUP means."""
        for one in self._followed:
            one.told.set()

    async def reload(self, name: str = "") -> None:
        """Load what has that name (empty: everything) now, changed or not, and wait for it."""
        chosen = [one for one in self._followed if name in ("", one.watched.name)]
        await asyncio.gather(*(one.look(force=True) for one in chosen))

    async def close(self) -> None:
        """Look no more. What is being loaded is dropped when it is there."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []

    async def _follow(self, one: _Followed) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._period_s or None):
                    await one.told.wait()
            told = one.told.is_set()
            one.told.clear()
            try:
                await one.look(force=told)
            except Exception:  # a defect, which must not end the watch
                LOG.exception("looking at the files of %s failed", one.watched.name)


class _Followed:
    """One thing and what its files were when it was loaded last."""

    def __init__(self, watched: Watched[Any], settle_s: float) -> None:
        self.watched = watched
        self.told = asyncio.Event()
        self._settle_s = settle_s
        self._seen: bytes | None = None
        self._lock = asyncio.Lock()

    async def look(self, force: bool) -> None:
        """Load if the files changed, or anyway."""
        async with self._lock:
            if not force and await self._fingerprint() == self._seen:
                return
            try:
                await self._load()
            except Exception as error:
                self.watched.failed(error)

    async def _load(self) -> None:
        """Load files that are at rest before, while and after they are read."""
        for _ in range(ATTEMPTS):
            before = await self._fingerprint()
            await asyncio.sleep(self._settle_s)
            if await self._fingerprint() != before:
                continue
            self._seen = before  # what fails is not tried again before it changes
            try:
                loaded = await asyncio.to_thread(self.watched.load)
            except Exception:
                if await self._fingerprint() != before:
                    continue
                raise
            if await self._fingerprint() == before:
                await self.watched.use(loaded)
                return
        raise Unsettled(f"the files of {self.watched.name} do not stop changing; write them once")

    async def _fingerprint(self) -> bytes:
        made = self.watched.fingerprint or contents
        return await asyncio.to_thread(made, self.watched.paths)


def contents(paths: Sequence[Path]) -> bytes:
    """What stands for the content of files, and of the files right below folders.

    Links are followed, so that a Kubernetes ConfigMap's swap of its `..data` link is seen. What
    begins with a dot is not looked at. What is not there, or cannot be read, counts as that.
    """
    digest = hashlib.sha256()
    for path in paths:
        _add(digest, os.fsencode(path))
        try:
            inside = sorted(path.iterdir()) if path.is_dir() else [path]
        except OSError as error:
            inside = []
            _add(digest, repr(error.errno).encode())
        for file in inside:
            if file is path or not file.name.startswith("."):
                _add(digest, os.fsencode(file.name), _content(file))
    return digest.digest()


def _content(file: Path) -> bytes:
    try:
        handle = os.open(file, os.O_RDONLY | os.O_NONBLOCK)  # never waits on a pipe
        with open(handle, "rb") as opened:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode) or status.st_size > LOOKED_INTO:
                return repr((status.st_ino, status.st_size, status.st_mtime_ns)).encode()
            return opened.read()
    except OSError as error:
        return repr(error.errno).encode()


def _add(digest: hashlib._Hash, *words: bytes) -> None:
    for word in words:
        digest.update(len(word).to_bytes(8, "big") + word)
