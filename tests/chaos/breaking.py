"""What goes wrong on purpose: one thing after another, each undone before the next."""

from __future__ import annotations

import asyncio
import random
import re
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress

from tests.chaos.journal import now
from tests.chaos.ledger import Faults, Ledger
from tests.chaos.stage import (
    FIRST,
    GUARD_TIMEOUT_S,
    GUARDS,
    RELOAD_S,
    SECOND,
    STARTER,
    UPSTREAM,
    Stage,
)

PATIENCE_S, _LOOK_S = 60.0, 0.1
_FAILED, _MODEL_FAILED = "guard_policy_reload_failed 1.0", "guard_model_reload_failed 1.0"
Fault = Callable[[], Awaitable[None]]


class Breaking:
    """Breaks what stands on a stage, in an order that the seed decides."""

    def __init__(
        self,
        stage: Stage,
        faults: Faults,
        ledger: Ledger,
        draw: random.Random,
        say: Callable[[str], None],
    ) -> None:
        self._stage = stage
        self._faults = faults
        self._ledger = ledger
        self._draw = draw
        self._say = say

    @property
    def all(self) -> dict[str, Fault]:
        """Every fault by its name."""
        faults: dict[str, Fault] = {
            "guard killed": lambda: self._kill(FIRST),
            "upstream killed": lambda: self._kill(UPSTREAM),
            "guard hangs": lambda: self._hang((FIRST, SECOND, STARTER), (1.0, GUARD_TIMEOUT_S)),
            "guard hangs for long": lambda: self._hang(
                (FIRST, SECOND), (GUARD_TIMEOUT_S, 2 * GUARD_TIMEOUT_S)
            ),
            "policies renewed": self._renew_policies,
            "policies spoiled": self._spoil_policies,
            "model renewed": self._renew_model,
            "model spoiled": self._spoil_model,
            "certificate renewed": self._renew_keys,
            "certificate spoiled": self._spoil_keys,
        }
        if self._stage.files.disks.can_fill:
            faults["disk of an audit log full"] = self._fill_disk
        return faults

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

    async def _renew_keys(self) -> None:
        """Explains nothing: no caller may notice."""
        self._stage.files.keys.renew()
        port = int(self._stage.targets[STARTER].rpartition(":")[2])
        await self._until(
            lambda: self._stage.files.keys.shown(port), "the new certificate is in use"
        )

    async def _spoil_keys(self) -> None:
        """The last good one stays, then comes another."""
        self._stage.files.keys.spoil()
        await asyncio.sleep(2 * RELOAD_S)
        await self._renew_keys()

    async def _renew_policies(self) -> None:
        """New versions, on all guards; one is told by SIGHUP too. Explains nothing."""
        self._stage.files.policies.renew()
        self._stage.processes[SECOND].signal(signal.SIGHUP)
        await self._until(self._policies_are_in_use, "the new policies are in use")

    async def _spoil_policies(self) -> None:
        """The last good ones stay, then come others."""
        self._stage.files.policies.spoil()
        await self._until(self._policies_are_refused, "guards tell of policies that are none")
        await self._renew_policies()

    async def _policies_are_in_use(self) -> bool:
        version = f'version="{self._stage.files.policies.version}"'
        texts = await self._stage.metrics(GUARDS)
        return all(version in text and _FAILED not in text for text in texts)

    async def _policies_are_refused(self) -> bool:
        return all(_FAILED in text for text in await self._stage.metrics(GUARDS))

    async def _renew_model(self) -> None:
        """Another model beside the old one, then in its place. Explains nothing."""
        self._stage.files.models.renew()
        await self._until(self._model_is_in_use, "the new model judges")

    async def _spoil_model(self) -> None:
        """The last good one stays, then comes another."""
        self._stage.files.models.spoil()
        await self._until(self._model_is_refused, "the guard tells of a model that is none")
        await self._renew_model()

    async def _model_is_in_use(self) -> bool:
        (text,) = await self._stage.metrics((STARTER,))
        return self._stage.files.models.digest in text and _MODEL_FAILED not in text

    async def _model_is_refused(self) -> bool:
        (text,) = await self._stage.metrics((STARTER,))
        return _MODEL_FAILED in text and self._stage.files.models.digest in text

    async def _fill_disk(self) -> None:
        """The guard refuses what it cannot record, and goes on once it can."""
        disks = self._stage.files.disks
        self._faults.begin(SECOND)
        disks.fill()
        try:
            await self._until(lambda: self._records("failed"), "a verdict cannot be recorded")
        finally:
            disks.free()
        await self._until(lambda: self._records("written"), "verdicts are recorded again")
        self._faults.end(SECOND)

    async def _records(self, result: str) -> bool:
        """Whether lines of the audit log end so while we look."""
        counted = []
        for _ in range(2):
            (text,) = await self._stage.metrics((SECOND,))
            found = re.search(rf'guard_audit_lines_total{{result="{result}"}} (\S+)', text)
            counted.append(float(found[1]) if found else 0.0)
            await asyncio.sleep(_LOOK_S)
        return counted[1] > counted[0]

    async def _until(self, holds: Callable[[], Awaitable[bool]], what: str) -> None:
        """Wait for it; where it does not come about it counts as wrong."""
        ends = now() + PATIENCE_S
        while now() < ends:
            with suppress(OSError, TimeoutError):
                if await holds():
                    return
            await asyncio.sleep(_LOOK_S)
        self._ledger.wrong("wrong", f"not within {PATIENCE_S:g} s: {what}")

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
