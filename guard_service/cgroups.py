"""What the kernel lets this process have: cores and memory, by the limits of its control groups.

Both versions of Linux's control groups (cgroups(7)). A group is held to its parents' limits too.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_UNLIMITED = 2**60  # what version 1 says, give or take, where there is no limit
_V1_CPU, _V1_MEMORY = "cpu", "memory"


@dataclass(frozen=True, slots=True)
class ControlGroups:
    """The groups that a process is in, as /proc and the mounted file system tell it."""

    own: Path = Path("/proc/self/cgroup")
    mount: Path = Path("/sys/fs/cgroup")
    meminfo: Path = Path("/proc/meminfo")

    def cores(self) -> int:
        """Cores that this process can keep busy: those it may run on, or its share of time if that
        is less, rounded up; at least 1."""
        allowed = len(os.sched_getaffinity(0))
        shares = [self._quota(group) for group in self._groups(_V1_CPU)]
        return max(math.ceil(min([allowed, *filter(None, shares)])), 1)

    def free_bytes(self) -> int:
        """Memory that can still be had without anyone being killed for it; caches of files count
        as free, since they give way."""
        rooms = [self._room(group) for group in self._groups(_V1_MEMORY)]
        return max(min([self._available(), *(room for room in rooms if room is not None)]), 0)

    def _groups(self, controller: str) -> Iterator[Path]:
        """Folders of the group and of all above it."""
        for line in _text(self.own).splitlines():
            number, _, rest = line.partition(":")
            names, _, path = rest.partition(":")
            if number == "0" and not names:
                root = self.mount
            elif controller in names.split(","):
                root = next((p for p in self._roots(controller, names) if p.is_dir()), self.mount)
            else:
                continue
            here = root / path.lstrip("/")
            while here.is_relative_to(root):  # in a container the path may be the host's
                if here.is_dir() and ".." not in here.parts:
                    yield here
                here = here.parent

    def _roots(self, controller: str, names: str) -> tuple[Path, Path]:
        return self.mount / controller, self.mount / names

    def _quota(self, group: Path) -> float | None:
        """Cores' worth of time; None without a limit."""
        quota, _, period = _text(group / "cpu.max").strip().partition(" ")
        if not quota:
            quota, period = (
                _text(group / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")
            )
        try:
            share = int(quota) / int(period)
        except (ValueError, ZeroDivisionError):  # "max", or no such file
            return None
        return share if share > 0 else None

    def _room(self, group: Path) -> int | None:
        """Bytes up to the limit; None without one."""
        for limit, usage, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            try:
                most, used = int(_text(group / limit)), int(_text(group / usage))
            except ValueError:
                continue
            if most < _UNLIMITED:
                return most - used + _named(_text(group / "memory.stat"), cache)
        return None

    def _available(self) -> int:
        return _named(_text(self.meminfo), "MemAvailable:") * 1024


def _named(text: str, name: str) -> int:
    """The number beside a name in lines of names and numbers; 0 when it is not there."""
    for line in text.splitlines():
        words = line.split()
        if len(words) > 1 and words[0] == name and words[1].isdigit():
            return int(words[1])
    return 0


def _text(path: Path) -> str:
    """Empty for what cannot be read."""
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
