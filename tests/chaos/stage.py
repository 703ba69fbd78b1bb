"""The processes of a run and where they are: guards, an upstream, a sidecar, an application."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.chats import Door
from tests.chaos.journal import Journals
from tests.chaos.keys import Keys
from tests.chaos.processes import Process, free_ports
from tests.chaos.truth import SHIELD, Policies
from tests.chaos.upstream import ARRIVED

GUARD_TIMEOUT_S = 4.0  # of sidecar and application, for one verdict
STARTER, FIRST, SECOND, UPSTREAM = "starter", "guard-1", "guard-2", "upstream"
SIDECAR, APP = "sidecar", "app"
RELOAD_S = 1.0
_CACHED = "500"  # verdicts: so few that the cache is full once a run has warmed up
_SETTLE_S = 60.0
_OPEN = re.compile(r"^(?:guard_in_flight|guard_middleware_in_progress)(?:\{.*\})? (\S+)$", re.M)


@dataclass
class Stage:
    """All of them. Guards have the starter model, or the fake engine that sees images."""

    folder: Path
    policies: Policies
    processes: dict[str, Process]
    targets: dict[str, str]  # of guards, for gRPC
    doors: tuple[Door, ...]
    keys: Keys  # of the starter guard
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
        texts = await asyncio.gather(*(asked(port, "/metrics") for port in self.admin.values()))
        return sum(float(found) for text in texts for found in _OPEN.findall(text))

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


def built(folder: Path, policies: Policies) -> Stage:
    """A stage whose processes have not been started; files go into the folder."""
    ports, keys = iter(free_ports(10)), Keys(folder)
    targets: dict[str, str] = {}
    admin: dict[str, int] = {}
    processes: dict[str, Process] = {}
    for name, model in ((STARTER, "starter"), (FIRST, "fake-vision"), (SECOND, "fake-vision")):
        port, http = next(ports), next(ports)
        flags = {
            "model": model,
            "port": port,
            "metrics-port": http,
            "policies": policies.folder,
            "default-policy": SHIELD,
            "threads": 1,
            "cache-entries": _CACHED,
            "session-bytes": 16 * 2**20,
            "kernel-plan": "stored",
            "reload-s": RELOAD_S,
        }
        if name == STARTER:
            flags |= {"tls-cert": keys.cert, "tls-key": keys.key}
        arguments = [str(folder / f"{name}.judged"), *_flags(flags)]
        targets[name], admin[name] = f"127.0.0.1:{port}", http
        processes[name] = Process(
            name, "tests.chaos.guard", arguments, folder, ready_at(http, "/readyz")
        )
    upstream, listen, beside, app = (next(ports) for _ in range(4))
    processes[UPSTREAM] = Process(
        UPSTREAM,
        "uvicorn",
        _uvicorn("alone", upstream),
        folder,
        ready_at(upstream, "/health"),
        {ARRIVED: str(folder / f"{UPSTREAM}.arrived")},
    )
    flags = {
        "upstream": f"http://127.0.0.1:{upstream}",
        "listen": f"127.0.0.1:{listen}",
        "admin": f"127.0.0.1:{beside}",
        "guard": targets[FIRST],
    }
    processes[SIDECAR] = Process(
        SIDECAR,
        "guard_middleware",
        _flags({**flags, **_screens()}),
        folder,
        ready_at(beside, "/readyz"),
    )
    environment = {f"GUARDED_{k.replace('-', '_').upper()}": v for k, v in _screens().items()}
    processes[APP] = Process(
        APP,
        "uvicorn",
        _uvicorn("guarded", app),
        folder,
        ready_at(app, "/health"),
        {
            **environment,
            "GUARDED_GUARD": targets[SECOND],
            ARRIVED: str(folder / f"{APP}.arrived"),
        },
    )
    doors = (Door(SIDECAR, listen, (FIRST, UPSTREAM)), Door(APP, app, (SECOND,)))
    admin |= {SIDECAR: beside, APP: app}
    return Stage(folder, policies, processes, targets, doors, keys, admin)


def _screens() -> dict[str, str]:
    return {"policy": SHIELD, "guard-timeout-s": str(GUARD_TIMEOUT_S), "guard-open-s": "0.5"}


def _flags(values: dict[str, object] | dict[str, str]) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def _uvicorn(factory: str, port: int) -> list[str]:
    quiet = ["--log-level", "warning", "--no-access-log", "--lifespan", "on"]
    return [f"tests.chaos.upstream:{factory}", "--factory", "--port", str(port), *quiet]


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
