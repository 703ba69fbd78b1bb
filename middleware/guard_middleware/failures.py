"""How a failure is logged: what and where, never in its own words, which could quote a request."""

from __future__ import annotations

import logging
import traceback


def log_failure(log: logging.Logger, what: str, failure: BaseException) -> None:
    """One error: `what`, the exception's type, and the lines of code that it came through.

    Connections that break are nobody's defect: of them no lines are told.
    """
    kind = type(failure).__name__
    if isinstance(failure, ConnectionError | TimeoutError):
        log.warning("%s: %s", what, kind)
        return
    log.error("%s: %s\n%s", what, kind, "".join(traceback.format_tb(failure.__traceback__)))
