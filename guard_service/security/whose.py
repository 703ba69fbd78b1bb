"""On whose behalf the current call runs: what one tenant asked is kept apart from all others."""

from __future__ import annotations

from contextvars import ContextVar

# The tenant's name; empty where there are none. Set for each call (interceptors.py), read where
# verdicts are remembered (moderation.py) and where prompts wait for the engine (batcher.py).
WHOSE: ContextVar[str] = ContextVar("guard_whose", default="")
