"""The reply to one screened request: from the application's messages to the client's."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable

from guard_middleware.asking import conversation_of, reply_outcomes
from guard_middleware.bodies import (
    Encoded,
    Headers,
    TooLarge,
    Unpacker,
    coding_of,
    media_type,
    replaced,
)
from guard_middleware.context import Context, id_header, refusal, refused
from guard_middleware.delays import Delays
from guard_middleware.failures import log_failure
from guard_middleware.formats import fields
from guard_middleware.formats.contract import (
    Answer,
    Asked,
    Event,
    Format,
    Piece,
    ReplyStream,
    Unreadable,
)
from guard_middleware.guards import Conversation
from guard_middleware.messages import (
    Header,
    Message,
    Receive,
    Scope,
    Send,
    StreamedAnswer,
    answer,
    is_last,
)
from guard_middleware.screening import Screen
from guard_middleware.strict_json import Malformed, parse
from guard_middleware.tracing import upstream
from guard_middleware.verdict import Outcome

LOG = logging.getLogger(__name__)

# What no longer holds of a reply that was unpacked, held back and perhaps cut.
_REPLY_HEADERS = (
    *(b"content-length", b"content-encoding", b"transfer-encoding", b"content-md5", b"digest"),
    *(b"etag", b"accept-ranges", b"trailer", b"x-guard-verdict-id"),
)
_UNREADABLE = (Malformed, Unreadable, Encoded, TooLarge)


def delivered(headers: Headers, id_: str) -> list[Header]:
    """The headers of a reply that goes on as far as verdicts cover it."""
    return replaced(headers, _REPLY_HEADERS, id_header(id_))


class Relay:
    """Calls the application and delivers its reply as far as verdicts cover it."""

    def __init__(self, context: Context, format_: Format, asked: Asked, id_: str) -> None:
        self.asked = asked
        self.delays = Delays(context.metrics)
        self._context = context
        self._format = format_
        self._id = id_
        self._prompts: dict[int, Conversation] = {}
        self._reset()

    def _reset(self) -> None:
        self._task: asyncio.Task[None] | None = None
        self._failure: Exception | None = None
        self._start: Message | None = None
        self._stream: ReplyStream | None = None
        self._screen = Screen(self._context.guard, self._prompt_of, self._context.settings)
        self._unpacker: Unpacker | None = None
        self._chunks: list[bytes] = []
        self._unreadable = False
        self._complete = False  # the application has sent its last byte
        self._over = False  # and so has it, or it never will
        self._said_all = False  # the application has, readable or not: what it does now is its own
        self._begun = asyncio.Event()
        self._whole = asyncio.Event()
        self.outcomes: list[Outcome] = []

    def call(self, scope: Scope, receive: Receive) -> None:
        """Begin the application's work."""
        self.delays.called()
        self._task = asyncio.create_task(self._run(scope, receive), name="guard-application")

    async def recall(self, asked: Asked) -> None:
        """Forget a call that was begun: something else will be asked."""
        self.cancel()
        await self.close()
        await self.settle()
        self._prompts.clear()
        self._reset()
        self.asked = asked

    def cancel(self) -> None:
        """End the application's work."""
        if self._task is not None:
            self._task.cancel()

    async def settle(self) -> None:
        """Until the application has returned: it may have work to do behind its reply."""
        if self._task is not None:
            await asyncio.wait((self._task,))

    async def close(self) -> None:
        """End what is under way, but not an application that has said all. The outcomes stay."""
        await self._screen.close()  # first: an application that ends would have all of it judged
        if not self._said_all:
            self.cancel()
            await self.settle()
        self.outcomes += self._screen.outcomes
        self._screen.outcomes = []

    async def deliver(self, send: Send) -> str:
        """Send the reply to its end; how it ended. Raises what the application raised before it
        began to answer."""
        await self._begun.wait()
        if self._start is None:
            if self._failure is not None:
                raise self._failure
            return await self._answer(send, self._broken(), "aborted")
        if self._stream is None:
            await self._whole.wait()
            return await self._deliver_whole(send)
        return await self._deliver_stream(send, self._stream)

    # The application's side.

    async def _run(self, scope: Scope, receive: Receive) -> None:
        try:
            with upstream(scope, self._format.name) as scope:
                await self._context.app(scope, receive, self._take)
        except Exception as failure:
            self._failure = failure
            if self._start is not None:
                log_failure(LOG, "the application failed while it answered", failure)
        finally:
            self._ended()

    async def _take(self, message: Message) -> None:
        """The application's `send`."""
        if is_last(message):
            self._said_all = True
        if self._over:
            return
        if message["type"] == "http.response.start":
            self._begin(message)
        elif message["type"] == "http.response.body" and self._unpacker is not None:
            try:
                data = self._unpacker.feed(message.get("body", b""))
                if self._stream is None:
                    self._chunks.append(data)
                    self.delays.said(bool(data))
                else:
                    await self._hold(self._stream.feed(data))
            except _UNREADABLE as wrong:
                self._refuse_to_read(wrong)
            if self._said_all:
                self._complete = True
                self._ended()

    def _begin(self, message: Message) -> None:
        if self._start is not None:
            return
        headers = list(message.get("headers", ()))
        self._start = {**message, "headers": headers}
        kind = media_type(headers)
        streams = kind in self._format.stream_types
        most = self._context.settings.max_reply_bytes
        try:
            self._unpacker = Unpacker(coding_of(headers), most, each=streams)
        except Encoded as wrong:
            self._refuse_to_read(wrong)
        if streams:
            self._stream = self._format.open_stream(self.asked, kind)
            self._begun.set()

    async def _hold(self, events: Iterable[Event]) -> None:
        for event in events:
            self.delays.said(bool(event.pieces))
            self._screen.add(event)
            await self._screen.room()

    def _refuse_to_read(self, wrong: Exception) -> None:
        """Nothing of the reply counts from here on: what cannot be read cannot be judged."""
        LOG.warning("exchange %s: the reply cannot be read: %s", self._id, wrong)
        self._unreadable = True
        self._screen.block()
        self._complete = True
        self._ended()

    def _ended(self) -> None:
        if self._over:
            return
        self._over = True
        self.delays.said_all()
        if self._stream is not None and not self._unreadable:
            try:
                for event in self._stream.finish():
                    self._screen.add(event)
                if self._unpacker is not None and self._complete:
                    self._unpacker.finish()
            except _UNREADABLE as wrong:
                if self._complete:
                    LOG.warning("exchange %s: the reply's end cannot be read: %s", self._id, wrong)
                    self._screen.block()
        self._screen.end()
        self._begun.set()
        self._whole.set()

    # The client's side.

    async def _deliver_stream(self, send: Send, stream: ReplyStream) -> str:
        client = StreamedAnswer(send, self._started())
        settings, screen = self._context.settings, self._screen
        while True:
            if events := screen.take():
                await client.write(b"".join(event.raw for event in events))
                for event in events:
                    stream.released(event)
                    self.delays.gave(bool(event.pieces))
            elif screen.blocked:
                if not client.begun:
                    given = refused(settings, self._format, self.asked, self._id)
                    return await self._answer(send, given, "blocked_response")
                await client.finish(stream.refuse(refusal(settings, self._id)))
                return "blocked_response"
            elif screen.over:
                await client.finish(b"" if self._complete else stream.abort())
                self.delays.gave_all()
                return "passed" if self._complete else "aborted"
            else:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(settings.idle_check_s):
                        await screen.changed()
                        continue
                screen.check()
                if client.silent_s >= settings.keep_alive_s:
                    await client.write(stream.keep_alive())

    async def _deliver_whole(self, send: Send) -> str:
        assert self._start is not None
        status, body = self._start["status"], b"".join(self._chunks)
        if not self._complete:
            return await self._answer(send, self._broken(), "aborted")
        if body and not self._unreadable:
            try:
                pieces = self._read(status, body)
            except _UNREADABLE as wrong:
                self._refuse_to_read(wrong)
            else:
                await self._judge(pieces)
        if self._screen.blocked:
            if status >= 300:  # an error is told as one, without the words of it
                given = self._format.error(status, "upstream_error", "The backend gave an error.")
            else:
                given = refused(self._context.settings, self._format, self.asked, self._id)
            return await self._answer(send, given, "blocked_response")
        length = (b"content-length", str(len(body)).encode())
        start = self._started()
        await send({**start, "headers": [*start["headers"], length]})
        self.delays.gave(bool(body))
        await send({"type": "http.response.body", "body": body, "more_body": False})
        self.delays.gave_all()
        return "passed"

    def _read(self, status: int, body: bytes) -> list[Piece]:
        if self._unpacker is not None:
            self._unpacker.finish()
        value = parse(body)
        if status >= 300:
            return list(fields.tree_pieces(value, 0, "error"))
        return list(self._format.read_reply(self.asked, value))

    async def _judge(self, pieces: list[Piece]) -> None:
        async for outcome in reply_outcomes(self._context.guard, self._prompt_of, pieces):
            self._screen.heard(outcome)
            if outcome.blocked:
                return

    async def _answer(self, send: Send, given: Answer, result: str) -> str:
        await answer(send, given, id_header(self._id))
        return result

    def _broken(self) -> Answer:
        return self._format.error(502, "upstream_failed", "The backend's reply broke off.")

    def _started(self) -> Message:
        assert self._start is not None
        headers = delivered(self._start["headers"], self._id)
        start = {key: value for key, value in self._start.items() if key != "trailers"}
        return {**start, "headers": headers}

    def _prompt_of(self, choice: int) -> Conversation:
        if choice not in self._prompts:
            self._prompts[choice] = conversation_of(self.asked.prompt_of(choice))
        return self._prompts[choice]
