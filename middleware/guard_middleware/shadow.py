"""Shadow mode: applications answer as if nobody watched, and copies of exchanges are screened."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

from guard_middleware.context import Context
from guard_middleware.exchange import Exchange
from guard_middleware.failures import log_failure
from guard_middleware.formats.contract import Format
from guard_middleware.messages import Message, Receive, Scope, Send

LOG = logging.getLogger(__name__)

MOST_COPIES = 256
DRAIN_S = 5.0
SKIPPED = "skipped"


class Shadows:
    """Screens copies beside the exchanges they were taken of.

    A copy runs the very road of an enforced exchange, towards an application that repeats what the
    real one says and a client that is not there: what it reports is what enforcing would have done.
    Copies are dropped, and counted as skipped, where the guard is too slow for all of them.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, reads: Format, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve an exchange untouched."""
        if len(self._tasks) >= MOST_COPIES:
            self._skipped(reads)
            await self._context.app(scope, receive, send)
            return
        settings = self._context.settings
        copy = _Copy(settings.max_body_bytes + settings.max_reply_bytes)
        task = asyncio.create_task(self._screen(copy, reads, {**scope}), name="guard-shadow")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            await self._context.app(scope, copy.hearing(receive), copy.saying(send))
        finally:
            copy.end()

    async def close(self) -> None:
        """Finish what is under way, or end it."""
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=DRAIN_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    async def _screen(self, copy: _Copy, reads: Format, scope: Scope) -> None:
        exchange = Exchange(replace(self._context, app=copy.repeat), reads)
        work = asyncio.create_task(exchange.run(scope, copy.request, _nobody))
        lost = asyncio.create_task(copy.lost.wait())
        try:
            await asyncio.wait((work, lost), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                exchange.result = SKIPPED
            elif not work.cancelled() and (failure := work.exception()):
                log_failure(LOG, "a copy could not be screened", failure)
        finally:
            copy.forget()
            work.cancel()
            lost.cancel()
            await asyncio.gather(work, lost, return_exceptions=True)

    def _skipped(self, reads: Format) -> None:
        self._context.metrics.exchanges.labels(reads.name, SKIPPED, "shadow").inc()


class _Copy:
    """What was heard and said in one exchange; `lost` is set when more waits than may be held."""

    def __init__(self, most_bytes: int) -> None:
        self.lost = asyncio.Event()
        self._most = most_bytes
        self._bytes = 0
        self._heard: asyncio.Queue[Message | None] = asyncio.Queue()
        self._said: asyncio.Queue[Message | None] = asyncio.Queue()
        self._asked = False  # the request is complete
        self._kept = True

    def hearing(self, receive: Receive) -> Receive:
        """`receive`, listened to."""

        async def heard() -> Message:
            message = await receive()
            if not self._asked:
                self._asked = message["type"] == "http.request" and not message.get("more_body")
                self._keep(self._heard, message)
            return message

        return heard

    def saying(self, send: Send) -> Send:
        """`send`, listened to: first the client gets it, then the copy."""

        async def said(message: Message) -> None:
            await send(message)
            self._keep(self._said, message)

        return said

    def end(self) -> None:
        """The application has returned."""
        if not self._asked:
            self._heard.put_nowait({"type": "http.disconnect"})
        self._said.put_nowait(None)

    def forget(self) -> None:
        """Nobody reads any more."""
        self._kept = False
        self._heard, self._said = asyncio.Queue(), asyncio.Queue()

    async def request(self) -> Message:
        """The client's messages again; then nothing, for as long as anybody waits."""
        message = await self._next(self._heard)
        assert message is not None
        return message

    async def repeat(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application again."""
        while (message := await self._next(self._said)) is not None:
            await send(message)

    def _keep(self, kept: asyncio.Queue[Message | None], message: Message) -> None:
        if self._kept:
            kept.put_nowait(dict(message))
            self._bytes += _size(message)
            if self._bytes > self._most:
                self.lost.set()
                self.forget()

    async def _next(self, kept: asyncio.Queue[Message | None]) -> Message | None:
        message = await kept.get()
        self._bytes -= _size(message) if message else 0
        return message


def _size(message: Message) -> int:
    return len(message.get("body") or b"")


async def _nobody(message: Message) -> None:
    """The client of a copy."""
