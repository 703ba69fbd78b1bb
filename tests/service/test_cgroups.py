"""Limits of control groups, from files as the kernel writes them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from guard_service.cgroups import ControlGroups
from guard_service.config import Settings

GIB = 2**30
MEMINFO = f"MemTotal: {64 * GIB // 1024} kB\nMemAvailable: {32 * GIB // 1024} kB\n"


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))


def groups(folder: Path, own: str, **files: str) -> ControlGroups:
    """Those of a process whose /proc file says `own`, with the files of a mount."""
    (folder / "own").write_text(own)
    (folder / "meminfo").write_text(MEMINFO)
    for name, text in files.items():
        path = folder / "mount" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return ControlGroups(folder / "own", folder / "mount", folder / "meminfo")


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", 8), ("400000 100000", 4), ("150000 100000", 2), ("5000 100000", 1), ("", 8)],
)
def test_cores_are_the_share_of_time_rounded_up(tmp_path: Path, quota: str, cores: int) -> None:
    assert groups(tmp_path, "0::/\n", **{"cpu.max": f"{quota}\n"}).cores() == cores


def test_more_time_than_cores_makes_no_more_cores(tmp_path: Path) -> None:
    assert groups(tmp_path, "0::/\n", **{"cpu.max": "3200000 100000\n"}).cores() == 8


def test_the_least_of_the_groups_above_counts(tmp_path: Path) -> None:
    files = {
        "pods/cpu.max": "200000 100000\n",
        "pods/one/cpu.max": "max 100000\n",
        "pods/memory.max": f"{4 * GIB}\n",
        "pods/memory.current": f"{3 * GIB}\n",
        "pods/memory.stat": f"anon 5\ninactive_file {GIB // 2}\n",
        "pods/one/memory.max": "max\n",
        "pods/one/memory.current": "7\n",
    }
    found = groups(tmp_path, "0::/pods/one\n", **files)
    assert found.cores() == 2
    assert found.free_bytes() == GIB + GIB // 2


def test_version_1_has_files_of_other_names(tmp_path: Path) -> None:
    files = {
        "cpu,cpuacct/docker/cpu.cfs_quota_us": "300000\n",
        "cpu,cpuacct/docker/cpu.cfs_period_us": "100000\n",
        "cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
        "cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        "memory/memory.limit_in_bytes": f"{2 * GIB}\n",
        "memory/memory.usage_in_bytes": f"{GIB}\n",
        "memory/memory.stat": f"cache 1\ntotal_inactive_file {GIB // 4}\n",
    }
    own = "5:memory:/of/the/host\n4:cpu,cpuacct:/docker\n1:name=systemd:/docker\n"
    found = groups(tmp_path, own, **files)
    assert found.cores() == 3
    assert found.free_bytes() == GIB + GIB // 4


def test_without_limits_the_machine_counts(tmp_path: Path) -> None:
    files = {"memory.limit_in_bytes": "9223372036854771712\n", "memory.usage_in_bytes": "1\n"}
    mounted = {f"memory/{name}": text for name, text in files.items()}
    for found in (
        groups(tmp_path, "3:memory:/\n2:cpu:/\n", **mounted),
        ControlGroups(tmp_path / "none", tmp_path / "none", tmp_path / "meminfo"),
    ):
        assert (found.cores(), found.free_bytes()) == (8, 32 * GIB)


def test_a_group_that_is_full_has_no_room(tmp_path: Path) -> None:
    files = {"memory.max": f"{GIB}\n", "memory.current": f"{2 * GIB}\n"}
    assert groups(tmp_path, "0::/\n", **files).free_bytes() == 0


def test_threads_of_the_engine_are_no_more_than_its_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited = groups(tmp_path, "0::/\n", **{"cpu.max": "200000 100000\n"})
    monkeypatch.setattr("guard_service.config.ControlGroups", lambda: limited)
    assert Settings().engine_threads == 2
    assert Settings(threads=6).engine_threads == 6
