"""What all screened requests of a middleware share, and how each of them is refused."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import lru_cache

from guard_middleware.formats.contract import Answer, Asked, Format, Refusal
from guard_middleware.guards import Guard
from guard_middleware.messages import App, Header
from guard_middleware.metrics import Metrics
from guard_middleware.service_info import PolicySummary
from guard_middleware.settings import Settings
from guard_middleware.tracing import Tracing
from guard_policies.schema import DEFAULT_REFUSAL, Stream, Unscannable


@dataclass(frozen=True, slots=True)
class Context:
    """The application, who judges, and what was set."""

    app: App
    guard: Guard
    settings: Settings
    metrics: Metrics
    tracing: Tracing | None = None


async def in_force(settings: Settings, guard: Guard) -> Settings:
    """The settings, with what the guard's policy declares where they leave that to it; where that
    is not known, what is safe."""
    return _under(settings, await guard.policy())


@lru_cache(maxsize=16)
def _under(settings: Settings, policy: PolicySummary | None) -> Settings:
    passes = policy is not None and policy.on_unscannable_prompt in _PASSES
    unscannable = settings.unscannable
    if unscannable == "policy":
        unscannable = "pass" if passes else "block"
    told = policy.refusal(settings.language) if policy else ""
    stream = policy.stream if policy else Stream()
    sentences = settings.sentence_pieces
    if sentences == "policy":
        sentences = "on" if stream.sentence_ends else "off"
    return replace(
        settings,
        unscannable=unscannable,
        refusal=settings.refusal or told or DEFAULT_REFUSAL,
        first_check_chars=settings.first_check_chars or stream.first_check_chars,
        piece_chars=settings.piece_chars or stream.check_every_chars,
        sentence_pieces=sentences,
        hold_back_chars=settings.hold_back_chars or stream.hold_back_chars,
    )


_PASSES = (Unscannable.ALLOW, Unscannable.FLAG)


def id_header(id_: str) -> Header:
    """The header of every screened response; logs tell by the id what the verdicts were."""
    return (b"x-guard-verdict-id", id_.encode())


def refused(settings: Settings, format_: Format, asked: Asked, id_: str) -> Answer:
    """The same answer whether the guard said no or could not say anything."""
    if settings.refuse_with == "error":
        return format_.error(400, "content_filter", settings.refusal)
    return format_.refuse(asked, refusal(settings, id_))


def refusal(settings: Settings, id_: str) -> Refusal:
    """What stands in place of what was blocked."""
    return Refusal(settings.refusal, id_, int(time.time()))
