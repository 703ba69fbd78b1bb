"""What loading a large model costs, paid once: graphs made ready for this machine, and its choices.

A folder of the user's own keeps, for each (artifact, plan, onnxruntime, processor), a graph whose
matrices are expanded and packed. onnxruntime maps that file into memory, so processes share it. It
also keeps which plan was fastest here. All of it can be deleted at any time.
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
from collections.abc import Callable
from pathlib import Path

import onnxruntime

LOG = logging.getLogger(__name__)
GRAPH, DATA = "model.onnx", "model.onnx.data"
_CHOICE_BYTES = 4096


class Prepared:
    """A folder that only this user can write; None of it when there is no such folder."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = _private(folder) if folder is not None else None

    def graph(self, digest: str, plan: str) -> Path | None:
        """The graph made ready, if there is one."""
        place = self._place(digest, plan)
        found = place is not None and (place / GRAPH).is_file() and (place / DATA).is_file()
        return place / GRAPH if place is not None and found else None

    def make(self, digest: str, plan: str, write: Callable[[Path], None]) -> Path | None:
        """Let `write` make GRAPH and DATA in a folder, which then appears whole; None without one.

        Another process may have been faster: then its graph is taken.
        """
        place = self._place(digest, plan)
        if place is None:
            return None
        try:
            with tempfile.TemporaryDirectory(dir=place.parent, prefix=".making-") as draft:
                write(Path(draft))
                if not place.exists():
                    os.rename(draft, place)
                    Path(draft).mkdir()  # for its own removal
        except OSError as error:
            LOG.warning("no graph made ready in %s: %s", place.parent, error.strerror)
        return self.graph(digest, plan)

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
    """The folder, made if need be; None when it is another's, or others may write into it."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as error:
        LOG.info("nothing is kept in %s: %s", folder, error.strerror)
        return None
    if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        LOG.warning("%s is not this user's alone; nothing is kept there or read from it", folder)
        return None
    return folder if os.access(folder, os.W_OK) else None
