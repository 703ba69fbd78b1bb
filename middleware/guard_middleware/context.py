"""What all screened requests of a middleware share, and how each of them is refused."""

from __future__ import annotations

import time
from dataclasses import dataclass

from guard_middleware.formats.contract import Answer, Asked, Format, Refusal
from guard_middleware.guards import Guard
from guard_middleware.messages import App, Header
from guard_middleware.metrics import Metrics
from guard_middleware.settings import Settings


@dataclass(frozen=True, slots=True)
class Context:
    """The application, who judges, and what was set."""

    app: App
    guard: Guard
    settings: Settings
    metrics: Metrics


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
