"""Exit codes of guardctl, and the way a verb ends with one."""

from __future__ import annotations

import sys
from typing import NoReturn

import typer

from guard_policies.assessment import Action
from guard_service.terminal import printable as printable

OK = 0
NO_VERDICT = 1  # could not judge; or, for verbs that do not judge, failed
USAGE = 2
UNFINISHED = 3  # bulk only: run it again to go on
INTERRUPTED = 130
BY_ACTION = {Action.ALLOW: 0, Action.FLAG: 10, Action.BLOCK: 20}


def fail(message: str, code: int = NO_VERDICT) -> NoReturn:
    """Say why on standard error and end with `code`."""
    print(f"guardctl: {printable(message)}", file=sys.stderr)
    raise typer.Exit(code)
