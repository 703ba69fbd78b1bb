"""One run: start everything, ask under a load that is bounded, break things, count."""

from __future__ import annotations

import asyncio
import itertools
import random
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import aiohttp

from tests.chaos import report
from tests.chaos.breaking import Breaking
from tests.chaos.calls import Caller, Guard
from tests.chaos.chats import Client
from tests.chaos.files import Files
from tests.chaos.journal import Journals
from tests.chaos.ledger import Faults, Ledger
from tests.chaos.stage import SECOND, SIDECAR, STARTER, Stage, built
from tests.chaos.truth import Known, Policies, starter_knows

# In which callers find out that something is back: gRPC waits between its attempts to connect, and
# leaves a guard that hung out for ten seconds.
_GRACE_S = 12.0
_TELL_S = 10.0
_WARM_SHARE = 0.25  # of the time, after which a process holds what it needs
_THINK_S = 0.05  # between two calls of one caller, on average
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Plan:
    """How long, with what, and what is broken; with `names` these faults alone, once each, and
    the load ends when they are over and the time is too."""

    seconds: float
    seed: int
    callers: int = 4  # of guards
    clients: int = 6  # of sidecar and application
    names: Sequence[str] = ()


@dataclass
class _Load:
    """What the load and those who steer it share."""

    plan: Plan
    stage: Stage
    faults: Faults
    ledger: Ledger = field(default_factory=Ledger)
    began: float = 0.0
    late: asyncio.Event = field(default_factory=asyncio.Event)  # nothing more is broken
    over: asyncio.Event = field(default_factory=asyncio.Event)
    goes: asyncio.Event = field(default_factory=asyncio.Event)  # callers wait while it is not set

    async def asks(
        self, call: Callable[[T], Awaitable[None]], targets: Sequence[T], draw: random.Random
    ) -> None:
        """One caller: call after call until all is over."""
        while not self.over.is_set():
            await self.goes.wait()
            await call(draw.choice(targets))
            await asyncio.sleep(draw.random() * 2 * _THINK_S)

    async def breaks(self) -> None:
        """Break things, and sample what processes hold once they are warm."""
        breaking = Breaking(
            self.stage, self.faults, self.ledger, random.Random(self.plan.seed), say
        )
        warm = False
        async for _ in breaking.go_on(self.plan.names):
            if self.late.is_set():
                return
            if not warm and time.monotonic() - self.began >= self.plan.seconds * _WARM_SHARE:
                warm = True
                self.goes.clear()
                await self.sample(report.WARM)
                self.goes.set()

    async def sample(self, moment: str) -> None:
        """What all processes hold while nobody calls."""
        if left := await self.stage.quiet():
            self.ledger.wrong("lost", f"{left:g} calls are under way that nobody waits for")
        for process in self.stage.processes.values():
            await process.sample(moment)

    async def tells(self) -> None:
        """A line of progress now and then."""
        while True:
            await asyncio.sleep(_TELL_S)
            ledger = self.ledger
            wrongs = ", ".join(f"{name} {count}" for name, count in ledger.wrongs.items())
            done = f"{time.monotonic() - self.began:.0f} of {self.plan.seconds:.0f} s"
            say(f"{done}, {ledger.requests} requests, {wrongs or 'nothing wrong'}")


def run(
    plan: Plan, folder: Path, prepare: Callable[[Stage], None] = lambda stage: None
) -> report.Run:
    """From the first process to the last count. SIGINT and SIGTERM end the load alone.

    Files go into the folder. `prepare` may change the stage before it starts. Raises DidNotStart or
    ValueError when it cannot begin.
    """
    return asyncio.run(_run(plan, folder, prepare))


def say(words: str) -> None:
    """Progress."""
    print(f"chaos: {words}", file=sys.stderr, flush=True)


async def _run(plan: Plan, folder: Path, prepare: Callable[[Stage], None]) -> report.Run:
    policies = Policies(folder / "policies")
    policies.renew()
    say("asking the starter guard what it is sure of")
    knows = await asyncio.to_thread(starter_knows, policies.folder)
    files = Files.below(folder, policies)
    if not files.disks.mount(SECOND):
        say("no disk is filled: mounting a small one needs root")
    stage = built(folder, files)
    prepare(stage)
    load = _Load(plan, stage, Faults(_GRACE_S))
    say("starting the processes")
    try:
        await stage.start()
        for process in stage.processes.values():
            await process.sample(report.START)
        guards = [_guard(name, stage, knows) for name in stage.targets]
        load.began = time.monotonic()
        ended = await _loaded(load, guards)
        seconds = time.monotonic() - load.began
        say("counting")
        await load.sample(report.END)
        for guard in guards:
            await guard.channel.close()
        codes = await stage.end()
        _settle(load, codes)
    finally:
        await stage.end()
        files.disks.close()
    return report.Run(
        plan.seed, seconds, ended, load.ledger, load.faults, list(stage.processes.values())
    )


def _guard(name: str, stage: Stage, knows: Sequence[Known]) -> Guard:
    target, files = stage.targets[name], stage.files
    if name != STARTER:
        return Guard.at(name, target)
    return Guard.at(name, target, knows, files.keys.root, files.models.digests.values())


async def _loaded(load: _Load, guards: Sequence[Guard]) -> str:
    """Ask and break for as long as planned; how it ended."""
    stopped, loop, plan = asyncio.Event(), asyncio.get_running_loop(), load.plan
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    load.goes.set()
    cases = itertools.count(1).__next__
    session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
    async with session as http, asyncio.TaskGroup() as group:
        for at in range(plan.callers):
            draw = random.Random(f"{plan.seed} caller {at}")
            caller = Caller(load.ledger, load.faults, load.stage.files.policies, draw, cases)
            group.create_task(load.asks(caller.call, guards, draw))
        for at in range(plan.clients):
            draw = random.Random(f"{plan.seed} client {at}")
            client = Client(load.ledger, load.faults, draw, http, cases)
            group.create_task(load.asks(client.chat, load.stage.doors, draw))
        breaking = group.create_task(load.breaks())
        telling = group.create_task(load.tells())
        with suppress(TimeoutError):
            async with asyncio.timeout(plan.seconds):
                await stopped.wait()
        if plan.names and not stopped.is_set():
            await asyncio.wait((breaking,))
        load.late.set()
        await breaking  # what it has broken it makes whole, while callers look on
        load.over.set()
        telling.cancel()
    return "interrupted" if stopped.is_set() else "to its planned end"


def _settle(load: _Load, codes: dict[str, int]) -> None:
    """What can be told only when all is over."""
    ledger, stage = load.ledger, load.stage
    versions = stage.files.policies.digests.items()
    ledger.settle(stage.journals(), [(*version, digest) for version, digest in versions])
    for name in stage.targets:
        _hold_to_record(ledger, stage, name)
    for process in stage.processes.values():
        if words := report.grown(process):
            ledger.wrong("grown", words)
        if process.name in (*stage.targets, SIDECAR) and (count := process.tracebacks()):
            ledger.wrong("tracebacks", f"{count} in the log of {process.name}")
    for name in (*stage.targets, SIDECAR):
        if codes[name]:
            ledger.wrong("wrong", f"{name} ended with exit code {codes[name]} when it was told to")


def _hold_to_record(ledger: Ledger, stage: Stage, guard: str) -> None:
    """Every verdict that a guard gave is in its audit log, which is whole."""
    try:
        recorded = stage.files.disks.recorded(guard)
    except (OSError, ValueError) as broken:
        ledger.wrong("unrecorded", f"the audit log of {guard}: {broken}")
        return
    given = Journals.read([stage.folder / f"{guard}.judged"], []).judged
    for one in given:
        if one.verdict_id not in recorded:
            ledger.wrong("unrecorded", f"a verdict of {guard} that its audit log does not have")
