"""Real processes: started, killed, stopped, brought back, and what each of them holds."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

PATIENCE_S = 180.0  # for a start; no measure of speed
MIB = 2**20


class DidNotStart(RuntimeError):
    """A process that was to serve does not."""


@dataclass(frozen=True, slots=True)
class Held:
    """What a process holds at one moment; `tasks` are those of asyncio, -1 where untold."""

    rss_mib: float
    files: int
    threads: int
    tasks: int


@dataclass
class Process:
    """One server. `ready` tells whether it serves; it may be asked at any time."""

    name: str
    module: str
    arguments: Sequence[str]
    folder: Path
    ready: Callable[[], Awaitable[bool]]
    environment: dict[str, str] = field(default_factory=dict)
    starts: int = 0
    samples: dict[str, Held] = field(default_factory=dict)
    _popen: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        """Its standard output and error, of all its lives."""
        return self.folder / f"{self.name}.log"

    @property
    def pid(self) -> int:
        """Of the present or the last life."""
        assert self._popen is not None
        return self._popen.pid

    async def start(self) -> None:
        """Until it serves. Raises DidNotStart."""
        paths = os.pathsep.join(path for path in sys.path if path)
        command = [sys.executable, "-m", "tests.chaos.watched", str(self._told), self.module]
        with self.log.open("ab") as log:
            self._popen = subprocess.Popen(
                [*command, *self.arguments],
                env={**os.environ, **self.environment, "PYTHONPATH": paths},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a Ctrl-C is ours alone
            )
        self.starts += 1
        async with asyncio.timeout(PATIENCE_S):
            while not await self.ready():
                if self._popen.poll() is not None:
                    raise DidNotStart(f"{self.name} ended as it started: {self.last_words()}")
                await asyncio.sleep(0.05)

    def signal(self, number: int) -> None:
        """SIGKILL, SIGSTOP, SIGCONT, SIGHUP, ..."""
        os.kill(self.pid, number)

    async def killed(self) -> None:
        """SIGKILL, and until it is gone."""
        assert self._popen is not None
        self._popen.kill()
        await asyncio.to_thread(self._popen.wait)

    async def ended(self, patience_s: float = 30.0) -> int:
        """SIGTERM, and its exit code; SIGKILL after a while. 0 for one that was never started."""
        if self._popen is None:
            return 0
        if self._popen.poll() is None:
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGTERM)
        try:
            return await asyncio.to_thread(self._popen.wait, patience_s)
        except subprocess.TimeoutExpired:
            await self.killed()
            return -signal.SIGKILL

    async def held(self) -> Held:
        """What it holds now; asks it for its tasks."""
        self._told.unlink(missing_ok=True)
        self.signal(signal.SIGUSR1)
        tasks = -1
        for _ in range(100):
            if self._told.exists():
                tasks = int(self._told.read_text())
                break
            await asyncio.sleep(0.05)
        place = Path(f"/proc/{self.pid}")
        pages = int((place / "statm").read_text().split()[1])
        return Held(
            rss_mib=pages * os.sysconf("SC_PAGE_SIZE") / MIB,
            files=len(list((place / "fd").iterdir())),
            threads=len(list((place / "task").iterdir())),
            tasks=tasks,
        )

    async def sample(self, moment: str) -> None:
        """Keep what it holds now under the name of a moment."""
        self.samples[moment] = await self.held()

    def tracebacks(self) -> int:
        """How many its log holds."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return text.count("Traceback (most recent call last)") + text.count('"exception":')

    def last_words(self) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-2000:] if self.log.exists() else ""

    @property
    def _told(self) -> Path:
        return self.folder / f"{self.name}.tasks"


def free_ports(number: int) -> list[int]:
    """That nobody listens on now."""
    with ExitStack() as stack:
        bound = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
        return [one.getsockname()[1] for one in bound]
