"""A guard in front of models: ASGI middleware, sidecar, and clients of a guard service."""

from guard_middleware.asgi import GuardMiddleware
from guard_middleware.bearer import TokenFile
from guard_middleware.calls import Item, Piece
from guard_middleware.channel import TLS
from guard_middleware.client import AsyncGuardClient, GuardClient
from guard_middleware.errors import (
    BadReply,
    CouldNotJudge,
    DeadlineExceeded,
    EngineFailed,
    GuardError,
    InvalidRequest,
    NotPermitted,
    NotSupported,
    Overloaded,
    Unavailable,
    UnknownPolicy,
)
from guard_middleware.in_code import guarded
from guard_middleware.in_code_calls import Blocked
from guard_middleware.retry import Retries
from guard_middleware.settings import Settings
from guard_middleware.terms import Terms
from guard_middleware.verdict import Outcome, StreamOutcome, Unjudged, Verdict
from guard_policies.assessment import Action, Direction

__all__ = [
    "TLS",
    "Action",
    "AsyncGuardClient",
    "BadReply",
    "Blocked",
    "CouldNotJudge",
    "DeadlineExceeded",
    "Direction",
    "EngineFailed",
    "GuardClient",
    "GuardError",
    "GuardMiddleware",
    "InvalidRequest",
    "Item",
    "NotPermitted",
    "NotSupported",
    "Outcome",
    "Overloaded",
    "Piece",
    "Retries",
    "Settings",
    "StreamOutcome",
    "Terms",
    "TokenFile",
    "Unavailable",
    "Unjudged",
    "UnknownPolicy",
    "Verdict",
    "guarded",
]
