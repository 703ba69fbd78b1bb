"""A deadline for each verdict of a stream: one that was asked for and does not come is an error."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import grpc.aio

from guard_api.v1 import guard_pb2
from guard_middleware.errors import DeadlineExceeded


class Owed:
    """What a stream's guard owes a reader who waits: a caller who takes his time between two
    outcomes does not make the guard late. `clock` is monotonic, in seconds."""

    def __init__(self, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._timeout_s = timeout_s
        self._clock = clock
        self._sent = 0  # code points
        self._asked = -1  # up to where a verdict is wanted
        self._covered = -1
        self._since = 0.0
        self._waits = False

    def sends(self, piece: guard_pb2.StreamPiece) -> None:
        """A step is about to be written."""
        self._sent += len(piece.text)
        if piece.check or piece.end:
            if self._asked <= self._covered:
                self._since = self._clock()
            # The end is answered even when nothing was said since the last verdict.
            self._asked = self._sent + piece.end

    def waits(self) -> None:
        """The reader waits for the next reply from now on."""
        self._waits, self._since = True, self._clock()

    def hears(self, reply: guard_pb2.ClassifyStreamResponse) -> None:
        """It has come."""
        self._waits, self._covered = False, reply.covered_chars + reply.final

    @property
    def due(self) -> float | None:
        """When the verdict that is owed is late; None while none is."""
        owes = self._waits and self._asked > self._covered
        return self._since + self._timeout_s if owes else None


class Watch:
    """The deadlines of a stream that is read in the running event loop."""

    def __init__(self, timeout_s: float) -> None:
        self._owed = Owed(timeout_s, asyncio.get_running_loop().time)
        self._limit: asyncio.Timeout | None = None

    def sends(self, piece: guard_pb2.StreamPiece) -> None:
        """A step is about to be written."""
        self._owed.sends(piece)
        if self._limit is not None:
            self._limit.reschedule(self._owed.due)

    async def read(self, call: Any) -> guard_pb2.ClassifyStreamResponse | None:
        """The next reply, None at the end. Raises DeadlineExceeded."""
        self._owed.waits()
        try:
            async with asyncio.timeout_at(self._owed.due) as self._limit:
                reply = await call.read()
        except TimeoutError:
            raise late() from None
        finally:
            self._limit = None
        if reply is grpc.aio.EOF:
            return None
        self._owed.hears(reply)
        answer: guard_pb2.ClassifyStreamResponse = reply
        return answer


class ThreadWatch:
    """The deadlines of a stream that is read by blocking: a thread cancels a call that is late."""

    def __init__(self, timeout_s: float) -> None:
        self.late = False
        self._owed = Owed(timeout_s)
        self._changed = threading.Condition()
        self._over = False

    def sends(self, piece: guard_pb2.StreamPiece) -> None:
        """A step is about to be written."""
        with self._changed:
            self._owed.sends(piece)
            self._changed.notify()

    def replies(
        self, call: Iterator[guard_pb2.ClassifyStreamResponse]
    ) -> Iterator[guard_pb2.ClassifyStreamResponse]:
        """The replies of the call."""
        while True:
            with self._changed:
                self._owed.waits()
                self._changed.notify()
            reply = next(call, None)
            if reply is None:
                return
            with self._changed:
                self._owed.hears(reply)
            yield reply

    @contextmanager
    def over(self, call: grpc.Call) -> Iterator[None]:
        """Watch the call, and cancel it on leaving if that has not been done."""
        thread = threading.Thread(
            target=self._watch, args=(call,), name="guard-stream-watch", daemon=True
        )
        thread.start()
        try:
            yield
        finally:
            with self._changed:
                self._over = True
                self._changed.notify()
            call.cancel()
            thread.join()

    def _watch(self, call: grpc.Call) -> None:
        with self._changed:
            while not self._over:
                due = self._owed.due
                left_s = None if due is None else due - time.monotonic()
                if left_s is not None and left_s <= 0:
                    self.late = True
                    break
                self._changed.wait(left_s)
        if self.late:
            call.cancel()


def late() -> DeadlineExceeded:
    """The error of a verdict that is late."""
    return DeadlineExceeded(
        "a verdict of the stream did not come in time", code=grpc.StatusCode.DEADLINE_EXCEEDED
    )
