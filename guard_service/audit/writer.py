"""The thread that writes an audit log, and the bounded queue before it."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from guard_service.audit.chain import Entry
from guard_service.errors import NotRecorded
from guard_service.logs import FIELDS
from guard_service.metrics import AuditMetrics

LOG = logging.getLogger("guard_service.audit")
WAITING = 10_000  # lines; a disk that is slower than this is full
HELD_BYTES = 256 * 2**20  # of what they are of
AT_ONCE = 256  # lines of one write
JOIN_S = 10.0
Making = Callable[[], Entry]


class Appends(Protocol):
    """What is written to: `guard_service.audit.log.Log`, or a test's."""

    def append(self, entries: Sequence[Entry]) -> None:
        """All, or none and OSError."""
        ...

    def stop(self) -> None:
        """Write the last line and close."""
        ...


@dataclass(frozen=True, slots=True)
class _Waiting:
    make: Making
    done: Callable[[BaseException | None], None]
    weight: int


class Writer:
    """Writes entries in the order in which they are given. For one event loop.

    Entries are made, sealed and written in a thread of their own; those that wait go to the disk
    together. With `refuses`, whoever asks for a line waits for it.
    """

    def __init__(self, log: Appends, refuses: bool, metrics: AuditMetrics) -> None:
        self._log = log
        self._refuses = refuses
        self._metrics = metrics
        self._queue: queue.Queue[_Waiting | None] = queue.Queue(WAITING)
        self._held = 0
        self._counting = threading.Lock()
        self._failing = False
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="guard-audit", daemon=True)
        self._thread.start()

    async def write(self, make: Making, weight: int = 0) -> None:
        """Record what `make` gives, which runs in the writer's thread and keeps `weight` bytes.

        With `refuses` until it is written, and NotRecorded where it cannot be; otherwise at once.
        """
        if not self._refuses:
            self.soon(make, weight)
            return
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()

        def settle(error: BaseException | None) -> None:
            if not future.done():
                if error is None:
                    future.set_result(None)
                else:
                    future.set_exception(_not_recorded())

        def done(error: BaseException | None) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(settle, error)

        self._put(_Waiting(make, done, weight))
        await future

    def soon(self, make: Making, weight: int = 0) -> None:
        """Record it, and let nobody wait; what cannot be recorded is counted."""
        with suppress(NotRecorded):  # counted
            self._put(_Waiting(make, lambda error: None, weight))

    def close(self) -> None:
        """Write what waits, and the log's last line. Blocks."""
        self._closed = True
        with suppress(queue.Full):  # of a disk that hangs: the thread is left to its fate
            self._queue.put(None, timeout=JOIN_S)
            self._thread.join(JOIN_S)

    def _put(self, waiting: _Waiting) -> None:
        try:
            self._hold(waiting.weight)
            try:
                self._queue.put_nowait(waiting)
            except queue.Full:
                self._hold(-waiting.weight)
                raise
        except queue.Full:
            self._metrics.lines.labels("failed").inc()
            raise _not_recorded() from None

    def _hold(self, weight: int) -> None:
        with self._counting:
            if self._closed or self._held and self._held + weight > HELD_BYTES:
                raise queue.Full
            self._held += weight

    def _work(self) -> None:
        ended = False
        while not ended:
            batch = [self._queue.get()]
            while len(batch) < AT_ONCE and batch[-1] is not None and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            ended = batch[-1] is None
            lines = [one for one in batch if one is not None]
            self._write(lines)
            with self._counting:
                self._held -= sum(one.weight for one in lines)
        self._log.stop()

    def _write(self, batch: Sequence[_Waiting]) -> None:
        """All that can be made into one write; what cannot be made fails alone."""
        made: list[tuple[_Waiting, Entry]] = []
        for one in batch:
            try:
                made.append((one, one.make()))
            except Exception as error:
                self._failed([one], error)
        if not made:
            return
        try:
            self._log.append([entry for _, entry in made])
        except Exception as error:
            self._failed([one for one, _ in made], error)
            return
        self._metrics.lines.labels("written").inc(len(made))
        if self._failing:
            self._failing = False
            LOG.warning("the audit log is written again")
        for one, _ in made:
            one.done(None)

    def _failed(self, batch: Sequence[_Waiting], error: Exception) -> None:
        """Told once, until it works again; the text of an error that is not the disk's is not."""
        self._metrics.lines.labels("failed").inc(len(batch))
        if not self._failing:
            self._failing = True
            why = error.strerror if isinstance(error, OSError) else type(error).__name__
            LOG.error("the audit log cannot be written", extra={FIELDS: {"why": why}})
        for one in batch:
            one.done(error)


def _not_recorded() -> NotRecorded:
    return NotRecorded("the answer cannot be recorded, so it is not given; try another replica")
