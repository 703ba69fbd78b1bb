"""A deadline for each verdict of a stream: one that was asked for and does not come is an error."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio

from guard_api.v1 import guard_pb2
from guard_middleware.errors import DeadlineExceeded


class Watch:
    """Knows what a stream's guard owes. For one event loop."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._sent = 0  # code points
        self._asked = -1  # up to where a verdict is wanted
        self._covered = -1
        self._since = 0.0
        self._limit: asyncio.Timeout | None = None

    def sends(self, piece: guard_pb2.StreamPiece) -> None:
        """A step is about to be written."""
        self._sent += len(piece.text)
        if piece.check or piece.end:
            if self._asked <= self._covered:
                self._since = asyncio.get_running_loop().time()
            # The end is answered even when nothing was said since the last verdict.
            self._asked = self._sent + piece.end
            self._set()

    async def read(self, call: Any) -> guard_pb2.ClassifyStreamResponse | None:
        """The next reply, None at the end. Raises DeadlineExceeded."""
        try:
            async with asyncio.timeout(None) as self._limit:
                self._set()
                reply = await call.read()
        except TimeoutError:
            raise DeadlineExceeded(
                "a verdict of the stream did not come in time",
                code=grpc.StatusCode.DEADLINE_EXCEEDED,
            ) from None
        finally:
            self._limit = None
        if reply is grpc.aio.EOF:
            return None
        self._covered = reply.covered_chars + reply.final
        self._since = asyncio.get_running_loop().time()
        answer: guard_pb2.ClassifyStreamResponse = reply
        return answer

    def _set(self) -> None:
        if self._limit is not None:
            owes = self._asked > self._covered
            self._limit.reschedule(self._since + self._timeout_s if owes else None)
