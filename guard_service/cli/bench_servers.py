"""The servers of `guardctl bench middleware`, each in a process of its own, and what they use."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from guard_service.cli import exits
from guard_service.cli.apart import guard_apart
from guard_service.cli.bench_http import Connection
from guard_service.cli.bench_middleware_app import PLAIN

APPS = "guard_service.cli.bench_middleware_app"
START_S = 180.0
STOP_S = 10.0
BARE, GUARDED, STARTER = "bare", "middleware", "middleware, starter guard"
SIDECAR, SIDECAR_GRPC = "sidecar", "sidecar, guard over gRPC"


@dataclass(frozen=True, slots=True)
class Server:
    """One that answers on `port` of this machine. What it uses counts with what its upstream uses,
    so that all variants are compared by the same whole."""

    name: str
    port: int
    process: subprocess.Popen[bytes]
    upstream: Server | None = None

    @property
    def backend(self) -> Server:
        """Where the backend runs."""
        return self.upstream or self

    @property
    def rss_kib(self) -> int:
        """Resident memory."""
        return sum(_rss_kib(pid) for pid in self._pids)

    @property
    def sockets(self) -> int:
        """Open sockets."""
        return sum(_sockets(pid) for pid in self._pids)

    @property
    def cpu_s(self) -> float:
        """Processor time so far, of all threads."""
        return sum(_cpu_s(pid) for pid in self._pids)

    @property
    def _pids(self) -> list[int]:
        everyone = (self, self.upstream) if self.upstream else (self,)
        return [one.process.pid for one in everyone]


@contextmanager
def servers() -> Iterator[dict[str, Server]]:
    """Every variant by its name, ended on leaving. Ends guardctl where one does not start."""
    with ExitStack() as stack:
        bare = stack.enter_context(app(BARE, "bare"))
        fake_guard = stack.enter_context(guard_apart("fake", ()))
        everyone = [
            bare,
            stack.enter_context(app(GUARDED, "guarded")),
            stack.enter_context(app(STARTER, "guarded_by_starter")),
            stack.enter_context(sidecar(SIDECAR, bare)),
            stack.enter_context(sidecar(SIDECAR_GRPC, bare, fake_guard)),
        ]
        yield {one.name: one for one in everyone}


@contextmanager
def sidecar(name: str, upstream: Server, guard: str = "") -> Iterator[Server]:
    """A sidecar in front of the server; without the address of a guard, one that allows at once."""
    listen, admin = _free_ports(2)
    places = (f"http://127.0.0.1:{upstream.port}", f"127.0.0.1:{listen}", f"127.0.0.1:{admin}")
    flags = ("--upstream", places[0], "--listen", places[1], "--admin", places[2])
    asked = ("--guard", guard, "--guarded", "/v1", "--drain-s", "60", "--log-level", "error")
    command = ("guard_middleware", *flags, *asked) if guard else (APPS, *places)
    with _running(name, command, listen) as process:
        yield Server(name, listen, process, upstream)


@contextmanager
def app(name: str, factory: str) -> Iterator[Server]:
    """An application of `bench_middleware_app`, as uvicorn serves it here."""
    (port,) = _free_ports(1)
    quiet = ("--log-level", "error", "--no-access-log", "--port", str(port))
    with _running(name, ("uvicorn", f"{APPS}:{factory}", "--factory", *quiet), port) as process:
        yield Server(name, port, process)


@contextmanager
def _running(name: str, command: tuple[str, ...], port: int) -> Iterator[subprocess.Popen[bytes]]:
    paths = os.pathsep.join(path for path in sys.path if path)
    process = subprocess.Popen(
        [sys.executable, "-m", *command], env={**os.environ, "PYTHONPATH": paths}
    )
    try:
        if not asyncio.run(_answers(process, port)):
            exits.fail(f"{name} did not start; pip install 'llama-guard-service[sidecar]'")
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


async def _answers(process: subprocess.Popen[bytes], port: int) -> bool:
    end = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < end:
        try:
            connection = await Connection.open(port)
            await connection.ask(PLAIN)
            connection.close()
            return True
        except (OSError, EOFError):
            await asyncio.sleep(0.05)
    return False


def _free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        bound = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
        return [one.getsockname()[1] for one in bound]


def _rss_kib(pid: int) -> int:
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


def _sockets(pid: int) -> int:
    links = [_link(path) for path in Path(f"/proc/{pid}/fd").iterdir()]
    return sum(link.startswith("socket:") for link in links)


def _link(path: Path) -> str:
    try:
        return os.readlink(path)
    except FileNotFoundError:
        return ""


def _cpu_s(pid: int) -> float:
    threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9
