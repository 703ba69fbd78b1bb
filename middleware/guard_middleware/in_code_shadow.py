"""Shadow mode in process: backends are called as if nobody watched, and what was said is judged
behind their callers' backs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, ClassVar, Self

from guard_middleware.formats.contract import Piece
from guard_middleware.in_code_calls import Call, Judges
from guard_middleware.in_code_shapes import Given, Shape
from guard_middleware.loop_thread import LOOP
from guard_middleware.shadow import MOST_COPIES, SKIPPED

LOG = logging.getLogger(__name__)


class ShadowCall:
    """Has a Call's methods and lets everything pass; what a Call would have done is reported when
    the backend has said all. Copies are dropped, and counted as skipped, where the guard is too
    slow for all of them."""

    _copies: ClassVar[int] = 0  # under way; counted in the guard's loop

    def __init__(self, judges: Judges, shape: Shape, read: Callable[[], Given]) -> None:
        self.blocked = self.ahead = False
        self._call: Call | None = None
        self._pieces: list[Piece] = []
        self._wrong: Exception | None = None
        self._complete = False
        try:
            self._call = Call(judges, shape, read())
        except (TypeError, ValueError) as wrong:
            LOG.warning("a call cannot be read: %s", wrong)
            judges.metrics.exchanges.labels(shape.name, "invalid", "shadow").inc()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._call is not None:
            LOOP.submit(self._judge(self._call))

    @property
    def streams(self) -> bool:
        """Whether a stream was asked for; what cannot be read passes whole."""
        return self._call is not None and self._call.streams

    async def admitted(self) -> bool:
        """Always."""
        return True

    async def allows(self, reply: Any) -> bool:
        """Always."""
        self._note(lambda call: call.pieces(reply))
        self._complete = True
        return True

    def grow(self, chunk: Any) -> Sequence[Any]:
        """The chunk."""
        self._note(lambda call: call.event(chunk).pieces)
        return [chunk]

    async def room(self) -> None:
        """Always."""

    async def rest(self) -> Sequence[Any]:
        """Nothing was held back."""
        self._complete = True
        return []

    def refuse(self) -> Any:
        """Never called: nothing is refused."""
        raise NotImplementedError

    last_words = refuse

    def _note(self, read: Callable[[Call], Sequence[Piece]]) -> None:
        if self._call is not None and self._wrong is None:
            try:
                self._pieces += read(self._call)
            except (TypeError, ValueError) as wrong:
                self._wrong = wrong

    async def _judge(self, call: Call) -> None:
        with call:
            if ShadowCall._copies >= MOST_COPIES:
                call.result = SKIPPED
                return
            ShadowCall._copies += 1
            try:
                if not await call.admitted():
                    return
                if self._wrong is not None:
                    call.unreadable(self._wrong)
                elif self._complete:
                    await call.allows_pieces(self._pieces)
            except ValueError as wrong:
                LOG.warning("a call cannot be read: %s", wrong)
            finally:
                ShadowCall._copies -= 1
