"""Progress of a long run on standard error: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

EVERY_S = 10.0


class Progress(Protocol):
    """Told after each line; `read_bytes` of the input so far."""

    def __call__(self, done: int, errors: int, read_bytes: int) -> None: ...


@contextmanager
def shown(total_bytes: int, clock: Callable[[], float] = time.monotonic) -> Iterator[Progress]:
    """The display for as long as the run takes; `total_bytes` 0 when unknown."""
    if sys.stderr.isatty():
        with _bar(total_bytes) as progress:
            yield progress
    else:
        yield _Lines(total_bytes, clock)


@contextmanager
def _bar(total_bytes: int) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.fields[done]} judged, {task.fields[errors]} errors"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]:.0f}/s"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total_bytes or None, done=0, errors=0, rate=0.0)
        start, first = time.monotonic(), -1

        def progress(done: int, errors: int, read_bytes: int) -> None:
            nonlocal first
            first = done - 1 if first < 0 else first
            rate = (done - first) / max(1e-9, time.monotonic() - start)
            bar.update(task, completed=read_bytes, done=done, errors=errors, rate=rate)

        yield progress


class _Lines:
    def __init__(self, total_bytes: int, clock: Callable[[], float]) -> None:
        self._total_bytes = total_bytes
        self._clock = clock
        self._said_at = clock()

    def __call__(self, done: int, errors: int, read_bytes: int) -> None:
        now = self._clock()
        if now - self._said_at < EVERY_S:
            return
        self._said_at = now
        share = f", {100 * read_bytes / self._total_bytes:.0f} % read" if self._total_bytes else ""
        print(f"guardctl: {done} judged, {errors} errors{share}", file=sys.stderr, flush=True)
