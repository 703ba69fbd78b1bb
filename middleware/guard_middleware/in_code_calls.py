"""One call of a guarded backend in process: what may be asked, what of the reply may be given."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from guard_middleware.asking import conversation_of, reply_outcomes, rule
from guard_middleware.context import in_force, refusal
from guard_middleware.formats.contract import Asked, Event, Piece, Refusal, Unreadable
from guard_middleware.guards import Conversation, Guard
from guard_middleware.in_code_shapes import Given, Growing, Shape
from guard_middleware.loop_thread import LOOP
from guard_middleware.metrics import Metrics
from guard_middleware.reports import report
from guard_middleware.screening import Screen
from guard_middleware.settings import Settings
from guard_middleware.strict_json import Malformed
from guard_middleware.verdict import Outcome
from guard_policies.assessment import Direction

LOG = logging.getLogger(__name__)

_MOST_AHEAD = 64  # chunks that the guard's loop may not have heard of


class Blocked(Exception):
    """A call was refused, or its reply was. The text is the refusal; `id` is that of the log line,
    and nothing here tells why: "no" and "could not judge" look the same."""

    def __init__(self, text: str, id_: str) -> None:
        super().__init__(text)
        self.id = id_


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Judges:
    """Who judges, and what was set."""

    guard: Guard
    settings: Settings
    metrics: Metrics


class Call:
    """A call, from its arguments to the end of its reply; `with` reports it at the end.

    Coroutines run in the guard's loop, all else where the caller is. `result` is what is counted.
    """

    def __init__(self, judges: Judges, shape: Shape, given: Given) -> None:
        """Raises ValueError and TypeError, which name the place, for what cannot be read."""
        self.given = given
        self.asked: Asked = shape.read(given)
        self.result = "aborted"
        self._judges = judges
        self._settings = judges.settings
        self._shape = shape
        self._id = uuid.uuid4().hex
        self._outcomes: list[tuple[Direction, Outcome]] = []
        self._screen = Screen(judges.guard, self._prompt_of, self._settings)
        self._growing: Growing | None = None
        self._giving: Future[None] | None = None
        self._free: deque[Event] = deque()  # filled in the guard's loop, emptied by the caller
        self._chunks = 0

    def __enter__(self) -> Self:
        self._judges.metrics.in_progress.inc()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        judges, outcomes = self._judges, self._outcomes
        if kind is GeneratorExit:
            self.result = "gone"
        LOOP.submit(self._close())
        outcomes += ((Direction.RESPONSE, one) for one in self._screen.outcomes)
        judges.metrics.in_progress.dec()
        name = self._shape.name
        report(judges.metrics, judges.settings, self._id, name, self.result, outcomes)

    @property
    def streams(self) -> bool:
        """Whether a stream was asked for."""
        return self.asked.streams

    async def admitted(self) -> bool:
        """Whether the backend may be called, with `given` as it then is. Raises ValueError for what
        is no conversation."""
        judges = self._judges
        settings = self._settings = await in_force(judges.settings, judges.guard)
        self._screen = Screen(judges.guard, self._prompt_of, settings)
        if self.asked.unread and settings.unscannable != "pass":
            self.result = "blocked_prompt"
            return False
        began = time.perf_counter()
        ruling = await rule(judges.guard, self.asked, settings)
        judges.metrics.prompt_seconds.observe(time.perf_counter() - began)
        self._outcomes += ((Direction.PROMPT, one) for one in ruling.outcomes)
        if ruling.blocked:
            self.result = "blocked_prompt"
        elif ruling.drop:
            self.asked, self.given = ruling.asked, self._shape.without(self.given, ruling.drop)
        return not ruling.blocked

    # A whole reply.

    async def allows(self, reply: Any) -> bool:
        """Whether the caller may have the reply. Raises TypeError for what is none."""
        try:
            pieces = self.pieces(reply)
        except (Unreadable, Malformed) as wrong:
            self.unreadable(wrong)
            return False
        return await self.allows_pieces(pieces)

    def pieces(self, reply: Any) -> Sequence[Piece]:
        """The texts of a whole reply. Raises Unreadable, Malformed, TypeError."""
        return self._shape.pieces(self.asked, self.given, reply)

    async def allows_pieces(self, pieces: Iterable[Piece]) -> bool:
        """Whether the caller may have all of these."""
        async for outcome in reply_outcomes(self._judges.guard, self._prompt_of, pieces):
            self._screen.heard(outcome)
            if outcome.blocked:
                break
        self.result = "blocked_response" if self._screen.blocked else "passed"
        return not self._screen.blocked

    def unreadable(self, wrong: Exception) -> None:
        """What of the reply cannot be read cannot be judged: nothing of it counts from here on."""
        LOG.warning("exchange %s: the reply cannot be read: %s", self._id, wrong)
        self._screen.block()
        self.result = "blocked_response"

    def refuse(self) -> Any:
        """What the caller gets in place of a whole reply. Raises Blocked where that was set."""
        return self._shape.refuse(self.asked, self.given, self._refusal())

    # A streamed one.

    @property
    def blocked(self) -> bool:
        """Whether nothing more of the stream may be given."""
        return self._screen.blocked

    def event(self, chunk: Any) -> Event:
        """The event that a chunk is. Raises Unreadable, Malformed, TypeError."""
        return self._stream.feed(chunk)

    def grow(self, chunk: Any) -> Sequence[Any]:
        """What may be given now; the backend has said this too. Waits for nothing. Raises TypeError
        for what is no chunk."""
        if self._giving is None:
            self._giving = LOOP.submit(self._give())
        self._chunks += 1
        try:
            LOOP.post(self._screen.add, self.event(chunk))
        except (Unreadable, Malformed) as wrong:
            LOOP.post(self.unreadable, wrong)
        return self._released()

    @property
    def ahead(self) -> bool:
        """Whether the backend should wait for `room`."""
        return self._screen.full or self._chunks % _MOST_AHEAD == 0

    async def room(self) -> None:
        """Until the guard knows of all that was said, and not too much of it is held back."""
        await self._screen.room()

    async def rest(self) -> Sequence[Any]:
        """What may be given of the rest: the backend has said all."""
        self._screen.end()
        await (self._give() if self._giving is None else asyncio.wrap_future(self._giving))
        self.result = "blocked_response" if self.blocked else "passed"
        return self._released()

    def last_words(self) -> Sequence[Any]:
        """What ends the stream in place of what was held back. Raises Blocked where that was
        set."""
        return self._stream.refuse(self._refusal())

    @property
    def _stream(self) -> Growing:
        if self._growing is None:
            self._growing = self._shape.grow(self.asked)
        return self._growing

    async def _close(self) -> None:
        await self._screen.close()
        self._screen.block()  # which ends _give

    async def _give(self) -> None:
        while not self.blocked and not self._screen.over:
            await self._screen.changed()
            self._free.extend(self._screen.take())

    def _released(self) -> Sequence[Any]:
        return [self._stream.released(self._free.popleft()) for _ in range(len(self._free))]

    def _refusal(self) -> Refusal:
        settings = self._settings
        if settings.refuse_with == "error":
            raise Blocked(settings.refusal, self._id)
        return refusal(settings, self._id)

    def _prompt_of(self, choice: int) -> Conversation:
        return conversation_of(self.asked.prompt_of(choice))
