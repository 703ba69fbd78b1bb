"""The status with which a guard ended a stream, also where a write met it.

When a server refuses a stream while its client writes, grpc.aio at times puts an INTERNAL of its
own in the place of the server's status, before or after it came (grpc/grpc#36066). A caller's
mistake would then pass for a failure of the guard's, which `on_unavailable` covers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

import grpc.aio

LOST = "Internal error from Core"  # the details of grpc.aio's own status
LATE_S = 1.0  # s; the server's status comes right behind a write that failed on it, if it comes
POLL_S = 0.01  # s


@dataclass(frozen=True, slots=True)
class Told:
    """A status, as `errors.from_rpc` reads it."""

    status: grpc.StatusCode
    text: str | None
    trailers: Any

    def code(self) -> grpc.StatusCode:
        """Its code."""
        return self.status

    def details(self) -> str | None:
        """Its text."""
        return self.text

    def trailing_metadata(self) -> Any:
        """What came with it."""
        return self.trailers

    @property
    def lost(self) -> bool:
        """Whether it stands in the place of the server's."""
        return self.status is grpc.StatusCode.INTERNAL and self.text == LOST


class Ending:
    """Keeps the first status of a call, which a failing write replaces. Of one event loop."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._first: Told | None = None
        call.add_done_callback(self._ended)

    async def status(self) -> Told:
        """The server's status, of a call that has ended; grpc.aio's own where there is none."""
        if self._first is not None and not self._first.lost:
            return self._first
        told = await self._told()
        until = asyncio.get_running_loop().time() + LATE_S
        while told.lost and asyncio.get_running_loop().time() < until:
            await asyncio.sleep(POLL_S)
            told = await self._told()
        return told

    def _ended(self, call: Any) -> None:
        """A status is there, and no other code has run since; some versions tell of each."""
        if self._first is None or self._first.lost:
            self._first = _at_once(self._told())

    async def _told(self) -> Told:
        call = self._call
        return Told(await call.code(), await call.details(), await call.trailing_metadata())


def _at_once(asked: Coroutine[Any, Any, Told]) -> Told | None:
    """What a coroutine returns that waits for nothing; None if it would."""
    try:
        asked.send(None)
    except StopIteration as answer:
        found: Told = answer.value
        return found
    asked.close()
    return None
