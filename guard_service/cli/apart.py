"""A guard in a process of its own beside guardctl: `python -m guard_service.cli.apart`.

In guardctl's own process, guard and callers would take turns at the interpreter lock, and what was
measured would be the waiting for it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import typer

from guard_service.cli import exits

STOP_S = 10.0


@contextmanager
def guard_apart(model: str, policies: Sequence[Path]) -> Iterator[str]:
    """A guard in another process, ended on leaving; yields its target. Ends guardctl on failure."""
    command = [sys.executable, "-m", "guard_service.cli.apart", model, *map(str, policies)]
    paths = os.pathsep.join(path for path in sys.path if path)
    guard = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert guard.stdin is not None and guard.stdout is not None
    try:
        target = guard.stdout.readline().decode().strip()
        if not target:
            raise typer.Exit(exits.NO_VERDICT)  # it has said why on standard error
        yield target
    finally:
        guard.stdin.close()
        try:
            guard.wait(STOP_S)
        except subprocess.TimeoutExpired:
            guard.kill()
            guard.wait()
        guard.stdout.close()


def main() -> None:
    """Serve until standard input ends, which it does when guardctl does."""
    from guard_service.cli.place import guard_here

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for guardctl, which then ends us
    model, *policies = sys.argv[1:]
    try:
        with guard_here(model, tuple(map(Path, policies))) as target:
            print(target, flush=True)
            sys.stdin.buffer.read()
    except typer.Exit as end:
        sys.exit(end.exit_code)


if __name__ == "__main__":
    main()
