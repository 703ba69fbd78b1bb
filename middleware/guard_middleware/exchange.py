"""One screened request: read it, have it judged, call the application, hand on what may go."""

from __future__ import annotations

import asyncio
import time
import uuid
from dataclasses import replace

from guard_middleware.asking import Ruling, rule
from guard_middleware.bodies import Encoded, Gone, Headers, TooLarge, read_body, replaced
from guard_middleware.context import Context, id_header, in_force, refused
from guard_middleware.formats.contract import Asked, Format, Unreadable
from guard_middleware.image_fetching import Fetching, inlined
from guard_middleware.messages import Header, Message, Receive, Scope, Send, answer, is_last
from guard_middleware.relay import Relay
from guard_middleware.reports import report
from guard_middleware.strict_json import Json, Malformed, dump, parse
from guard_middleware.tracing import exchange, exemplar
from guard_middleware.verdict import Outcome
from guard_policies.assessment import Direction

# What no longer holds of a body that was read and written again, and what would bring a packed or
# a partial reply.
_REQUEST_HEADERS = (
    *(b"content-length", b"content-encoding", b"content-type", b"content-md5", b"digest"),
    *(b"transfer-encoding", b"accept-encoding", b"range", b"if-range", b"te", b"expect"),
    *(b"trailer", b"x-guard-verdict-id"),
)


# In a scope: the id to tell, where the caller has to know it before the reply begins.
VERDICT_ID = "guard_middleware.verdict_id"

_Call = tuple[Scope, bytes, asyncio.Task[None]]


class Exchange:
    """A request on a path that a format owns, and the reply to it. `result` is what is counted."""

    def __init__(self, context: Context, reads: Format) -> None:
        self._context = context
        self._format = reads
        self._id = uuid.uuid4().hex
        self.result = "aborted"
        self._outcomes: list[tuple[Direction, Outcome]] = []
        self._relay: Relay | None = None

    async def run(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve it to its end. The client's leaving ends all that was begun for it."""
        self._id = scope.get(VERDICT_ID, self._id)
        context = self._context
        with (
            context.metrics.in_progress.track_inprogress(),
            exchange(context.tracing, scope, self._format.name) as span,
        ):
            try:
                await self._run(scope, receive, send)
            except Gone:
                self.result = "gone"
            finally:
                self._report()
                if span is not None:
                    span.tell(self._id, self.result, len(self._outcomes))

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        settings = self._context.settings
        try:
            body = await read_body(receive, scope["headers"], settings.max_body_bytes)
        except (TooLarge, Encoded) as wrong:
            status = 413 if isinstance(wrong, TooLarge) else 415
            await self._invalid(send, status, str(wrong))
            return
        answered = False

        async def reply(message: Message) -> None:
            nonlocal answered
            await send(message)
            answered = answered or is_last(message)

        left = asyncio.create_task(_left(receive), name="guard-client-left")
        work = asyncio.create_task(self._serve(scope, body, left, reply), name="guard-exchange")
        try:
            await asyncio.wait((left, work), return_when=asyncio.FIRST_COMPLETED)
            gone = not work.done() and not answered  # servers tell of every end
            if not gone:
                await work
        finally:
            left.cancel()
            work.cancel()
            await asyncio.gather(left, work, return_exceptions=True)
        await self._settle()
        if gone:
            raise Gone

    async def _settle(self) -> None:
        """Background work of the application goes on behind the reply, as it does without us."""
        if self._relay is not None:
            try:
                await self._relay.settle()
            finally:
                self._relay.cancel()

    async def _serve(self, scope: Scope, body: bytes, left: asyncio.Task[None], send: Send) -> None:
        settings = await in_force(self._context.settings, self._context.guard)
        self._context = replace(self._context, settings=settings)
        try:
            value = parse(body, folded=True)
            asked = self._format.read_request(scope["path"], value)
            if asked.unread and settings.image_urls == "guard":
                await self._fetch_images(value)
                asked = self._format.read_request(scope["path"], value)
            body = dump(value)
        except (Malformed, Unreadable) as wrong:
            await self._invalid(send, 400, f"The request {wrong}.")
            return
        if len(body) > settings.max_body_bytes:
            await self._invalid(send, 413, "The request is too large with its images.")
            return
        blocked = any(outcome.blocked for _, outcome in self._outcomes)
        if blocked or asked.unread and settings.unscannable != "pass":
            await self._refuse(send, asked, "blocked_prompt")
            return
        relay = self._relay = Relay(self._context, self._format, asked, self._id)
        try:
            await self._screened(relay, (scope, body, left), value, send)
        finally:
            await relay.close()
            self._outcomes += ((Direction.RESPONSE, one) for one in relay.outcomes)

    async def _fetch_images(self, value: Json) -> None:
        """Put the images that the guard fetches in the place of their addresses."""
        guard = self._context.guard
        if isinstance(guard, Fetching):
            outcomes = await inlined(guard, self._format.name, value)
            self._outcomes += ((Direction.PROMPT, one) for one in outcomes)

    async def _screened(self, relay: Relay, call: _Call, value: Json, send: Send) -> None:
        beside = self._context.settings.prompt_check == "beside"
        if beside:
            relay.call(*_as_asgi(*call))
        try:
            ruling = await self._rule(relay.asked)
        except ValueError as wrong:
            await self._invalid(send, 400, f"The request {wrong}.")
            return
        if ruling.blocked:
            await self._refuse(send, relay.asked, "blocked_prompt")
            return
        if ruling.drop:
            await relay.recall(ruling.asked)
            scope, _, left = call
            call = (scope, dump(self._format.without(value, ruling.drop)), left)
        if ruling.drop or not beside:
            relay.call(*_as_asgi(*call))
        self.result = await relay.deliver(send)

    async def _rule(self, asked: Asked) -> Ruling:
        began = time.perf_counter()
        ruling = await rule(self._context.guard, asked, self._context.settings)
        self._context.metrics.prompt_seconds.observe(time.perf_counter() - began, exemplar())
        self._outcomes += ((Direction.PROMPT, one) for one in ruling.outcomes)
        return ruling

    async def _invalid(self, send: Send, status: int, message: str) -> None:
        self.result = "invalid"
        given = self._format.error(status, "invalid_request", message)
        await answer(send, given, id_header(self._id))

    async def _refuse(self, send: Send, asked: Asked, result: str) -> None:
        self.result = result
        given = refused(self._context.settings, self._format, asked, self._id)
        await answer(send, given, id_header(self._id))

    def _report(self) -> None:
        context = self._context
        name, outcomes = self._format.name, self._outcomes
        report(context.metrics, context.settings, self._id, name, self.result, outcomes)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def forwarded(headers: Headers, *more: Header) -> list[Header]:
    """The headers of a request that goes on with a body that was judged."""
    own = ((b"content-type", b"application/json"), (b"accept-encoding", b"identity"))
    return replaced(headers, _REQUEST_HEADERS, *own, *more)


def _as_asgi(scope: Scope, body: bytes, left: asyncio.Task[None]) -> tuple[Scope, Receive]:
    """What the application gets: the very values that were judged, and no way round `send`."""
    headers = forwarded(scope["headers"], (b"content-length", str(len(body)).encode()))
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await asyncio.wait((left,))
        return {"type": "http.disconnect"}

    return {**scope, "headers": headers, "extensions": {}}, receive
