"""Runs a module as a program that ends when its parent does, and tells how many asyncio tasks it
has when it gets SIGUSR1.

`python -m tests.chaos.watched FILE MODULE ARGUMENTS...`; the number goes to FILE.
"""

from __future__ import annotations

import asyncio
import ctypes
import runpy
import signal
import sys
from pathlib import Path

_WHEN_PARENT_ENDS = 1  # PR_SET_PDEATHSIG, in <sys/prctl.h>


def main() -> None:
    """Become the module."""
    file, module, *arguments = sys.argv[1:]

    def tell(_number: int, _frame: object) -> None:
        try:
            tasks = len(asyncio.all_tasks())
        except RuntimeError:  # no loop runs
            tasks = 0
        draft = Path(f"{file}.draft")
        draft.write_text(str(tasks))
        draft.replace(file)

    signal.signal(signal.SIGUSR1, tell)
    ctypes.CDLL(None).prctl(_WHEN_PARENT_ENDS, signal.SIGKILL)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
