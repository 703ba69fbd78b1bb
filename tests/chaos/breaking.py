"""What goes wrong on purpose: one thing after another, each undone before the next."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from tests.chaos.ledger import Faults
from tests.chaos.stage import FIRST, GUARD_TIMEOUT_S, SECOND, STARTER, UPSTREAM, Stage

Fault = Callable[[], Awaitable[None]]


class Breaking:
    """Breaks what stands on a stage, in an order that the seed decides."""

    def __init__(
        self, stage: Stage, faults: Faults, draw: random.Random, say: Callable[[str], None]
    ) -> None:
        self._stage = stage
        self._faults = faults
        self._draw = draw
        self._say = say

    @property
    def all(self) -> dict[str, Fault]:
        """Every fault by its name."""
        return {
            "guard killed": lambda: self._kill(FIRST),
            "upstream killed": lambda: self._kill(UPSTREAM),
            "guard hangs": lambda: self._hang((FIRST, SECOND, STARTER), (1.0, GUARD_TIMEOUT_S)),
            "guard hangs for long": lambda: self._hang(
                (FIRST, SECOND), (GUARD_TIMEOUT_S, 2 * GUARD_TIMEOUT_S)
            ),
        }

    async def go_on(self, names: Sequence[str] = ()) -> AsyncIterator[str]:
        """All of them again and again in ever new orders; nothing is broken where it yields, which
        is behind each. With `names` these alone, once, in this order."""
        faults = self.all
        while True:
            for name in names or self._draw.sample(list(faults), len(faults)):
                self._say(name)
                await faults[name]()
                self._faults.counts[name] += 1
                await asyncio.sleep(self._draw.uniform(0.5, 2.0))
                yield name
            if names:
                return

    async def _kill(self, name: str) -> None:
        process = self._stage.processes[name]
        self._faults.begin(name)
        await process.killed()
        await asyncio.sleep(self._draw.uniform(0.0, 2.0))
        await process.start()
        self._faults.end(name)

    async def _hang(self, names: Sequence[str], seconds: tuple[float, float]) -> None:
        name = self._draw.choice(names)
        process = self._stage.processes[name]
        self._faults.begin(name)
        process.signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(self._draw.uniform(*seconds))
        finally:
            process.signal(signal.SIGCONT)
            self._faults.end(name)
