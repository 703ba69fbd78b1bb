"""A streamed reply held back until verdicts cover it: the no-leak invariant lives here."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from contextvars import copy_context
from dataclasses import dataclass

from guard_middleware.calls import Piece
from guard_middleware.failures import log_failure
from guard_middleware.formats.contract import Channel, Event
from guard_middleware.guards import Conversation, Guard
from guard_middleware.settings import Settings
from guard_middleware.verdict import Outcome
from guard_policies.cadence import Cadence
from guard_policies.schema import Stream

LOG = logging.getLogger(__name__)
_ALL = 2**62
_HELD_EVENTS = 1024


@dataclass(frozen=True, slots=True)
class _Held:
    """An event and how far each of its channels must be covered before it may go."""

    event: Event
    needs: tuple[tuple[_Growing, int], ...]

    @property
    def covered(self) -> bool:
        return all(growing.covered >= end for growing, end in self.needs)


class Screen:
    """Holds the events of one reply. For one event loop.

    `add` takes events as the backend sends them. `take` gives those that verdicts of ALLOW or FLAG
    cover with all their texts, in order. Once `blocked` is true, nothing is given any more.
    """

    def __init__(
        self, guard: Guard, prompt_of: Callable[[int], Conversation], settings: Settings
    ) -> None:
        self.blocked = False
        self.outcomes: list[Outcome] = []
        self._guard = guard
        self._prompt_of = prompt_of
        self._settings = settings
        self._channels: dict[Channel, _Growing] = {}
        self.around = copy_context()  # not the application's, whose work it may be to add events
        self._held: deque[_Held] = deque()
        self._held_chars = 0
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._ended = False
        self._begun = settings.refuse_with == "answer"

    def add(self, event: Event) -> None:
        """Hold an event and give its texts to the guard."""
        if self.blocked:
            return
        needs = []
        for piece in event.pieces:
            growing = self._channel(piece.channel)
            growing.add(piece.text)
            self._held_chars += len(piece.text)
            needs.append((growing, growing.chars))
        self._held.append(_Held(event, tuple(needs)))
        if event.ended or len(self._channels) > 1:
            self._check_left_behind({piece.channel for piece in event.pieces}, event.ended)
        if self.full:
            self.check()
        self._changed.set()

    def end(self) -> None:
        """The reply is complete: every channel gets its last verdict."""
        self._ended = True
        for growing in self._channels.values():
            growing.end()
        self._changed.set()

    def check(self) -> None:
        """Ask for verdicts on what the next event waits for."""
        if self._held:
            for growing, _ in self._held[0].needs:
                growing.check()

    def block(self) -> None:
        """Let nothing out any more."""
        self.blocked = True
        self._held.clear()
        self._changed.set()
        self._room.set()

    def take(self) -> list[Event]:
        """The events that may go now."""
        taken: list[Event] = []
        while self._held and not self.blocked and self._held[0].covered and self._may_begin():
            taken.append(self._held.popleft().event)
        self._held_chars -= sum(len(piece.text) for event in taken for piece in event.pieces)
        if self.full:
            self.check()
        else:
            self._room.set()
        return taken

    def _may_begin(self) -> bool:
        """A reply that may yet become an error begins with its first text that may go; one that
        says nothing, with its end."""
        if not self._begun:
            first = next((held for held in self._held if held.needs), None)
            self._begun = first.covered if first is not None else self._ended or self.full
        return self._begun

    async def room(self) -> None:
        """Until less is held than may be, or nothing counts any more."""
        while self.full and not self.blocked:
            self._room.clear()
            await self._room.wait()

    @property
    def over(self) -> bool:
        """Whether all of the reply has been given, and every verdict on it has come."""
        return self._ended and not self._held and all(g.final for g in self._channels.values())

    @property
    def full(self) -> bool:
        """Whether so much is held that the backend has to wait."""
        return self._held_chars >= self._settings.hold_chars or len(self._held) > _HELD_EVENTS

    async def changed(self) -> None:
        """Until something happened since the last call."""
        await self._changed.wait()
        self._changed.clear()

    async def close(self) -> None:
        """End the verdicts that are under way; nothing is given out any more."""
        self.block()
        tasks = [growing.task for growing in self._channels.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _channel(self, channel: Channel) -> _Growing:
        growing = self._channels.get(channel)
        if growing is None:
            if len(self._channels) >= self._settings.max_channels:
                self.block()
            prompt = self._prompt_of(channel.choice)
            growing = _Growing(self, self._guard, prompt, self._settings)
            self._channels[channel] = growing
        return growing

    def _check_left_behind(self, grown: set[Channel], ended: tuple[int, ...]) -> None:
        """A reply goes on in another channel, or has ended: what is left in others must not wait
        for more of it to come."""
        choices = {channel.choice for channel in grown}
        for channel, growing in self._channels.items():
            if channel.choice in ended or channel.choice in choices and channel not in grown:
                growing.leave()

    def heard(self, outcome: Outcome) -> None:
        """An outcome of one of the channels."""
        self.outcomes.append(outcome)
        if outcome.blocked:
            self.block()
        self._changed.set()


class _Growing:
    """One channel before the guard; it counts code points."""

    def __init__(
        self, screen: Screen, guard: Guard, prompt: Conversation, settings: Settings
    ) -> None:
        self.chars = 0
        self.final = False
        self._screen = screen
        self._cadence = Cadence(_stream(settings))
        self._hold_back = settings.hold_back_chars
        self._allowed = 0  # code points that verdicts allow
        self._left = 0  # and up to where the reply went on elsewhere: nothing is held back of these
        self._pending: list[str] = []
        self._given = 0  # code points that the guard has been given
        self._asked = 0  # code points up to which a verdict is wanted
        self._checked = 0  # and up to which the guard has been told so
        self._ending = False
        self._wake = asyncio.Event()
        self.task = asyncio.create_task(
            self._judge(guard, prompt), name="guard-channel", context=screen.around.copy()
        )

    def add(self, text: str) -> None:
        self.chars += len(text)
        self._pending.append(text)
        if self._cadence.grow(text):
            if self._asked == 0:
                self.check()
            else:  # the guard knows its cadence
                self._wake.set()

    @property
    def covered(self) -> int:
        """Code points that may go."""
        if self.final or self._screen.full:  # what is held back must not stop the backend for good
            return self._allowed
        return max(self._allowed - self._hold_back, min(self._allowed, self._left))

    def check(self) -> None:
        if self._asked < self.chars:
            self._asked = self.chars
            self._wake.set()

    def leave(self) -> None:
        self._left = self.chars
        self.check()

    def end(self) -> None:
        self._ending = True
        self._wake.set()

    async def _judge(self, guard: Guard, prompt: Conversation) -> None:
        try:
            async with aclosing(guard.growing(prompt, self._pieces())) as outcomes:
                async for one in outcomes:
                    self._hear(one.outcome, one.covered_chars, one.final)
                    if self.final or self._screen.blocked:
                        return
        except Exception as failure:
            log_failure(LOG, "a growing reply could not be judged", failure)
        self._screen.block()  # the guard ended without a last word

    def _hear(self, outcome: Outcome, covered: int, final: bool) -> None:
        """A verdict covers what the guard had been given, whatever else it says of itself."""
        self.final = final
        if not outcome.judged:  # where that is declared to pass, it does to the reply's end
            self._allowed, self.final = 0 if outcome.blocked else _ALL, True
        elif covered > self._given or final and not (self._ending and covered == self.chars):
            self._screen.block()
        elif not outcome.blocked:
            self._allowed = max(self._allowed, covered)
        self._screen.heard(outcome)

    async def _pieces(self) -> AsyncIterator[Piece]:
        while True:
            await self._wake.wait()
            self._wake.clear()
            text, ending = "".join(self._pending), self._ending
            self._pending.clear()
            self._cadence.judged()
            self._given += len(text)
            check = self._asked > self._checked and not ending  # the end is judged in any case
            if check:
                self._checked = self._given
            if text or check:
                yield Piece(text, check)
            if ending:
                return


def _stream(settings: Settings) -> Stream:
    """When the guard is to hear of a channel's text."""
    usual = Stream()
    return Stream(
        check_every_chars=settings.piece_chars or usual.check_every_chars,
        first_check_chars=settings.first_check_chars or usual.first_check_chars,
        sentence_ends=settings.sentence_pieces == "on",
    )
