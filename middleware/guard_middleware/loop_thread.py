"""An event loop in a thread of its own, for guards that are asked from code that may not await."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """The loop; it begins with the first coroutine and ends with the process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Begin `work`."""
        return asyncio.run_coroutine_threadsafe(work, self._running())

    def post(self, call: Callable[..., object], *args: object) -> None:
        """Have `call` called, behind all that was submitted and posted before."""
        self._running().call_soon_threadsafe(call, *args)

    @property
    def begun(self) -> bool:
        """Whether there is a loop."""
        return self._loop is not None

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` returns; who is interrupted while waiting cancels it."""
        future = self.submit(work)
        try:
            return future.result()
        finally:
            future.cancel()

    async def result(self, work: Coroutine[Any, Any, T]) -> T:
        """The same for a caller with a loop of its own, whose cancellation cancels `work`."""
        return await asyncio.wrap_future(self.submit(work))

    def _running(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                thread = threading.Thread(
                    target=self._loop.run_forever, name="guard-loop", daemon=True
                )
                thread.start()
            return self._loop


LOOP = LoopThread()
