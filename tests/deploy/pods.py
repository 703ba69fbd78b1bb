"""Pods without a cluster: processes in network namespaces, confined as their manifests say."""

from __future__ import annotations

import ctypes
import http.client
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pytest

USER = "65532"
PATIENCE_S = 120.0
# A volume as kubelet makes an emptyDir, and the folder `cache` of it mounted by itself (subPath).
VOLUME, CACHE = "/mnt/volume", "/mnt/cache"
_NEW_NETWORK = 0x40000000  # CLONE_NEWNET, in <sched.h>
T = TypeVar("T")

# As a container's: nothing can be written but volumes. The interpreter may live in a home that
# others cannot enter; a home is shown with it alone. Where this tree lies, it stays.
# $FIRST is what an init container runs.
_CONFINED = """
confined="setpriv --reuid {user} --regid {user} --clear-groups --bounding-set=-all --no-new-privs"
mount -t tmpfs -o mode=0755,size=512m mnt /mnt
mkdir /mnt/python /mnt/tree {volume} {cache}
chmod 0777 {volume}
mount --bind {python} /mnt/python
mount --bind {tree} /mnt/tree
case {python} in
  {home}/*) mount -t tmpfs -o mode=0755 home {home}; mkdir -p {python} ;;
esac
mount --bind /mnt/python {python}
umount /mnt/python
mount -t tmpfs -o mode=0777,size=64m tmp /tmp
mkdir -p {tree}
mount --bind /mnt/tree {tree}
umount /mnt/tree
mount -o remount,bind,ro /
if [ -n "$FIRST" ]; then
  $confined $FIRST
  mount --bind {volume}/cache {cache}
fi
exec $confined "$@"
"""


def needs_namespaces() -> None:
    """Skip where pods cannot be imitated."""
    if os.geteuid() != 0:
        pytest.skip("needs root, for network and mount namespaces")
    for tool in ("ip", "unshare", "setpriv"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")
    if subprocess.run(["unshare", "-n", "-m", "true"], capture_output=True).returncode:
        pytest.skip("namespaces are not allowed here")


@dataclass
class Network:
    """A network namespace with one address; whoever is in it reaches those of the other one."""

    name: str
    address: str
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def run(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        *,
        first: Sequence[str] = (),
        confined: bool = True,
    ) -> subprocess.Popen[bytes]:
        """Start a container's process, behind what an init container of its pod runs `first`."""
        python = Path(sys.base_prefix)
        setup = _CONFINED.format(
            python=python,
            tree=Path(__file__).parents[2],
            home=Path.home(),
            user=USER,
            volume=VOLUME,
            cache=CACHE,
        )
        wrapped = ["unshare", "-m", "sh", "-ec", setup, "sh", *command] if confined else command
        with log.open("ab") as output:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *wrapped],
                env={"PATH": os.environ["PATH"], "FIRST": " ".join(first), **environment},
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self.processes.append(process)
        return process

    def call(self, what: Callable[[], T]) -> T:
        """Run a function in a thread that is inside."""
        with ThreadPoolExecutor(1, initializer=self._enter) as thread:
            return thread.submit(what).result()

    def _enter(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        with open(f"/run/netns/{self.name}") as namespace:
            if libc.setns(namespace.fileno(), _NEW_NETWORK):
                raise OSError(ctypes.get_errno(), f"cannot enter {self.name}")

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        subprocess.run(["ip", "netns", "del", self.name], check=True)


@contextmanager
def two_networks() -> Iterator[tuple[Network, Network]]:
    """Two namespaces that reach each other and nothing else (addresses of RFC 5737)."""
    a = Network(f"guard-a-{os.getpid()}", "192.0.2.1")
    b = Network(f"guard-b-{os.getpid()}", "192.0.2.2")
    made = []
    try:
        for one in (a, b):
            subprocess.run(["ip", "netns", "add", one.name], check=True)
            made.append(one)
        link = ["ip", "-n", a.name, "link", "add", "eth0", "type", "veth"]
        subprocess.run([*link, "peer", "name", "eth0", "netns", b.name], check=True)
        for one in (a, b):
            within = ["ip", "-n", one.name]
            subprocess.run([*within, "addr", "add", f"{one.address}/24", "dev", "eth0"], check=True)
            for device in ("lo", "eth0"):
                subprocess.run([*within, "link", "set", device, "up"], check=True)
        yield a, b
    finally:
        for one in made:
            one.close()


def get(host: str, port: int, path: str) -> tuple[int, bytes]:
    """Status and body."""
    return ask(host, port, "GET", path)[:2]


def ask(
    host: str, port: int, method: str, path: str, body: bytes = b""
) -> tuple[int, bytes, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection(host, port, timeout=30)
    try:
        connection.request(method, path, body or None, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        return reply.status, reply.read(), reply.headers
    finally:
        connection.close()


def until(holds: Callable[[], bool], what: str) -> None:
    """Ask again and again; fails after a patience that is no measure of speed."""
    ends = time.monotonic() + PATIENCE_S
    while time.monotonic() < ends:
        try:
            if holds():
                return
        except OSError:
            pass
        time.sleep(0.05)
    pytest.fail(f"not within {PATIENCE_S} s: {what}")


def status(process: subprocess.Popen[bytes]) -> dict[str, str]:
    """What the kernel says of it."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def ended(process: subprocess.Popen[bytes]) -> int:
    """Ask it to end, as kubelet does; the exit code."""
    process.send_signal(signal.SIGTERM)
    return process.wait(PATIENCE_S)
