"""The processes of a run and where they are: guards, an upstream, a sidecar, an application."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.chats import Door
from tests.chaos.files import Files
from tests.chaos.journal import Journals
from tests.chaos.processes import Process, free_ports
from tests.chaos.truth import SHIELD
from tests.chaos.upstream import ARRIVED

GUARD_TIMEOUT_S = 4.0  # of sidecar and application, for one verdict
STARTER, FIRST, SECOND, UPSTREAM = "starter", "guard-1", "guard-2", "upstream"
SIDECAR, APP = "sidecar", "app"
RELOAD_S = 1.0
GUARDS = (STARTER, FIRST, SECOND)
_SCREENS = {
    "policy": SHIELD,
    "guard-timeout-s": str(GUARD_TIMEOUT_S),
    "guard-try-s": "1.5",
    "guard-open-s": "0.5",
}
# So that what grows is a leak, not what the threads of models that left keep in heaps of their own.
_ONE_HEAP = {"MALLOC_ARENA_MAX": "1"}
_CACHED = "500"  # verdicts: so few that the cache is full once a run has warmed up
_SETTLE_S = 60.0
_OPEN = re.compile(r"^(?:guard_in_flight|guard_middleware_in_progress)(?:\{.*\})? (\S+)$", re.M)


@dataclass
class Stage:
    """All of them. Guards have the starter model, or the fake engine that sees images."""

    folder: Path
    files: Files
    processes: dict[str, Process]
    targets: dict[str, str]  # of guards, for gRPC
    doors: tuple[Door, ...]
    admin: dict[str, int]  # ports that tell metrics

    async def start(self) -> None:
        """All, until they serve. Raises DidNotStart."""
        guards = [self.processes[name] for name in self.targets]
        await asyncio.gather(*(one.start() for one in (*guards, self.processes[UPSTREAM])))
        await asyncio.gather(*(self.processes[name].start() for name in (SIDECAR, APP)))

    async def end(self) -> dict[str, int]:
        """All, those first that others rest on last; exit codes by name."""
        order = sorted(self.processes.values(), key=lambda one: one.name in self.targets)
        return {one.name: await one.ended() for one in order if one.starts}

    async def open_calls(self) -> float:
        """How many are under way, by the processes' own metrics."""
        texts = await self.metrics(self.admin)
        return sum(float(found) for text in texts for found in _OPEN.findall(text))

    async def metrics(self, names: Iterable[str]) -> list[str]:
        """What processes tell. Raises OSError or TimeoutError for one that is away or hangs."""
        ports = [self.admin[name] for name in names]
        return await asyncio.gather(*(asked(port, "/metrics") for port in ports))

    async def quiet(self) -> float:
        """Wait until no call is under way, for a while; how many still are."""
        for _ in range(int(_SETTLE_S / 0.2)):
            if not (left := await self.open_calls()):
                break
            await asyncio.sleep(0.2)
        return left

    def journals(self) -> Journals:
        """What was told so far."""
        judged = [self.folder / f"{name}.judged" for name in self.targets]
        return Journals.read(judged, [self.folder / f"{name}.arrived" for name in (UPSTREAM, APP)])


def built(folder: Path, files: Files) -> Stage:
    """A stage whose processes have not been started; files go into the folder."""
    ports = dict(zip((STARTER, FIRST, SECOND, UPSTREAM, SIDECAR, APP), free_ports(6), strict=True))
    admin = dict(zip((STARTER, FIRST, SECOND, SIDECAR), free_ports(4), strict=True))
    admin[APP] = ports[APP]
    targets = {name: f"127.0.0.1:{ports[name]}" for name in GUARDS}
    both = (FIRST, SECOND)
    balanced = ",".join(targets[name] for name in both)
    screens = {**_SCREENS, "guard": f"ipv4:{balanced}"}
    made = [_guard(name, folder, ports[name], admin[name], files) for name in GUARDS]
    made.append(_served(UPSTREAM, "alone", folder, ports[UPSTREAM], {}))
    flags = {
        "upstream": f"http://127.0.0.1:{ports[UPSTREAM]}",
        "listen": f"127.0.0.1:{ports[SIDECAR]}",
        "admin": f"127.0.0.1:{admin[SIDECAR]}",
        **screens,
    }
    ready = ready_at(admin[SIDECAR], "/readyz")
    made.append(Process(SIDECAR, "guard_middleware", _flags(flags), folder, ready))
    environment = {f"GUARDED_{k.replace('-', '_').upper()}": v for k, v in screens.items()}
    made.append(_served(APP, "guarded", folder, ports[APP], environment))
    doors = (
        Door(SIDECAR, ports[SIDECAR], (FIRST, SECOND, UPSTREAM), (UPSTREAM,), both),
        Door(APP, ports[APP], both, guards=both),
    )
    processes = {one.name: one for one in made}
    return Stage(folder, files, processes, targets, doors, admin)


def _guard(name: str, folder: Path, port: int, admin: int, files: Files) -> Process:
    flags = {
        **files.flags(name, name == STARTER),
        "port": port,
        "metrics-port": admin,
        "threads": 1,
        "max-message-bytes": 4 * 2**20,  # what callers send too much of; see calls.py
        "cache-entries": _CACHED,
        "session-bytes": 16 * 2**20,
        "kernel-plan": "stored",
        "reload-s": RELOAD_S,
    }
    arguments = [str(folder / f"{name}.judged"), *_flags(flags)]
    ready = ready_at(admin, "/readyz")
    return Process(name, "tests.chaos.guard", arguments, folder, ready, _ONE_HEAP)


def _served(
    name: str, factory: str, folder: Path, port: int, environment: Mapping[str, str]
) -> Process:
    """An application of tests.chaos.upstream."""
    quiet = ["--log-level", "warning", "--no-access-log", "--lifespan", "on"]
    arguments = [f"tests.chaos.upstream:{factory}", "--factory", "--port", str(port), *quiet]
    told = {**environment, ARRIVED: str(folder / f"{name}.arrived")}
    return Process(name, "uvicorn", arguments, folder, ready_at(port, "/health"), told)


def _flags(values: Mapping[str, object]) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def ready_at(port: int, path: str) -> Callable[[], Awaitable[bool]]:
    async def ready() -> bool:
        with suppress(OSError, TimeoutError, EOFError):
            return bool(await asked(port, path))
        return False

    return ready


async def asked(port: int, path: str) -> str:
    """GET from this machine: the body of a 200; else nothing. Raises OSError, TimeoutError."""
    async with asyncio.timeout(5.0):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(f"GET {path} HTTP/1.0\r\nhost: chaos\r\n\r\n".encode())
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            return body.decode() if b" 200 " in head.partition(b"\r\n")[0] else ""
        finally:
            writer.close()
