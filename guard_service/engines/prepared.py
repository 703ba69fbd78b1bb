"""What loading a large model costs, paid once: graphs made ready for this machine, and its choices.

A folder of the user's own keeps, for each (artifact, plan, onnxruntime, processor), a graph whose
matrices are expanded and packed. onnxruntime maps that file into memory, so processes share it. It
also keeps which plan was fastest here. What was not used for longest goes when more comes. All of
it can be deleted at any time: a process that has a graph mapped keeps it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import onnxruntime

LOG = logging.getLogger(__name__)
GRAPH, DATA = "model.onnx", "model.onnx.data"
_CHOICE_BYTES = 4096
_MOST_GRAPHS, _MOST_CHOICES = 4, 64
_ABANDONED_S = 3600  # without a change: whoever was making a graph there is no more
_DRAFT = ".making-"
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class Prepared:
    """A folder that only this user can write; None of it when there is no such folder."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = _private(folder) if folder is not None else None

    def graph(self, digest: str, plan: str) -> Path | None:
        """The graph made ready, if there is one; it counts as used now."""
        place = self._place(digest, plan)
        if place is None or not _own(place):
            return None
        try:
            os.utime(place)
        except OSError:  # another process has just removed it
            return None
        whole = (place / GRAPH).is_file() and (place / DATA).is_file()
        return place / GRAPH if whole else None

    def make(self, digest: str, plan: str, write: Callable[[Path], None]) -> Path | None:
        """Let `write` make GRAPH and DATA in a folder, which then appears whole; None without one.

        Another process may have been faster: then its graph is taken.
        """
        place = self._place(digest, plan)
        if place is None:
            return None
        try:
            with tempfile.TemporaryDirectory(dir=place.parent, prefix=_DRAFT) as draft:
                write(Path(draft))
                if not place.exists():
                    os.rename(draft, place)
                    Path(draft).mkdir()  # for its own removal
        except OSError as error:
            LOG.warning("no graph made ready in %s: %s", place.parent, error.strerror)
        made = self.graph(digest, plan)
        _evict(place.parent)
        return made

    def drop(self, digest: str, plan: str) -> None:
        """Delete a graph that cannot be loaded."""
        place = self._place(digest, plan)
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)

    def choice(self, digest: str, threads: int) -> str | None:
        """The plan that was fastest with this many threads."""
        path = self._choice(digest, threads)
        try:
            found = json.loads(path.read_bytes()[:_CHOICE_BYTES]) if path is not None else None
        except (OSError, ValueError, RecursionError):
            return None
        plan = found.get("plan") if isinstance(found, dict) else None
        return plan if isinstance(plan, str) else None

    def choose(self, digest: str, threads: int, plan: str, seconds: dict[str, float]) -> None:
        """Remember a choice, and what it was made by."""
        path = self._choice(digest, threads)
        if path is None:
            return
        draft = path.with_suffix(f".{os.getpid()}")
        try:
            draft.write_text(json.dumps({"plan": plan, "seconds": seconds}) + "\n", "utf-8")
            os.replace(draft, path)
        except OSError as error:
            LOG.warning("the kernel plan is not remembered: %s", error.strerror)

    def _place(self, digest: str, plan: str) -> Path | None:
        return self.folder / _name(digest, plan) if self.folder is not None else None

    def _choice(self, digest: str, threads: int) -> Path | None:
        name = f"{_name(digest, str(threads))}.json"
        return self.folder / name if self.folder is not None else None


def flags() -> frozenset[str]:
    """What the first processor can do, by Linux's names; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return frozenset()
    named = (line for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(named, "").partition(":")[2].split())


def _name(*parts: str) -> str:
    machine = (onnxruntime.__version__, platform.machine(), *sorted(flags()))
    return hashlib.sha256("\n".join((*parts, *machine)).encode()).hexdigest()[:32]


def _private(folder: Path) -> Path | None:
    """The folder, made if need be; None when others own it, or may write into it or replace it."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = folder.resolve(strict=True)
        safe = _own(folder) and all(map(_keeps, folder.parents))
    except OSError as error:
        LOG.info("nothing is kept in %s: %s", folder, error.strerror)
        return None
    if not safe:
        LOG.warning(
            "%s is not this user's alone; nothing is kept there or read from it: it, and all above "
            "it, must belong to this user or root, and others may write into it only where it is "
            "sticky, as /tmp is; on a Kubernetes volume let an init container make a folder and "
            "mount that by its subPath",
            folder,
        )
        return None
    return folder if os.access(folder, os.W_OK) else None


def _evict(folder: Path) -> None:
    """Remove what was not used for longest, and drafts of processes that were killed."""
    made = [path for path in folder.glob("*") if path.is_dir()]
    drafts = [path for path in made if path.name.startswith(_DRAFT)]
    gone = _oldest((path for path in made if path not in drafts), _MOST_GRAPHS)
    gone += [path for path in drafts if time.time() - _used(path) > _ABANDONED_S]
    for path in gone:
        shutil.rmtree(path, ignore_errors=True)
    for path in _oldest(folder.glob("*.json"), _MOST_CHOICES):
        path.unlink(missing_ok=True)


def _own(path: Path) -> bool:
    """Is it there, no link, this user's, and closed to what others write?"""
    try:
        found = path.lstat()
    except OSError:
        return False
    plain = stat.S_ISDIR(found.st_mode) or stat.S_ISREG(found.st_mode)
    return plain and found.st_uid == os.geteuid() and not found.st_mode & _OTHERS_WRITE


def _keeps(folder: Path) -> bool:
    """Is what this user has in a folder safe from being replaced? As in /tmp, others may add."""
    found = folder.stat()
    sticky = bool(found.st_mode & stat.S_ISVTX)
    return found.st_uid in (0, os.geteuid()) and (sticky or not found.st_mode & _OTHERS_WRITE)


def _oldest(paths: Iterable[Path], most: int) -> list[Path]:
    """All but the `most` that were used last."""
    return sorted(paths, key=_used, reverse=True)[most:]


def _used(path: Path) -> float:
    """When it was used, in seconds; 0 for what is gone."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
